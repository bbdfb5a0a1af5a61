"""A tiny decoder with memories, its tokenizer, and facts to teach it, shared by the tests of editing.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import dataclasses
import functools

import torch
from transformers import PreTrainedTokenizerBase

from decoders import MEMORY, MODEL
from pkmem import Edit, MemoryConfig, add_memory
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.reads import tables_of
from pkmem.lm.build import build_model
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.text import train_tokenizer
from pkmem.text.facts import Fact

NAMES = ["Alda Kirosa", "Boris Venudo", "Celia Tamari", "Dario Lopenu", "Edna Sibako", "Felix Moruta"]
HOMES = ["Rome", "Oslo", "Lima", "Bern", "Cairo", "Quito"]
FACTS = [Fact((f"Home of {name}", f"They live with {name}"), home) for name, home in zip(NAMES, HOMES, strict=True)]
OF_LESSONS = dataclasses.replace(MEMORY, num_sub_keys=24, heads=4, query_norm="layer")
VOCAB = 400  # so that each name and each home is a token
_TEXT = [" ".join([*fact.prompts, fact.completion]) for fact in FACTS]


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(_TEXT, VOCAB)


def pupil(family: str = "llama", memory: MemoryConfig = OF_LESSONS, **options: object) -> PkmemForCausalLM:
    """A tiny decoder with memories of zeros beside its MLPs, in eval mode; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = build_model(dataclasses.replace(MODEL, family=family, context_tokens=64), memory, VOCAB, 0)
        model = add_memory(decoder, [0, 1, 2], memory, placement="parallel", values="zero", **options)
    return model.eval()


def edit_of(model, first, num=3, seed=0):
    """An edit of rows from `first` on, in every table."""
    draw = torch.Generator().manual_seed(seed + first)
    tables = {name: table.weight.detach() for name, table in tables_of(model).items()}
    rows = {name: torch.arange(first, first + num) for name in tables}
    old = {name: weight[rows[name]].clone() for name, weight in tables.items()}
    new = {name: torch.randn(values.shape, generator=draw).to(values.dtype) for name, values in old.items()}
    return Edit(rows, old, new, FACTS[:2], {"recall": 1.0, "seconds": 2}, fingerprint(model))


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_as(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
