"""A tiny decoder with memories, its tokenizer, and facts to teach it, shared by the tests of editing.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import dataclasses
import functools

import torch
from transformers import PreTrainedTokenizerBase

from decoders import MEMORY, MODEL
from pkmem import MemoryConfig, add_memory
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
