"""PEFT on a model with memories: adapters beside, on and in them, merged, saved and loaded."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pkmem import MemoryConfig, add_memory
from pkmem.layer.memory import memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.huggingface import PkmemForCausalLM

KIND = "Modules that others rewrite"
TOKENS = (1, 8, 9, 100)  # one kernel reads for up to 8, the parts for more
MEMORY = MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8, query_norm="layer")
ATTENTION = ["q_proj", "v_proj"]
TIED = "https://github.com/huggingface/peft/issues/2777"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),  # of a library PEFT looks for
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]


def build(memory: MemoryConfig = MEMORY, **options) -> PkmemForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **sizes, **special))
    return add_memory(decoder, [0, 2], memory, **options).eval()


def ids(tokens: int) -> Tensor:
    return torch.arange(tokens).remainder(64).unsqueeze(0)


@torch.no_grad()
def logits(model: torch.nn.Module) -> list[Tensor]:
    return [model(ids(tokens)).logits for tokens in TOKENS]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def train(model: torch.nn.Module) -> None:
    """A step that moves every trainable weight."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.train()
    model(ids(64), labels=ids(64)).loss.backward()
    assert all(weight.grad is not None for weight in weights)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight))
    model.eval()


@pytest.mark.case(KIND, "PEFT: LoRA on attention beside memories, merged, saved and loaded", "works", "")
@pytest.mark.case(
    KIND,
    "PEFT: LoRA on `all-linear`, which takes queries and gates of memories too, merged, saved and loaded",
    "works",
    "https://github.com/huggingface/peft/issues/2390",
)
@pytest.mark.case(KIND, 'PEFT: `modules_to_save=["memory"]` or `["values"]`, merged, saved and loaded', "works", "")
@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, {"target_modules": ATTENTION}),
        ({}, {"target_modules": "all-linear"}),
        ({"share_values": True}, {"target_modules": "all-linear"}),
        ({"placement": "parallel"}, {"target_modules": "all-linear"}),
        ({}, {"target_modules": ["query.project"]}),
        ({}, {"target_modules": ATTENTION, "modules_to_save": ["memory"]}),
        ({}, {"target_modules": ATTENTION, "modules_to_save": ["values"]}),
        ({}, {"target_modules": ATTENTION, "target_parameters": ["values.weight"]}),
    ],
    ids=["attention", "all-linear", "shared", "parallel", "query", "memory", "values", "parameter"],
)
def test_adapters_are_trained_merged_saved_and_loaded(options: dict, lora: dict, tmp_path: Path) -> None:
    untouched = build(**options)
    before = logits(untouched)
    model = get_peft_model(copy.deepcopy(untouched), LoraConfig(r=4, **lora)).eval()
    assert close(logits(model), before)
    train(model)
    trained = logits(model)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(trained, before, strict=True))  # at one token, too
    # A prefix's last token says the same alone as with what follows it.
    torch.testing.assert_close(trained[0][0, 0], trained[3][0, 0])
    torch.testing.assert_close(trained[1][0, 7], trained[3][0, 7])
    with model.disable_adapter():
        assert close(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    assert close(logits(PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter").eval()), trained)
    merged = model.merge_and_unload()
    assert isinstance(merged, PkmemForCausalLM)
    assert close(logits(merged), trained)
    assert len(tables_in(merged)) == (1 if options.get("share_values") else 2)
    merged.save_pretrained(tmp_path / "merged")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), trained)


@pytest.mark.case(
    KIND,
    "PEFT: an adapter trained beside memories with batch norm, which follow the statistics of their queries",
    'works: `modules_to_save=["query.norm"]` saves the statistics with the adapter; or take another query norm',
    "",
)
def test_batch_norms_statistics_are_saved_with_an_adapter(tmp_path: Path) -> None:
    untouched = build(dataclasses.replace(MEMORY, query_norm="batch"))
    before = logits(untouched)
    lora = LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["query.norm"])
    model = get_peft_model(copy.deepcopy(untouched), lora).eval()
    assert close(logits(model), before)
    train(model)
    trained = logits(model)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(trained, before, strict=True))
    torch.testing.assert_close(trained[0][0, 0], trained[3][0, 0])
    model.save_pretrained(tmp_path / "adapter")
    assert close(logits(PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter").eval()), trained)
    merged = model.merge_and_unload()
    assert close(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), trained)


@pytest.mark.case(
    KIND,
    "PEFT: `modules_to_save` or `target_parameters` on a table that memories share",
    "refused: ValueError at the first training step and when saved; let gradients reach the one table instead",
    TIED,
)
@pytest.mark.parametrize(
    "lora", [{"modules_to_save": ["memory"]}, {"modules_to_save": ["values"]}, {"target_parameters": ["values.weight"]}]
)
def test_adapters_that_take_a_shared_table_apart_are_refused(lora: dict, tmp_path: Path) -> None:
    untouched = build(share_values=True)
    model = get_peft_model(untouched, LoraConfig(r=4, target_modules=ATTENTION, **lora))
    model.train()
    with pytest.raises(ValueError, match=r"share_values is set but .*requires_grad_\(\)` after get_peft_model"):
        model(ids(9), labels=ids(9))
    merged = model.merge_and_unload()
    if "modules_to_save" in lora:
        with pytest.raises(ValueError, match="share_values is set but the memories hold 2 tables"):
            merged.save_pretrained(tmp_path)


@pytest.mark.case(
    KIND,
    "PEFT: a shared table trained in place beside LoRA, merged, saved and loaded",
    "works: `values.weight.requires_grad_()` after `get_peft_model`; saved with the merged model, not with the adapter",
    "",
)
def test_a_shared_table_trains_beside_an_adapter(tmp_path: Path) -> None:
    untouched = build(share_values=True)
    before = logits(untouched)
    model = get_peft_model(copy.deepcopy(untouched), LoraConfig(r=4, target_modules=ATTENTION)).eval()
    (table,) = tables_in(model)
    table.weight.requires_grad_()
    train(model)
    trained = logits(model)
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in zip(trained, before, strict=True))
    merged = model.merge_and_unload()
    assert tables_in(merged) == [table]
    assert close(logits(merged), trained)
    merged.save_pretrained(tmp_path)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert close(logits(loaded), trained)
    assert len({id(memory.values) for memory in memories_in(loaded).values()}) == 1
