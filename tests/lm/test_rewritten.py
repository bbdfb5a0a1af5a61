"""A language model with memories that other libraries rewrite says what it said, for one token and for many."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pkmem import MemoryConfig, add_memory
from pkmem.lm.huggingface import PkmemForCausalLM

KIND = "Modules that others rewrite"


def build(family: str, **options) -> PkmemForCausalLM:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, bos_token_id=0, eos_token_id=0))
    memory = MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8)
    return add_memory(decoder, [0, 1], memory, **options).eval()


def ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, 64, (batch, tokens))


@pytest.mark.case(
    KIND,
    "accelerate: a language model under `cpu_offload` or `disk_offload`, also with a shared table, generates",
    "works",
    "https://github.com/huggingface/transformers/pull/48409",
)
@pytest.mark.parametrize("share_values", [True, False])
@pytest.mark.parametrize("kept_on", ["memory", "disk"])
@torch.no_grad()
def test_an_offloaded_model_says_the_same(kept_on: str, share_values: bool, tmp_path: Path) -> None:
    model, prompt = build("llama", share_values=share_values), ids(1, 3)
    inputs = [ids(1, tokens) for tokens in (1, 8, 9, 100)]
    expected = [model(tokens).logits for tokens in inputs]
    said = model.generate(prompt, max_new_tokens=8, do_sample=False)
    if kept_on == "memory":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    for tokens, logits in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(tokens).logits, logits)
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).equal(said)


class _Logits(nn.Module):
    def __init__(self, model: PkmemForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.case(KIND, "`torch.export` of a language model with dynamic batch and length", "works", "")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_an_exported_model_reads_any_batch(family: str) -> None:
    model = build(family)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}
    exported = torch.export.export(_Logits(model), (ids(2, 7),), dynamic_shapes=(sizes,), strict=False).module()
    for batch, length in ((1, 1), (1, 8), (1, 9), (3, 100)):
        tokens = ids(batch, length)
        torch.testing.assert_close(exported(tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)
