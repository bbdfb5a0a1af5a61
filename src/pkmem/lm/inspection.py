"""A look inside the memories of a model: their sizes, their values, and who reads what."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.usage import watching
from pkmem.layer.values import ValueTable

_TEXTS_AT_ONCE = 8


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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Dataset,
    max_tokens: int,
    hottest: int,
    progress: bool = False,
) -> str:
    """What the memories read on a text: usage, KL, and the tokens at which the hottest slots are read.

    Args:
        model: with memories or without.
        tokenizer: its tokenizer.
        blocks: items with `input_ids`.
        max_tokens: about how many tokens of them to read.
        hottest: slots to show per memory.
        progress: show a progress bar.
    """
    read = texts_to_read(blocks, max_tokens)
    with watching(model) as usages, _collecting_slots(model) as reads:
        read_texts(model, read, progress)
    tokens = one_after_another(read)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    lines = []
    for (name, usage), watcher in zip(usages.items(), reads, strict=True):
        slots_read = torch.cat(watcher.kept)
        lines.append(
            f"{name} over {len(tokens):,} tokens: usage {usage.usage:.1%}, top-1 usage {usage.top1_usage:.1%}, "
            f"KL {usage.kl:.3f} nats, {usage.dead_slots:,} dead slots, "
            f"hottest 1 % of slots take {usage.hottest_share:.1%} of the reads"
        )
        hot = usage.num_reads.topk(min(hottest, len(usage.num_reads)))
        for slot, num_reads in zip(hot.indices.tolist(), hot.values.tolist(), strict=True):
            readers = tokens[(slots_read == slot).any(1)]
            common = Counter(readers.tolist()).most_common(6)
            at = ", ".join(f"{texts[token]!r} x{count}" for token, count in common)
            lines.append(f"  slot {slot:>8,}: {num_reads:,} reads, most at {at}")
    return "\n".join(lines) or "no memories in this model"


def texts_to_read(blocks: Any, max_tokens: int) -> list[Tensor]:
    """The tokens of the first blocks, about `max_tokens` of them together, but of one block at least if there is one."""
    num_blocks = max(1, max_tokens // max(1, len(blocks[0]["input_ids"]))) if len(blocks) else 0
    return [blocks[i]["input_ids"] for i in range(min(num_blocks, len(blocks)))]


def one_after_another(texts: Sequence[Tensor]) -> Tensor:
    """The tokens (n,) of texts, in the order in which `read_texts` has a memory see them."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *texts])


@torch.no_grad()
def read_texts(model: PreTrainedModel, texts: Sequence[Tensor], progress: bool = False) -> None:
    """Has a model read texts, several at a time, for whoever watches its memories.

    Args:
        model: a causal language model, in the mode it is in.
        texts: tokens (t,) each, of any lengths; shorter ones are padded behind, and the model is told.
        progress: show a progress bar.
    """
    for first in tqdm(range(0, len(texts), _TEXTS_AT_ONCE), "reading", disable=not progress):
        some = [text.to(model.device) for text in texts[first : first + _TEXTS_AT_ONCE]]
        lengths = {len(text) for text in some}
        masks = pad_sequence([torch.ones_like(text) for text in some], batch_first=True)
        padding = {} if len(lengths) == 1 else {"attention_mask": masks}
        if max(lengths):
            model(input_ids=pad_sequence(some, batch_first=True), use_cache=False, **padding)


class _Slots:
    """Keeps the slots (n, h * knn) of every reading of a memory."""

    def __init__(self, memory: ProductKeyMemory) -> None:
        self.kept = [torch.zeros(0, memory.config.heads * memory.config.knn, dtype=torch.int32)]
        self._memory = memory
        memory.watchers = (*memory.watchers, self)

    def count(self, slots: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """Adds what a memory reads for its real tokens, by a mask (n,)."""
        self.kept.append((slots if mask is None else slots[mask]).flatten(1).int().cpu())

    def close(self) -> None:
        """Stops watching."""
        self._memory.watchers = tuple(watcher for watcher in self._memory.watchers if watcher is not self)


@contextlib.contextmanager
def _collecting_slots(model: nn.Module) -> Iterator[list[_Slots]]:
    watchers = [_Slots(memory) for memory in memories_in(model).values()]
    try:
        yield watchers
    finally:
        for watcher in watchers:
            watcher.close()
