"""Every private name of Hugging Face, torch and numba that the source uses, and that each still does what it did.

There is no public name for what these do. A test here that fails after an update says what to write anew.
"""

import ast
import contextlib
import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import pkmem
from pkmem import MemoryConfig, add_memory
from pkmem.layer.memory import memories_in
from pkmem.lm.huggingface import PkmemForCausalLM

NAMES = {
    "_attn_implementation",  # of a config: how the decoder given attends
    "_clip_grad_norm",  # of Trainer: clips before a step
    "_experts_implementation",  # of a config: how its experts are run
    "_hf_hook",  # of a module: what accelerate does around its forward: tests/lm/test_offloading.py
    "_get_dtype_plan",  # of a model: what is loaded in fp32 though asked for in half precision
    "_is_hf_initialized",  # of a module: its weights are drawn already
    "_is_stateful",  # of a model: its cache cannot go back, so no assistant helps it
    "_keep_in_fp32_modules",  # of a model: what quantisers leave alone: tests/lm/test_quantisers.py
    "_keys_to_ignore_on_load_unexpected",  # of a model: what of a file is left there: tests/lm/test_mapping.py
    "_load_from_checkpoint",  # of Trainer: reads its part of a checkpoint
    "_load_optimizer_and_scheduler",  # of Trainer: reads its part of a checkpoint
    "_load_rng_state",  # of Trainer: reads its part of a checkpoint
    "_set_gradient_checkpointing",  # of a model: hands its blocks the function that checkpoints them
    "_save_checkpoint",  # of Trainer: writes a checkpoint
    "_wrap_model",  # of Trainer: makes the model one of several processes'
    "_exit",  # of os, not private: ends a process whose main thread hears nothing
    "_supports_default_dynamic_cache",  # of a model: whether generation makes it the usual cache
    "_supports_flash_attn",  # of a model: an attention it lets through to the decoder
    "_supports_flex_attn",  # as before
    "_supports_sdpa",  # as before
    "_tied_weights_keys",  # of a model: weights that repeat others
}
OF_TORCH_AND_NUMBA = {
    "_C",  # of torch: what has no public name yet
    "_apply",  # of a module: what .to() does to each tensor: tests/layer/test_huge_pages.py
    "_are_functorch_transforms_active",  # whether torch.func transforms
    "_len_torch_dispatch_stack",  # how many modes see every operator
    "_current_level",  # of torch.autograd.forward_ad: -1 outside forward mode
    "_has_any_global_hook",  # of torch.nn.modules.module
    "_modules",  # of a module: its parts by name
    "_parameters",  # of a module: its weights by name
    "_buffers",  # of a module: its statistics by name
    "_forward_hooks",  # of a module: tests/layer/test_decoding.py adds each kind of hook
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_replicate_for_data_parallel",  # of a module: makes a copy for nn.DataParallel
    "_save_to_state_dict",  # of a module: what a sharded table gives as a DTensor: tests/layer/test_sharding.py
    "_load_from_state_dict",
    "_get_active_ddp_module",  # of DistributedDataParallel: the one whose forward runs: tests/layer/test_sharding.py
    "_module_parameters",  # of DistributedDataParallel: what it exchanges
    "_current_graph_task_id",  # which backward pass runs; -1 outside all: tests of activation checkpointing
    "_dynamo_marked_constant",  # what torch.compiler.assume_constant_result sets
    # of tensors that are more than numbers, and of the operators they see: tests/ops/test_reading_log.py
    "_make_wrapper_subclass",
    "_disabled_torch_function_impl",
    "_schema",
    "_foreach_div_",
    "_foreach_mul_",
    "_foreach_norm",
    "_foreach_zero_",
    "_amp_foreach_non_finite_check_and_unscale_",
    # of numba, what its cache writes and reads: tests/ops/test_cache.py
    "_cache",
    "_rebuild",
    "_reduce",
}
MEMORY = MemoryConfig(num_sub_keys=4, heads=1, knn=2, query_dim=4)
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


def decoder(family: str = "gpt2", **options: object) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **SIZES, **SPECIAL)
    return AutoModelForCausalLM.from_config(config, **options)


def with_memories(**options: object) -> PkmemForCausalLM:
    return add_memory(decoder(), [0, 1], MEMORY, **options)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_the_list_is_complete() -> None:
    kinds = (Trainer, TrainingArguments, GenerationMixin, PreTrainedModel, PreTrainedConfig)
    theirs = {name for kind in kinds for name in dir(kind)}
    rooms = [Path(pkmem.__file__).parent / room for room in ("lm", "training")]
    said, own = set(), set()
    for node in (
        node for room in rooms for file in room.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ):
        match node:
            case ast.Attribute(ast.Name("self"), name):
                said.add(name)
                own.add(name)
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                said.add(name)
                own.add(name)
            case ast.Attribute(_, name) | ast.Call(ast.Name("getattr"), [_, ast.Constant(str(name)), *_]):
                said.add(name)
            case ast.Constant(str(name)) if name in theirs:  # one of several that a loop sets
                said.add(name)
    assert {name for name in (said - own) | (said & theirs) if is_private(name)} == set(NAMES)


def test_the_list_of_torch_and_numba_is_complete() -> None:
    rooms = [Path(pkmem.__file__).parent / room for room in ("ops", "layer")]
    said, own = set(), set()
    for node in (
        node for room in rooms for file in room.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ):
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                said.add(name)
                own.add(name)
            case ast.Attribute(ast.Name("self" | "cls" | "ctx"), name):
                said.add(name)
                own.add(name)
            case ast.Attribute(_, name) | ast.Subscript(_, ast.Constant(str(name))):
                said.add(name)
            case ast.ImportFrom(str(module), names) if module.startswith("torch"):
                said.update(name.name for name in names)
    theirs = {*dir(nn.Module), *vars(nn.Module())}
    assert {name for name in (said - own) | (said & theirs) if is_private(name)} == OF_TORCH_AND_NUMBA


def test_torch_says_what_watches_tensors() -> None:
    class Mode(TorchDispatchMode):
        pass

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._are_functorch_transforms_active())
        return x

    seen: list[bool] = []
    watched(torch.ones(2))
    torch.vmap(watched)(torch.ones(2))
    assert seen == [False, True]
    assert (torch._C._len_torch_dispatch_stack(), forward_ad._current_level) == (0, -1)
    with Mode(), forward_ad.dual_level():
        assert (torch._C._len_torch_dispatch_stack(), forward_ad._current_level) == (1, 0)


def test_a_compiler_takes_for_constant_what_is_marked() -> None:
    def marked() -> bool:
        return True

    assert torch.compiler.assume_constant_result(marked)._dynamo_marked_constant


def test_torch_replicates_modules_by() -> None:
    assert "._replicate_for_data_parallel()" in inspect.getsource(nn.parallel.replicate)


class Watched(Trainer):
    """Does nothing of what is watched, and keeps how it was asked."""

    def __init__(self, out: Path, num_steps: int) -> None:
        arguments = TrainingArguments(
            str(out), max_steps=num_steps, save_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True
        )
        self.asked: dict[str, object] = {}
        super().__init__(decoder(), arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 2)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        self.asked["_clip_grad_norm"] = None
        return torch.zeros(())

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.asked["_save_checkpoint"] = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.asked["_load_from_checkpoint"] = resume_from_checkpoint

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.asked["_load_optimizer_and_scheduler"] = checkpoint

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.asked["_load_rng_state"] = checkpoint


def test_the_trainer_saves_by_save_checkpoint_and_by_nothing_else(tmp_path: Path) -> None:
    trainer = Watched(tmp_path, 1)
    trainer.train()
    assert "_save_checkpoint" in trainer.asked
    assert not list(tmp_path.glob("checkpoint*"))


def test_the_trainer_clips_by_clip_grad_norm(tmp_path: Path) -> None:
    trainer = Watched(tmp_path, 1)
    trainer.train()
    assert "_clip_grad_norm" in trainer.asked


@pytest.mark.parametrize("name", ["_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"])
def test_the_trainer_resumes_by(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-1"  # without optimizer.pt, scheduler.pt and rng_state.pth
    trainer = Watched(tmp_path, 2)
    trainer.model.save_pretrained(checkpoint)
    trainer.state.global_step = trainer.state.train_batch_size = 1
    trainer.state.save_to_json(str(checkpoint / "trainer_state.json"))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.asked[name] == str(checkpoint)


def test_what_tied_weights_keys_names_is_stored_once(tmp_path: Path) -> None:
    model = with_memories(share_values=True)
    model.save_pretrained(tmp_path)
    assert sum("values" in name for name in load_file(tmp_path / "model.safetensors")) == 1
    model._tied_weights_keys = {}
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_set_gradient_checkpointing_hands_the_blocks_what_checkpoints_them(
    use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = with_memories(), []
    monkeypatch.setattr(
        model, "_set_gradient_checkpointing", lambda enable, gradient_checkpointing_func, **_: given.append(enable)
    )
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert given == [True]


def test_torchs_current_graph_task_id_is_minus_one_but_in_backward() -> None:
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda _: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    x.sum().backward()
    assert seen != [-1]
    assert torch._C._current_graph_task_id() == -1


@pytest.mark.parametrize("drawn", [True, False])
def test_weights_are_drawn_unless_is_hf_initialized(drawn: bool) -> None:
    model = with_memories()
    weights = [p for memory in memories_in(model).values() for p in memory.parameters()]
    before = [p.detach().clone() for p in weights]
    for module in (module for memory in memories_in(model).values() for module in memory.modules()):
        module._is_hf_initialized = drawn
    model.init_weights()
    assert all(map(torch.equal, weights, before)) == drawn


def test_attn_implementation_says_how_a_model_attends() -> None:
    for way in ("eager", "sdpa"):
        assert decoder(attn_implementation=way).config._attn_implementation == way
        assert add_memory(decoder(attn_implementation=way), [0], MEMORY).base.config._attn_implementation == way


def test_experts_implementation_says_how_experts_are_run() -> None:
    for way in ("eager", "batched_mm"):
        model = decoder("mixtral", experts_implementation=way)
        assert model.config._experts_implementation == way
        assert add_memory(model, [0], MEMORY, "parallel").base.config._experts_implementation == way


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("_supports_sdpa", "sdpa"),
        ("_supports_flex_attn", "flex_attention"),
        ("_supports_flash_attn", "flash_attention_2"),
    ],
)
def test_an_attention_is_refused_unless_supported(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_memory(decoder(attn_implementation="eager"), [0], MEMORY)
    monkeypatch.setattr(PkmemForCausalLM, name, False)
    with pytest.raises(ValueError, match="PkmemForCausalLM does not support"):
        model.set_attn_implementation(way)


@pytest.mark.parametrize("stateful", [False, True])
def test_a_stateful_decoder_takes_no_assistant(stateful: bool) -> None:
    base = decoder("llama")
    base._is_stateful = stateful
    model = add_memory(base, [0], MEMORY).eval()
    prompt = torch.tensor([[1, 2, 3]])
    refusal = pytest.raises(ValueError, match="not supported with stateful models")
    with refusal if stateful else contextlib.nullcontext():
        model.generate(prompt, prompt_lookup_num_tokens=2, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("takes", [False, True])
def test_supports_default_dynamic_cache_says_who_makes_the_cache(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_memories().eval()
    monkeypatch.setattr(type(model.base), "_supports_default_dynamic_cache", classmethod(lambda _: takes))
    seen = []
    model.base.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=0)
    assert (seen[0] is not None) == takes


def test_get_dtype_plan_says_what_is_loaded_in_fp32() -> None:
    model = with_memories()
    assert model._get_dtype_plan(torch.float16) == {}
    model._keep_in_fp32_modules.add("ln_f")
    assert model._get_dtype_plan(torch.float16) == {"ln_f": torch.float32}
    assert model._get_dtype_plan(torch.float32) == {}
