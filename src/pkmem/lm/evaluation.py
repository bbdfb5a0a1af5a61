"""What a language model is worth: perplexity, bits per byte, use of its memories, tokens per second."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from pkmem.layer.usage import usage_figures, watching


def evaluate(
    model: nn.Module,
    blocks: Dataset,
    bytes_per_token: float,
    batch_sequences: int = 8,
    max_tokens: int | None = None,
    progress: bool = False,
    together: bool = False,
) -> dict[str, float]:
    """Loss of a causal language model on held-out blocks, and how it uses its memories (section 4.1).

    Args:
        model: a Hugging Face causal language model; put in eval mode and back.
        blocks: items with `input_ids` (t,); every token but a block's first is predicted. Where they have `labels` (t,),
            those of -100 are not.
        bytes_per_token: bytes of the text per token predicted, which turns nats per token into bits per byte.
        batch_sequences: blocks evaluated at once.
        max_tokens: the first blocks up to about this many tokens; None takes all.
        progress: show a progress bar.
        together: the processes of torch.distributed each take a share of the blocks; all call this, and get the same.

    Returns:
        loss (nats per token), perplexity, bits_per_byte, num_tokens (predicted), and per memory
        `<memory>/usage`, `/top1_usage`, `/kl`, `/dead_slots`, `/hottest_share`.
    """
    if max_tokens is not None:
        num_blocks = max(1, max_tokens // len(blocks[0]["input_ids"]))
        blocks = Subset(blocks, range(min(num_blocks, len(blocks))))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    total, count = 0.0, 0
    share = _share(len(blocks), batch_sequences) if together else None  # type: ignore[arg-type]
    with in_eval_mode(model), watching(model) as usages:
        loader = DataLoader(blocks, 1 if share else batch_sequences, batch_sampler=share)
        for batch in tqdm(loader, "evaluating", disable=not progress):
            tokens = batch["input_ids"].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            targets = batch.get("labels", batch["input_ids"]).to(device)[:, 1:].flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")  # 0 where a target is -100
            total += losses.double().sum().item()
            count += int((targets >= 0).sum())
    if share:
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        for counts in (sums, *(counts for usage in usages.values() for counts in usage.counts(device))):
            dist.all_reduce(counts)
        total, count = sums[0].item(), int(sums[1])
    loss = total / count
    result = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "num_tokens": count,
    }
    return result | usage_figures(usages)


def _share(num_blocks: int, batch_sequences: int) -> list[list[int]] | None:
    """The batches of this process, as many as every other's, since sharded tables are read together.

    None where there are fewer blocks than processes: each takes all.
    """
    num = dist.get_world_size()
    if num_blocks < num:
        return None
    num_batches = -(-num_blocks // (num * batch_sequences))
    return [part.tolist() for part in torch.arange(dist.get_rank(), num_blocks, num).tensor_split(num_batches)]


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
