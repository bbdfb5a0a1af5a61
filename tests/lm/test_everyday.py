"""What people do to a model and its training every day and reported of others, with its right value."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
)
from transformers.optimization import AdafactorSchedule
from transformers.utils import logging

from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam, add_memory
from pkmem.layer.memory import memories_in
from pkmem.layer.optim import dense_parameters
from pkmem.lm.huggingface import PkmemForCausalLM

case = pytest.mark.case
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MEMORY = MemoryConfig(num_sub_keys=4, heads=2, knn=2, query_dim=4, query_norm="rms")


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars() -> None:
    logging.disable_progress_bar()


def with_memories(family: str = "llama", **options) -> PkmemForCausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, bos_token_id=0, eos_token_id=0)
    return add_memory(AutoModelForCausalLM.from_config(config), [0, 1], MEMORY, **options).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(1))


def union_for(model: nn.Module) -> CombinedOptimizer:
    return CombinedOptimizer(torch.optim.AdamW(dense_parameters(model), lr=0.01), RowAdam(model, lr=0.1))


def assert_same_weights(first: nn.Module, second: nn.Module, **exactness: float) -> None:
    torch.testing.assert_close(dict(first.named_parameters()), dict(second.named_parameters()), **exactness)


# --- reading and changing a running model ---------------------------------------------------------------------


@case(
    "Modules that others rewrite",
    "activation patching: a forward hook replaces what a part returns, while the model decodes single tokens",
    "works: the few-token kernel makes way for hooks",
    "https://github.com/pytorch/pytorch/issues/128413",
)
@pytest.mark.parametrize("part", ["", ".values"])
@pytest.mark.parametrize("length", [1, 12])
@torch.no_grad()
def test_a_patched_memory_output_is_that_of_a_table_of_zeros(part, length) -> None:
    model = with_memories()
    tokens, (name, memory) = ids(1, length), next(iter(memories_in(model).items()))
    before = model(tokens).logits
    handle = model.get_submodule(name + part).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    patched = model(tokens).logits
    handle.remove()
    assert torch.equal(model(tokens).logits, before)
    memory.values.weight.zero_()
    torch.testing.assert_close(patched, model(tokens).logits)
    assert not torch.allclose(patched, before)


@case(
    "Modules that others rewrite",
    "hooks that read the inner activations of a layer with a fused fast path (TransformerLens, nnsight)",
    "works: slots and weights of every token, at any number of tokens",
    "https://github.com/state-spaces/mamba/issues/59",
)
@torch.no_grad()
def test_hooks_read_the_same_slots_token_by_token_as_at_once() -> None:
    model = with_memories()
    tokens, read = ids(1, 12), []
    memory = next(iter(memories_in(model).values()))
    memory.keys.register_forward_hook(lambda _, __, out: read.append(out))
    model(tokens)
    cache = None
    for token in tokens.unbind(1):
        cache = model(token.unsqueeze(1), past_key_values=cache, use_cache=True).past_key_values
    (slots, weights), *alone = read
    assert len(alone) == 12
    assert torch.equal(torch.cat([slots for slots, _ in alone]), slots)
    torch.testing.assert_close(torch.cat([weights for _, weights in alone]), weights)


@case(
    "Padding and recomputation",
    "padding-free packing: several texts in one row, told apart by `position_ids` (trl, DataCollatorWithFlattening)",
    "works: each text's logits are those it has alone",
    "https://github.com/huggingface/trl/issues/3692",
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_packed_texts_are_read_as_texts_alone(family) -> None:
    model = with_memories(family)
    texts = [ids(5).tolist(), ids(9).tolist()[5:], ids(3).tolist()]
    batch = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
    alone = [model(torch.tensor([text])).logits[0] for text in texts]
    torch.testing.assert_close(packed, torch.cat(alone))


# --- loading and saving ---------------------------------------------------------------------------------------


@case(
    "Hugging Face protocol",
    "`from_pretrained` of a subclass whose `_init_weights` writes in place, in transformers 5",
    "works: the loaded memories are not drawn anew",
    "https://github.com/huggingface/transformers/issues/46620",
)
def test_loaded_memories_are_not_drawn_anew(tmp_path: Path) -> None:
    class Mine(PkmemForCausalLM):
        def _init_weights(self, module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data.normal_()

    model = with_memories()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), Mine.from_pretrained(tmp_path)):
        weights = [weight for memory in memories_in(loaded).values() for weight in memory.parameters()]
        assert len(weights) == 10
        assert all((weight == 0.5).all() for weight in weights)


@case(
    "Hugging Face protocol",
    "`save_pretrained` of a model under `torch.compile`",
    "works: no name begins with `_orig_mod.`, and the model loads as any other",
    "https://github.com/pytorch/pytorch/issues/101107",
)
def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = with_memories()
    torch.compile(model, backend="aot_eager").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids(2, 7)).logits, model(ids(2, 7)).logits)


@case(
    "Hugging Face protocol",
    "`AutoModel` or `AutoModelForSequenceClassification` on a saved model (embedders, reward models)",
    "refused: ValueError of transformers, since these are causal language models: load with `AutoModelForCausalLM` and "
    "read `output_hidden_states=True`",
    "https://github.com/OpenRLHF/OpenRLHF/issues/767",
)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_auto_classes_refuse_the_config(auto, tmp_path: Path) -> None:
    model = with_memories()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*PkmemConfig"):
        auto.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    last = loaded(ids(2, 7), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(loaded.get_output_embeddings()(last), model(ids(2, 7)).logits)


@case(
    "Optimizer protocol",
    "optimizer states by parameter name: `torch.distributed.checkpoint.state_dict.get_state_dict`",
    "works: for RowAdam and for a CombinedOptimizer",
    "https://github.com/nvidia-cosmos/cosmos-rl/pull/150",
)
def test_states_by_parameter_name_resume_training() -> None:
    def step(memory: ProductKeyMemory, optimizer: CombinedOptimizer) -> None:
        optimizer.zero_grad()
        memory(torch.linspace(-1, 1, 80).view(20, 4)).square().sum().backward()
        optimizer.step()

    config = MemoryConfig(dim=4, num_sub_keys=4, heads=2, knn=2, query_dim=4, query_norm="rms")
    memory, other = ProductKeyMemory(config), ProductKeyMemory(config)
    optimizer, fresh = union_for(memory), union_for(other)
    step(memory, optimizer)
    weights, states = get_state_dict(memory, optimizer)
    assert set(states["state"]["values.weight"]) >= {"step", "exp_avg", "exp_avg_sq"}
    weights, states = copy.deepcopy((weights, states))
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=states)
    step(memory, optimizer)
    step(other, fresh)
    assert_same_weights(memory, other, rtol=0, atol=0)


# --- accelerate and other optimizers --------------------------------------------------------------------------


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, **request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


@case(
    "Optimizer protocol",
    "accelerate's `accumulate`: the script calls `optimizer.step()` for every micro-batch",
    "works: rows and dense weights move as by one batch; `extract_model_from_parallel` gives the model back",
    "https://github.com/huggingface/diffusers/issues/10855",
)
@pytest.mark.parametrize("accelerator", [{"gradient_accumulation_steps": 2}], indirect=True)
def test_accelerates_micro_batches_are_one_batch(accelerator: Accelerator) -> None:
    model = with_memories().double()  # Adam makes much of tiny differences where a gradient is near zero
    whole, tokens = copy.deepcopy(model), ids(4, 7)
    prepared, optimizer = accelerator.prepare(model, union_for(model))
    for micro_batch in tokens.unsqueeze(1):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(micro_batch, labels=micro_batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    optimizer = union_for(whole)
    for batch in tokens.split(2):
        whole(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert extract_model_from_parallel(prepared) is model
    assert_same_weights(model, whole, rtol=1e-8, atol=1e-8)


@case(
    "Optimizer protocol",
    "accelerate's `save_state` and `load_state` in bf16, with rows and dense weights in one optimizer",
    "works: training resumes to the same bits",
    "https://github.com/huggingface/accelerate/issues/285",
)
@pytest.mark.parametrize("accelerator", [{"mixed_precision": "bf16"}], indirect=True)
def test_accelerates_checkpoint_resumes_bitwise(accelerator: Accelerator, tmp_path: Path) -> None:
    model = with_memories(share_values=True)
    model, optimizer = accelerator.prepare(model, union_for(model))

    def step(tokens: Tensor) -> None:
        accelerator.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    step(ids(2, 7))
    accelerator.save_state(str(tmp_path))
    step(ids(2, 9))
    reached = copy.deepcopy(model.state_dict())
    accelerator.load_state(str(tmp_path))
    step(ids(2, 9))
    torch.testing.assert_close(model.state_dict(), reached, rtol=0, atol=0)


@case(
    "Optimizer protocol",
    "transformers' Adafactor with a step size of its own (`lr=None`) beside RowAdam",
    "works: give `AdafactorSchedule` the Adafactor, not the CombinedOptimizer",
    "https://github.com/huggingface/transformers/issues/11612",
)
def test_adafactor_steps_in_a_union_as_alone() -> None:
    model = with_memories()
    other = copy.deepcopy(model)

    def parts(model: nn.Module) -> tuple[Adafactor, RowAdam]:
        return Adafactor(dense_parameters(model), relative_step=True, warmup_init=True, lr=None), RowAdam(model)

    adafactor, rows = parts(model)
    union, apart = CombinedOptimizer(adafactor, rows), parts(other)
    schedule = AdafactorSchedule(adafactor)
    for _ in range(2):
        for trained, optimizers in ((model, [union]), (other, apart)):
            trained(ids(2, 7), labels=ids(2, 7)).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    assert_same_weights(model, other, rtol=0, atol=0)
