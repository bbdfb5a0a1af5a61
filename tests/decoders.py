"""Tiny decoders of Hugging Face with memories, shared by the tests of what people do with one."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pkmem import MemoryConfig, add_memory
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.lm.huggingface import PkmemForCausalLM

with_todays_transformers = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="an older Trainer or generate does this otherwise"
)
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt_neox")
NORMS = ("batch", "layer", "rms", "none")
MEMORY = MemoryConfig(num_sub_keys=6, heads=2, knn=3, query_dim=8)
MODEL = ModelConfig(num_layers=3, width=32, num_heads=4, context_tokens=32)
VOCAB = 64


def decoder(family: str = "gpt2", **options) -> PreTrainedModel:
    """A tiny decoder without memories, in eval mode."""
    return build_model(dataclasses.replace(MODEL, family=family, **options), MEMORY, VOCAB, eos_token_id=0).eval()


def with_memories(family: str = "gpt2", norm: str = "batch", **options) -> PkmemForCausalLM:
    """The same with memories in its first and last block, and batch norms that have seen something."""
    memory = dataclasses.replace(MEMORY, query_norm=norm)
    model = add_memory(decoder(family), [0, 2], memory, **options).train()
    model(ids(4, 9))
    return model.eval()


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length))


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)
