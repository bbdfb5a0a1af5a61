"""What a page about the memories of a model holds: facts, figures and arrays, cut to a size that a browser likes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.inspecting.lens import output_embedding, project_values, why_not_projected
from pkmem.inspecting.packing import Block, pack_counts, pack_json, pack_weights
from pkmem.inspecting.reads import MOST_CONTEXTS, MOST_READS, MemoryReads
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.usage import MemoryUsage
from pkmem.lm.inspection import one_after_another

# What a page holds of each kind, all memories together: 7 MB where 2 x 65,536 slots are all read by 100,000 tokens.
_SLOTS = 1 << 17  # with contexts and tokens for and against: the most read ones
_CONTEXTS = 400_000
_PROJECTED = 800_000
_READS = 400_000
_OF_TOKENS = 150_000
_MOST_PROJECTED, _MOST_OF_TOKENS = 10, 10


@dataclass(frozen=True)
class Reading:
    """A model that has read texts.

    Args:
        name: of the model, for people.
        model: with memories.
        reads: what each of them read.
    """

    name: str
    model: PreTrainedModel
    reads: list[MemoryReads]


@dataclass(frozen=True)
class Content:
    """What a page holds.

    Args:
        facts: what JSON can hold.
        blocks: the arrays by name.
    """

    facts: dict[str, Any]
    blocks: dict[str, Block]


def content_of(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    texts: list[Tensor],
    compared: Reading | None = None,
    progress: bool = False,
) -> Content:
    """The content of a page.

    Args:
        reading: the model, after it has read the texts.
        tokenizer: its tokenizer.
        data: the name of the texts, for people.
        texts: tokens (t,) each.
        compared: a model with memories of the same shapes that has read the same texts.
        progress: show a progress bar.
    """
    return _Writer(reading, tokenizer, data, texts, compared, progress).content()


class _Writer:
    def __init__(
        self,
        reading: Reading,
        tokenizer: PreTrainedTokenizerBase,
        data: str,
        texts: list[Tensor],
        compared: Reading | None,
        progress: bool,
    ) -> None:
        self.reading, self.compared, self.texts, self.progress = reading, compared, texts, progress
        self.tokens = one_after_another(texts)
        self.types = self.tokens.unique()
        self.num = len(reading.reads)
        self.all_texts = token_texts(tokenizer)
        self.embedding = output_embedding(reading.model, len(self.all_texts))
        self.is_used = torch.zeros(max([len(self.all_texts), *(self.types + 1).tolist()]), dtype=torch.bool)
        self.is_used[self.types] = True
        self.data = data
        self.blocks: dict[str, Block] = {}
        self.of_tokens: dict[str, Tensor] = {}  # arrays of tokens, numbered anew when it is known which are used

    def content(self) -> Content:
        """All of it."""
        memories = [self._memory(i) for i in range(self.num)]
        used = self.is_used.nonzero().flatten()
        number = torch.zeros(len(self.is_used), dtype=torch.int64)
        number[used] = torch.arange(len(used))
        for name, tokens in {"tokens": self.tokens, "types": self.types, **self.of_tokens}.items():
            self.blocks[name] = pack_counts(number[tokens])
        lengths = torch.tensor([len(text) for text in self.texts], dtype=torch.int64)
        self.blocks["ends"] = pack_counts(lengths.cumsum(0))
        words = [self.all_texts[i] if i < len(self.all_texts) else f"<{i}>" for i in used.tolist()]
        self.blocks["vocabulary"] = pack_json(json.dumps(words).encode())
        facts = {
            "model": self.reading.name,
            "compared": self.compared and self.compared.name,
            "data": self.data,
            "numTokens": len(self.tokens),
            "numTexts": len(self.texts),
            "memories": memories,
        }
        return Content(facts, self.blocks)

    def _memory(self, i: int) -> dict[str, Any]:
        """The facts of a memory; its arrays go to the blocks."""
        reads = self.reading.reads[i]
        (place, memory), name = list(memories_in(self.reading.model).items())[i], f"memory_{i}"
        of = [*reads.heads, reads.all_heads]
        self._counts(name, reads)
        before = {}
        if self.compared is not None:
            other = self.compared.reads[i]
            self.blocks[f"{name}.compared"] = pack_counts(torch.stack([head.num_reads for head in other.heads]))
            before["compared"] = [_figures(counts) for counts in [*other.heads, other.all_heads]]
        slots = self._read_most(reads.all_heads)
        self.blocks[f"{name}.slots"] = pack_counts(slots)
        return {
            "name": name,
            "place": place,
            "numSlots": memory.config.num_slots,
            "side": memory.config.num_sub_keys,
            "isFlat": memory.config.keys == "flat",
            "isExperts": memory.config.experts,
            "heads": memory.config.heads,
            "knn": memory.config.knn,
            "values": self._table(memory),
            "figures": [_figures(counts) for counts in of],  # of each head, then of all together
            **before,
            "numContexts": self._contexts(name, reads, slots),
            "numReads": self._reads(name, reads),
            "numOfTokens": self._slots_of_tokens(name, reads),
            **self._projections(name, memory, slots),
        }

    def _counts(self, name: str, reads: MemoryReads) -> None:
        """Reads, of which top-1, of each slot by each head, and the weight given to it by all."""
        self.blocks[f"{name}.reads"] = pack_counts(torch.stack([head.num_reads for head in reads.heads]))
        self.blocks[f"{name}.top1"] = pack_counts(torch.stack([head.num_top1 for head in reads.heads]))
        self.blocks[f"{name}.weight"] = pack_weights(reads.all_heads.weight_sum)

    def _read_most(self, counts: MemoryUsage) -> Tensor:
        """The slots (r,), ascending, of which the page says more than counts."""
        num_read = int((counts.num_reads > 0).sum())
        most = counts.num_reads.sort(descending=True, stable=True).indices[: min(num_read, _SLOTS // self.num)]
        return most.sort().values

    def _contexts(self, name: str, reads: MemoryReads, slots: Tensor) -> int:
        """The arrays of contexts; where there are fewer than others have, the position is that of the text's end."""
        most = _share(_CONTEXTS, len(slots) * self.num, MOST_CONTEXTS)
        weights = reads.context_weights[slots, :most]
        positions = reads.context_positions[slots, :most].where(weights > 0, len(self.tokens))
        self.blocks[f"{name}.contextAt"] = pack_counts(positions)
        self.blocks[f"{name}.contextWeights"] = pack_weights(weights)
        self.blocks[f"{name}.contextHeads"] = pack_counts(reads.context_heads[slots, :most].long() & 0xFFFFFFFF)
        return most

    def _reads(self, name: str, reads: MemoryReads) -> int:
        """The arrays of the reads of each token; where it has fewer than others, the slot is the number of slots."""
        num_tokens = min(len(self.tokens), _READS // self.num)
        most = _share(_READS, num_tokens * self.num, MOST_READS)
        slots = reads.read_slots[:num_tokens, :most].long()
        self.blocks[f"{name}.readSlots"] = pack_counts(slots.where(slots >= 0, len(reads.all_heads.num_reads)))
        self.blocks[f"{name}.readWeights"] = pack_weights(reads.read_weights[:num_tokens, :most])
        self.blocks[f"{name}.readHeads"] = pack_counts(reads.read_heads[:num_tokens, :most].long() & 0xFFFFFFFF)
        return most

    def _slots_of_tokens(self, name: str, reads: MemoryReads) -> int:
        most = _share(_OF_TOKENS, 2 * len(self.types) * self.num, _MOST_OF_TOKENS)
        for order in ("Weight", "Count"):
            found = reads.slots_of_tokens(self.types, most, by_count=order == "Count")
            slots = found.slots.where(found.slots >= 0, len(reads.all_heads.num_reads))
            self.blocks[f"{name}.by{order}Slots"] = pack_counts(slots)
            self.blocks[f"{name}.by{order}Weights"] = pack_weights(found.weights)
            self.blocks[f"{name}.by{order}Counts"] = pack_counts(found.counts)
        return most

    def _projections(self, name: str, memory: ProductKeyMemory, slots: Tensor) -> dict[str, Any]:
        reason = why_not_projected(memory, self.embedding)
        if reason or self.embedding is None:
            return {"notProjected": reason}
        most = _share(_PROJECTED, 2 * len(slots) * self.num, _MOST_PROJECTED)
        found = project_values(memory, slots, self.embedding, most, self.progress)
        self.of_tokens |= {f"{name}.tokensFor": found.tokens_for, f"{name}.tokensAgainst": found.tokens_against}
        for tokens in (found.tokens_for, found.tokens_against):
            self.is_used[tokens.flatten()] = True
        self.blocks[f"{name}.deviations"] = pack_weights(found.deviations)
        return {"notProjected": ""}

    def _table(self, memory: ProductKeyMemory) -> str:
        """The value table in words."""
        values: Any = memory.values
        packed = isinstance(values, QuantisedValues)
        stored = f"int{values.bits}" if packed else str(values.weight.dtype).removeprefix("torch.")
        sharing = [
            f"memory_{i}"
            for i, other in enumerate(memories_in(self.reading.model).values())
            if other is not memory and other.values is values
        ]
        text = f"{len(values.weight):,} x {memory.config.value_width:,} {stored}"
        return text + (f", shared with {', '.join(sharing)}" if sharing else "")


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, with the space before it that some tokenizers drop when they decode one token alone."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [
        f" {text}" if str(name).startswith("\u2581") and not text.startswith(" ") else text
        for name, text in zip(names, texts, strict=True)
    ]


def _share(budget: int, num: int, most: int) -> int:
    """How many entries each of `num` may have, in [1, most]."""
    return max(1, min(most, budget // max(1, num)))


def _figures(counts: MemoryUsage) -> dict[str, float | None]:
    """The summary of counts, None in place of what is not a number, and the reads."""
    figures = {name: figure if figure == figure else None for name, figure in counts.summary().items()}
    return {**figures, "reads": int(counts.num_reads.sum())}
