"""What a language model is worth: perplexity, bits per byte, use of its memories, tokens per second."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pkmem.memory import ProductKeyMemory, memories_in, tables_in
from pkmem.usage import MemoryUsage


def evaluate(
    model: nn.Module,
    blocks: Dataset,
    bytes_per_token: float,
    batch_sequences: int = 8,
    max_tokens: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Loss of a causal language model on held-out blocks, and how it uses its memories (section 4.1).

    Args:
        model: a Hugging Face causal language model; put in eval mode and back.
        blocks: items with `input_ids` (t,); every token but a block's first is predicted.
        bytes_per_token: bytes of the text per token, which turns nats per token into bits per byte.
        batch_sequences: blocks evaluated at once.
        max_tokens: the first blocks up to about this many tokens; None takes all.
        progress: show a progress bar.

    Returns:
        loss (nats per token), perplexity, bits_per_byte, num_tokens (predicted), and per memory
        `<memory>/usage`, `/top1_usage`, `/kl`, `/dead_slots`, `/hottest_share`.
    """
    if max_tokens is not None:
        num_blocks = max(1, max_tokens // len(blocks[0]["input_ids"]))
        blocks = Subset(blocks, range(min(num_blocks, len(blocks))))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with in_eval_mode(model), watching(model) as usages:
        for batch in tqdm(DataLoader(blocks, batch_sequences), "evaluating", disable=not progress):
            tokens = batch["input_ids"].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
            count += losses.numel()
    loss = total / count
    result = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "num_tokens": count,
    }
    return result | usage_figures(usages)


def usage_figures(usages: dict[str, MemoryUsage]) -> dict[str, float]:
    """The figures of watched memories under flat names: `<memory>/usage` and so on."""
    return {f"{name}/{key}": figure for name, usage in usages.items() for key, figure in usage.summary().items()}


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, MemoryUsage]]:
    """Counts what each memory of a model reads inside the block, by short names: memory_0, memory_1, ..."""
    usages = {short_name(i): MemoryUsage(memory) for i, memory in enumerate(_memories(model))}
    try:
        yield usages
    finally:
        for usage in usages.values():
            usage.close()


def short_name(index: int) -> str:
    """The name of the index-th memory of a model in metrics, in order of the blocks."""
    return f"memory_{index}"


def _memories(model: nn.Module) -> list[ProductKeyMemory]:
    return list(memories_in(model).values())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in the value tables (memory_params) and everywhere else (dense_params)."""
    memory = sum(table.weight.numel() for table in tables_in(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"dense_params": total - memory, "memory_params": memory}


def measure_speed(
    models: dict[str, nn.Module], context_tokens: int, batch_sequences: int = 8, repeats: int = 7
) -> dict[str, dict[str, float]]:
    """Inference speed of several models, measured in turns so that a noisy machine treats them alike.

    Args:
        models: by name, causal language models with one vocabulary.
        context_tokens: tokens per sequence in prefill, >= 2; decode continues half as many.
        batch_sequences: sequences prefilled at once; decode is one sequence, one token a step.
        repeats: turns; the medians are returned.

    Returns:
        per model prefill_tokens_per_s and decode_tokens_per_s.
    """
    timings: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            with in_eval_mode(model):
                prefill = _seconds(lambda model=model: _prefill(model, batch_sequences, context_tokens))  # type: ignore[misc]
                decode = _decode_seconds(model, context_tokens // 2, min(32, context_tokens // 2))
            if turn:  # the first turn warms up
                timings[name]["prefill"].append(batch_sequences * context_tokens / prefill)
                timings[name]["decode"].append(1 / decode)
    return {
        name: {f"{what}_tokens_per_s": statistics.median(rates) for what, rates in both.items()}
        for name, both in timings.items()
    }


def _prefill(model: nn.Module, batch_sequences: int, num_tokens: int) -> object:
    """What generation does first: the whole prompt, its cache, the logits of its last token."""
    device = next(model.parameters()).device
    tokens = torch.arange(batch_sequences * num_tokens, device=device).view(batch_sequences, num_tokens)
    cache = model(input_ids=tokens % 251, use_cache=True, logits_to_keep=1).past_key_values
    _finish(device)
    return cache


def _decode_seconds(model: nn.Module, prompt_tokens: int, num_steps: int) -> float:
    """Median seconds of a step that reads one token and writes one."""
    cache = _prefill(model, 1, prompt_tokens)
    device = next(model.parameters()).device
    token = torch.tensor([[7]], device=device)
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode and nothing records gradients; then it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
