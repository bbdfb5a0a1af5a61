"""Training that starts from a pretrained model, and training that moves a part of it alone."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pkmem import MemoryConfig, add_memory
from pkmem.layer.memory import memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.training.checkpoint import open_shards
from pkmem.training.export import export_run
from pkmem.training.parallel import shared_columns
from pkmem.training.recipe import Recipe
from pkmem.training.run import train
from pkmem.training.saved import load_saved
from pkmem.training.start import compute_again_in_backward, freeze
from pkmem.training.trainer import build_optimizer
from tiny import MEMORY, MODEL, TRAINING

pytest_plugins = "tiny"


@pytest.fixture(scope="module")
def retrofitted(plain_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain GPT-2 in bf16 with a memory beside its MLP, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("retrofitted")
    decoder = AutoModelForCausalLM.from_pretrained(plain_gpt2, dtype=torch.bfloat16)
    memory = MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8, query_norm="batch", gate=True)
    add_memory(decoder, [0], memory, "parallel").bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain_gpt2).save_pretrained(folder)
    return folder


def going_on(data: Path, out: Path, pretrained: Path, **training: Any) -> Recipe:
    model = ModelConfig(pretrained=str(pretrained), context_tokens=32)
    return Recipe(str(data), out, None, model, training=dataclasses.replace(TRAINING, num_tokens=640, **training))


def changed(before: Path, after: Path) -> set[str]:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in old.items()} == {n: (x.shape, x.dtype) for n, x in new.items()}
    return {name for name in old if not torch.equal(old[name], new[name])}


def part_of(name: str) -> str:
    if ".memory." not in name:
        return "decoder"
    return "values" if "values.weight" in name else "reading"


@pytest.mark.parametrize(
    ("what", "moves"),
    [("values", {"values"}), ("memory", {"values", "reading"}), ("all", {"values", "reading", "decoder"})],
)
def test_what_moves_is_what_was_asked_for(
    text: Path, tmp_path: Path, retrofitted: Path, what: Any, moves: set[str]
) -> None:
    recipe = going_on(text, tmp_path / "out", retrofitted, train=what, lr=3e-2, checkpoint_every_steps=5)
    summary = train(recipe, progress=False)
    moved = changed(retrofitted, tmp_path / "out" / "model")
    assert {part_of(name) for name in moved} == moves
    shards = open_shards(tmp_path / "out" / "checkpoints" / "step-5")
    with_state = {part_of(name.removeprefix("optimizer.")) for name in shards.shapes if name.startswith("optimizer.")}
    assert with_state == moves
    export_run(tmp_path / "out", tmp_path / "exported")
    assert changed(tmp_path / "out" / "model", tmp_path / "exported") == set()
    model, tokenizer = load_saved(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(retrofitted).get_vocab()
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


@pytest.mark.parametrize("what", ["values", "memory"])
def test_what_is_frozen_costs_no_gradient_and_no_state(what: Any) -> None:
    model = build_model(dataclasses.replace(MODEL, memory_layers=[0, 1]), MEMORY, 300, 0)
    freeze(model, what)
    memories = list(memories_in(model).values())
    wanted = {table.weight for table in tables_in(model)}
    if what == "memory":
        wanted = {p for memory in memories for p in memory.parameters()}
    optimizer = build_optimizer(model, dataclasses.replace(TRAINING, train=what))
    ids = torch.randint(300, (2, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {p for p in model.parameters() if p.requires_grad} == wanted
    assert {p for p in model.parameters() if p.grad is not None} == wanted
    optimizer.step()
    moments = {p: state for p, state in optimizer.state.items() if state}
    assert set(moments) == wanted
    count = sum(x.numel() for state in moments.values() for x in state.values() if x.numel() > 1)
    assert count == 2 * sum(p.numel() for p in wanted)


@pytest.mark.parametrize("what", ["values", "memory"])
def test_a_resumed_run_is_the_same_bit_for_bit_without_what_it_came_from(
    text: Path, tmp_path: Path, retrofitted: Path, what: Any
) -> None:
    source = shutil.copytree(retrofitted, tmp_path / "source")
    straight = going_on(text, tmp_path / "straight", source, train=what)
    train(straight, progress=False)
    resumed = shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    for later in ("checkpoints/step-5", "model"):
        shutil.rmtree(resumed / later)
    shutil.rmtree(source)
    train(dataclasses.replace(straight, out=resumed), resume=True, progress=False)
    assert changed(tmp_path / "straight" / "model", resumed / "model") == set()


def test_a_model_without_memories_is_trained_whole(text: Path, tmp_path: Path, plain_gpt2: Path) -> None:
    train(going_on(text, tmp_path / "out", plain_gpt2), progress=False)
    assert "transformer.wte.weight" in changed(plain_gpt2, tmp_path / "out" / "model")
    again = going_on(text, tmp_path / "again", tmp_path / "out")  # a run is a pretrained model, too
    assert train(again, progress=False)["memory_params"] == 0


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ({"family": "llama"}, "leave it out"),
        ({"num_layers": 3}, "leave it out"),
        ({"width": 8}, "leave it out"),
        ({"vocab_size": 300}, "leave it out"),
        ({"dropout": 0.5}, "leave it out"),
        ({"memory_layers": [0]}, "`pkmem retrofit`"),
        ({"placement": "parallel"}, "`pkmem retrofit`"),
        ({"share_values": True}, "`pkmem retrofit`"),
    ],
)
def test_fields_of_a_fresh_decoder_are_refused(option: dict[str, Any], fix: str) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"^model\.{name} describes a fresh decoder .*{re.escape(fix)}"):
        ModelConfig(pretrained="x", **option)


def test_a_memory_or_tokenizer_beside_a_pretrained_model_is_refused() -> None:
    model = ModelConfig(pretrained="x")
    for name, other in {"memory": MEMORY, "tokenizer": "y"}.items():
        with pytest.raises(ValueError, match=rf"^{name} cannot stand beside model\.pretrained: leave it out"):
            Recipe(model=model, **{name: other})


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(
    text: Path, tmp_path: Path, plain_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    recipe = going_on(text, out, plain_gpt2, train="values")
    with pytest.raises(ValueError, match="has no memory: put some in with `pkmem retrofit`"):
        train(recipe, progress=False)
    longer = dataclasses.replace(recipe, model=ModelConfig(pretrained=str(plain_gpt2), context_tokens=64))
    with pytest.raises(ValueError, match=r"model.context_tokens is 64 but must be in \[2, 32\], the model's"):
        train(longer, progress=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no model nobody/nothing: give a saved model's directory, or a name"):
        train(going_on(text, out, Path("nobody/nothing")), progress=False)
    with pytest.raises(ValueError, match=r"training.train is 'values' but model.memory_layers is empty: name a layer"):
        Recipe(training=dataclasses.replace(recipe.training, train="values", batch_tokens=512))
    assert not out.exists()


def test_a_run_does_not_replace_what_it_comes_from(text: Path, tmp_path: Path, plain_gpt2: Path) -> None:
    run = tmp_path / "run"
    train(going_on(text, run, plain_gpt2), progress=False)
    with pytest.raises(ValueError, match=r"holds model.pretrained, .*: choose another --out"):
        train(going_on(text, run, run / "model"), overwrite=True, progress=False)
    assert (run / "model" / "config.json").exists()


def test_frozen_queries_keep_their_statistics(text: Path, tmp_path: Path, retrofitted: Path) -> None:
    train(going_on(text, tmp_path / "out", retrofitted, train="values"), progress=False)
    assert not [name for name in changed(retrofitted, tmp_path / "out" / "model") if "running" in name]


@pytest.mark.parametrize("what", ["values", "memory", "all"])
def test_gradient_checkpointing_changes_no_bit(text: Path, tmp_path: Path, retrofitted: Path, what: Any) -> None:
    for on in (False, True):
        recipe = going_on(text, tmp_path / str(on), retrofitted, train=what, gradient_checkpointing=on)
        train(dataclasses.replace(recipe), progress=False)
    assert changed(tmp_path / "False" / "model", tmp_path / "True" / "model") == set()


def test_gradients_go_no_further_down_than_what_is_trained() -> None:
    model = build_model(dataclasses.replace(MODEL, memory_layers=[1]), MEMORY, 300, 0).train()
    freeze(model, "values")
    compute_again_in_backward(model)
    seen: list[bool] = []
    for block in model.base.transformer.h:
        block.register_forward_hook(lambda module, args, out: seen.append(args[0].requires_grad))
    ids = torch.randint(300, (2, 32))
    model(input_ids=ids, labels=ids).loss.backward()
    assert not any(seen[:2])
    assert all(table.weight.grad is not None for table in tables_in(model))


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (Recipe(model=ModelConfig(pretrained="x")), "model.pretrained"),
        (Recipe(model=MODEL, training=dataclasses.replace(TRAINING, train="values")), "training.train=values"),
    ],
)
def test_several_processes_are_refused_before_anything_is_done(recipe: Recipe, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(what)} is for one process and there are 2: start it without"):
        shared_columns(recipe, 2, 2)
    assert shared_columns(recipe, 1, 1) == 1
