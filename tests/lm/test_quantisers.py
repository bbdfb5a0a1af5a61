"""Loaders that quantise: what they make of a model with memories. The libraries behind most of them are not installed
here; what they share, the list of modules that transformers tells them to leave alone, is."""

import importlib
import inspect
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitNetQuantConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from decoders import MEMORY, decoder, ids, with_memories
from pkmem import add_memory
from pkmem.layer.memory import memories_in

KIND = "Hugging Face protocol"
ISSUE = "https://github.com/huggingface/transformers/issues/24037"


def linears(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.case(
    KIND,
    "Load quantised, by what transformers tells loaders such as torchao's, bitsandbytes' and quanto's to leave alone",
    "works: queries, keys, norms and values are on that list, attention and MLPs are not; the libraries themselves are no "
    "part of the tests (torchao and bitsandbytes, both in 8 bits, were run by hand)",
    ISSUE,
)
@pytest.mark.parametrize("skipped", [None, ["lm_head"], []])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_no_part_of_a_memory_is_converted_whatever_the_user_skips(family, skipped) -> None:
    model = with_memories(family, placement="parallel")
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    converted = {name for name, _ in model.named_parameters() if should_convert_module(name, kept)}
    assert not {name for name in converted if ".memory." in name}
    assert not {name for name in linears(model) if ".memory." in name and should_convert_module(name, kept)}
    assert {name for name in converted if ".mlp.mlp." in name}  # the MLP beside it is


def test_nearly_every_loader_asks_the_model_what_to_leave() -> None:
    asks = []
    for kind in AUTO_QUANTIZER_MAPPING.values():
        module = importlib.import_module(kind.__module__)
        asks.append("model._keep_in_fp32_modules" in inspect.getsource(module))
    assert sum(asks) >= 12


@pytest.mark.case(
    KIND,
    "Load quantised to ternary weights (BitNetQuantConfig), which needs no library",
    "works: as by other loaders",
    "",
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch's own compiler
def test_a_real_loader_leaves_memories_alone(tmp_path) -> None:
    model = with_memories("llama", placement="parallel")
    model.save_pretrained(tmp_path)
    config = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config.to_dict()}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    kinds = {name: type(loaded.get_submodule(name)) for name in linears(model)}
    assert {kinds[name] for name in kinds if ".memory." in name} == {nn.Linear}
    assert nn.Linear not in {kinds[name] for name in kinds if ".mlp.mlp." in name or ".self_attn." in name}
    state = loaded.state_dict()
    for name, weight in model.state_dict().items():
        if ".memory." in name:
            assert torch.equal(state[name], weight), name


@pytest.mark.case(
    KIND, "Load in fp16, where transformers keeps some modules in fp32", "works: memories are fp16, too", ""
)
def test_a_memory_is_loaded_in_half_precision_as_the_rest(tmp_path) -> None:
    with_memories("llama").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float16}
    assert loaded(ids()).logits.isfinite().all()


class Int8Linear(nn.Module):
    """Stands for a library's: int8 weights, a scale, and the dtype of its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.mark.case(
    KIND,
    "`add_memory` on a decoder that is quantised already",
    "works: memories take the dtype that is computed in",
    "",
)
@pytest.mark.parametrize("placement", ["replace", "parallel"])
def test_memories_in_a_quantised_decoder_are_of_a_dtype_that_trains(placement) -> None:
    model = decoder("llama").to(torch.bfloat16)
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, Int8Linear(getattr(block.mlp, name)))
    made = add_memory(model, [0, 2], MEMORY, placement).train()
    for memory in memories_in(made).values():
        assert {weight.dtype for weight in memory.parameters()} == {torch.bfloat16}
    x = ids()
    made(x, labels=x).loss.backward()
    assert all(memory.values.weight.grad.any() for memory in memories_in(made).values())
