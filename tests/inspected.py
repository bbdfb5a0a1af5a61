"""What the tests of the page share: a model that has read ragged texts, a page read back, and every read by brute force.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import base64
import json
import zlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import oracle
from html_reader import Reader
from pkmem.inspecting.content import Reading, content_of
from pkmem.inspecting.page import write_page
from pkmem.inspecting.reads import watching_reads
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.lm.build import build_model
from pkmem.lm.inspection import one_after_another, read_texts
from pkmem.text import train_tokenizer
from tiny import MEMORY, MODEL

VOCABULARY = 300
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'\"`${document.title='owned'}",
    "<!-- <script>",
    "\x00 \u202e \ud800 \U0001f600 \u2028",
    "{{script}} {{data}}",
)


def tokenizer_of(text: str = "a b c") -> PreTrainedTokenizerBase:
    return train_tokenizer([text], VOCABULARY)


def build(memory: Any = (), **model: Any) -> PreTrainedModel:
    return build_model(
        replace(MODEL, **model), replace(MEMORY, **dict(memory)), vocab_size=VOCABULARY, eos_token_id=0
    ).eval()


def ragged(*lengths: int) -> list[Tensor]:
    """Texts of a few tokens of the vocabulary, so that they come again."""
    return [torch.randint(40, 60, (length,)) for length in lengths]


def read(model: PreTrainedModel, texts: list[Tensor], name: str = "a model") -> Reading:
    with watching_reads(model, one_after_another(texts)) as reads:
        read_texts(model, texts)
    return Reading(name, model, reads)


def page_of(
    out: Path,
    model: PreTrainedModel,
    texts: list[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    compared: PreTrainedModel | None = None,
    name: str = "a model",
    data: str = "some text",
) -> Path:
    other = compared and read(compared, texts, "another model")
    write_page(out, content_of(read(model, texts, name), tokenizer or tokenizer_of(), data, texts, other))
    return out


class Page:
    """A page as a browser reads it: its facts, its arrays, and the tags and texts it is made of."""

    def __init__(self, file: Path) -> None:
        self.source = file.read_text(encoding="utf-8")
        self.html = Reader(self.source)
        scripts = self.source.split("<script ")[1:]
        texts = {part.split('id="')[1].split('"')[0]: part.split(">", 1)[1].split("</script>")[0] for part in scripts}
        self.facts = json.loads(texts.pop("facts"))
        self._texts = texts

    def __getitem__(self, name: str) -> Any:
        """An array by its name."""
        dtype, shape = self.facts["blocks"][name]
        content = zlib.decompress(base64.b64decode(self._texts[name]))
        if dtype == "json":
            return json.loads(content)
        kind = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        planes = np.frombuffer(content, np.uint8).reshape(kind.itemsize, -1)
        numbers = np.ascontiguousarray(planes.T).view(kind).reshape(shape)
        if dtype == "bfloat16":
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers


@dataclass
class BruteForce:
    """Every read of a memory, by its queries and all of its keys.

    Args:
        weights: of each head at each position and slot, fp64.
        best: the best slot of each head at each position.
    """

    weights: dict[tuple[int, int, int], float] = field(default_factory=dict)
    best: list[tuple[int, int]] = field(default_factory=list)

    def of_pairs(self) -> dict[tuple[int, int], dict[int, float]]:
        """(position, slot) -> the weight of each head that reads it there."""
        pairs: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
        for (head, position, slot), weight in self.weights.items():
            pairs[position, slot][head] = weight
        return pairs

    def num_reads(self, num_slots: int, head: int) -> list[int]:
        slots = [slot for (reader, _, slot) in self.weights if reader == head]
        return np.bincount(slots, minlength=num_slots).tolist() if slots else [0] * num_slots


def by_brute_force(model: PreTrainedModel, memory: ProductKeyMemory, texts: list[Tensor]) -> BruteForce:
    """Reads each text alone, without padding."""
    queries: list[Tensor] = []
    hook = memory.query.register_forward_hook(lambda _, __, output: queries.append(output))
    with torch.no_grad():
        for text in texts:
            if len(text):
                model(input_ids=text[None], use_cache=False)
    hook.remove()
    made, position = BruteForce(), 0
    for query in queries:
        if memory.config.keys == "flat":
            scores = np.einsum("nhq,hmq->nhm", oracle.fp64(query), oracle.fp64(memory.keys.keys))
            scores, slots = oracle.best_first(scores, memory.config.knn)
        else:
            scores, slots = oracle.product_key_topk(query, memory.keys.sub_keys, memory.config.knn)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        for n, head, k in np.ndindex(*slots.shape):
            made.weights[head, position + n, int(slots[n, head, k])] = float(weights[n, head, k])
            if k == 0:
                made.best.append((head, int(slots[n, head, k])))
        position += len(slots)
    return made


def only_memory(model: PreTrainedModel) -> ProductKeyMemory:
    (memory,) = memories_in(model).values()
    return memory
