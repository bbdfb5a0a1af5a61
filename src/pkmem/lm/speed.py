"""How fast language models read and write: tokens per second, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pkmem.lm.evaluation import in_eval_mode


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
                prefill = _seconds(lambda model=model: _read_prompt(model, batch_sequences, context_tokens))  # type: ignore[misc]
                decode = _decode_seconds(model, context_tokens // 2, min(32, context_tokens // 2))
            if turn:  # the first turn warms up
                timings[name]["prefill"].append(batch_sequences * context_tokens / prefill)
                timings[name]["decode"].append(1 / decode)
    return {
        name: {f"{what}_tokens_per_s": statistics.median(rates) for what, rates in both.items()}
        for name, both in timings.items()
    }


def _read_prompt(model: nn.Module, batch_sequences: int, num_tokens: int) -> object:
    """What generation does first: the whole prompt, its cache, the logits of its last token."""
    device = next(model.parameters()).device
    tokens = torch.arange(batch_sequences * num_tokens, device=device).view(batch_sequences, num_tokens)
    cache = model(input_ids=tokens % 251, use_cache=True, logits_to_keep=1).past_key_values
    _finish(device)
    return cache


def _decode_seconds(model: nn.Module, prompt_tokens: int, num_steps: int) -> float:
    """Median seconds of a step that reads one token and writes one."""
    cache = _read_prompt(model, 1, prompt_tokens)
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
