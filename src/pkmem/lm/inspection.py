"""A look inside the memories of a model: their sizes, their values, and who reads what."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.usage import watching
from pkmem.layer.values import ValueTable


def describe_memories(model: PreTrainedModel) -> str:
    """A line per memory: place, slots, heads, neighbours, size and the spread of its values' norms."""
    memories = memories_in(model)
    if not memories:
        return "no memories in this model"
    lines = []
    tables: dict[int, str] = {}
    for i, (name, memory) in enumerate(memories.items()):
        values: ValueTable | QuantisedValues = memory.values
        weight = values.weight
        width, stored = weight.shape[1], str(weight.dtype).removeprefix("torch.")
        norms = weight.detach().float().norm(dim=1)
        if isinstance(values, QuantisedValues):
            width, stored, norms = values.width, f"int{values.bits}", values.norms()
        shared = tables.setdefault(id(weight), f"memory_{i}")
        config = memory.config
        lines += [
            f"memory_{i} at {name}",
            f"  {config.num_slots:,} slots ({config.num_sub_keys} x {config.num_sub_keys} sub-keys), "
            f"{config.heads} heads x {config.knn} neighbours, query {config.query_dim} ({config.query_norm} norm)"
            + (", each slot an expert of one neuron" if config.experts else ""),
            f"  values {weight.shape[0]:,} x {width} {stored}, "
            f"{weight.numel() * weight.element_size() / 1e6:,.1f} MB"
            + (f", shared with {shared}" if shared != f"memory_{i}" else ""),
            f"  norm of a value: median {norms.median():.3f}, smallest {norms.min():.3f}, largest {norms.max():.3f}",
        ]
    return "\n".join(lines)


def describe_reads(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: Dataset, max_tokens: int, hottest: int
) -> str:
    """What the memories read on a text: usage, KL, and the tokens at which the hottest slots are read.

    Args:
        model: with memories or without.
        tokenizer: its tokenizer.
        blocks: items with `input_ids`.
        max_tokens: about how many tokens of them to read.
        hottest: slots to show per memory.
    """
    num_blocks = max(1, max_tokens // len(blocks[0]["input_ids"]))
    some = Subset(blocks, range(min(num_blocks, len(blocks))))  # type: ignore[arg-type]
    reads: list[list[Tensor]] = [[] for _ in memories_in(model)]
    tokens = []
    with torch.no_grad(), watching(model) as usages, _collecting_reads(model, reads):
        for batch in DataLoader(some, 8):
            tokens.append(batch["input_ids"].flatten())
            model(input_ids=batch["input_ids"], use_cache=False)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    lines = []
    for (name, usage), slots in zip(usages.items(), reads, strict=True):
        lines.append(
            f"{name} over {sum(map(len, tokens)):,} tokens: usage {usage.usage:.1%}, top-1 usage {usage.top1_usage:.1%}, "
            f"KL {usage.kl:.3f} nats, {usage.dead_slots:,} dead slots, "
            f"hottest 1 % of slots take {usage.hottest_share:.1%} of the reads"
        )
        hot = usage.num_reads.topk(min(hottest, len(usage.num_reads)))
        for slot, num_reads in zip(hot.indices.tolist(), hot.values.tolist(), strict=True):
            readers = torch.cat(tokens)[(torch.cat(slots) == slot).any(1)]
            common = Counter(readers.tolist()).most_common(6)
            at = ", ".join(f"{texts[token]!r} x{count}" for token, count in common)
            lines.append(f"  slot {slot:>8,}: {num_reads:,} reads, most at {at}")
    return "\n".join(lines) or "no memories in this model"


@contextlib.contextmanager
def _collecting_reads(model: nn.Module, reads: list[list[Tensor]]) -> Iterator[None]:
    """Appends the slots (n, h * knn) of every reading, per memory."""
    hooks = [
        memory.keys.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output[0].flatten(1).int()))
        for memory, kept in zip(memories_in(model).values(), reads, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
