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
        loss (nats per token), perplexity, bits_per_byte, num_tokens (predicted); repeated_share of these, which end a
        pair of tokens that stood in their block before, so that attention could copy them, repeated_loss of them and
        new_loss of the others (nats per token; absent where there are none); and per memory `<memory>/usage`,
        `/top1_usage`, `/kl`, `/dead_slots`, `/hottest_share`.

    The two kinds of tokens are after the "associative recall hits" of Arora et al., "Zoology", arXiv 2312.04927, but
    here pairs that are frequent in the training text count as well.
    """
    if max_tokens is not None:
        num_blocks = max(1, max_tokens // len(blocks[0]["input_ids"]))
        blocks = Subset(blocks, range(min(num_blocks, len(blocks))))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # of new and of repeated tokens: loss, number
    share = _share(len(blocks), batch_sequences) if together else None  # type: ignore[arg-type]
    with in_eval_mode(model), watching(model) as usages:
        loader = DataLoader(blocks, 1 if share else batch_sequences, batch_sampler=share)
        for batch in tqdm(loader, "evaluating", disable=not progress):
            tokens = batch["input_ids"].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            targets = batch.get("labels", batch["input_ids"]).to(device)[:, 1:].flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")  # 0 where a target is -100
            counted = torch.stack([losses.double(), (targets >= 0).double()], dim=1)
            is_repeated = _is_repeated(tokens).flatten()
            sums += torch.stack([counted[~is_repeated].sum(dim=0), counted[is_repeated].sum(dim=0)])
    if share:
        for counts in (sums, *(counts for usage in usages.values() for counts in usage.counts(device))):
            dist.all_reduce(counts)
    return _losses(sums.tolist(), bytes_per_token) | usage_figures(usages)


def _is_repeated(tokens: torch.Tensor) -> torch.Tensor:
    """Whether each token but a sequence's first ends a pair of tokens that stood before in its sequence.

    Args:
        tokens: (sequences, t), >= 0.

    Returns:
        (sequences, t - 1) bool.
    """
    pairs = tokens[:, :-1] * (tokens.max() + 1) + tokens[:, 1:]
    ordered, order = pairs.sort(dim=1, stable=True)  # so the first of equal pairs comes first
    return torch.zeros_like(ordered, dtype=torch.bool).scatter(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])


def _losses(sums: list[list[float]], bytes_per_token: float) -> dict[str, float]:
    """What to call the loss and the number of new and of repeated tokens."""
    (new_total, num_new), (repeated_total, num_repeated) = sums
    count = int(num_new + num_repeated)
    loss = (new_total + repeated_total) / count
    figures = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "num_tokens": count,
        "repeated_share": num_repeated / count,
    }
    figures |= {"repeated_loss": repeated_total / num_repeated} if num_repeated else {}
    return figures | ({"new_loss": new_total / num_new} if num_new else {})


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
