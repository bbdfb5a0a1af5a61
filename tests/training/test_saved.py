"""Saved models: a run, a checkpoint or any model directory is found; what is broken or unsafe is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from pkmem.layer.memory import memories_in
from pkmem.lm.huggingface import context_tokens
from pkmem.training.checkpoint import CheckpointError
from pkmem.training.saved import find_saved, load_saved
from runs import tensors_of

pytest_plugins = "tiny"


def test_a_run_gives_its_model_else_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    assert find_saved(run) == run / "model"
    checkpoint = run / "checkpoints" / "step-9"
    assert find_saved(checkpoint) == checkpoint
    interrupted = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(interrupted / "model")
    assert find_saved(interrupted) == interrupted / "checkpoints" / "step-10"


def test_what_is_loaded_is_what_was_saved_in_eval_mode(run: Path, plain_gpt2: Path) -> None:
    for path, num_memories in ((run, 1), (run / "checkpoints" / "step-9", 1), (plain_gpt2, 0)):
        model, tokenizer = load_saved(path)
        assert not model.training
        assert len(memories_in(model)) == num_memories
        assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
        folder, state = find_saved(path), model.state_dict()
        if folder.name == "step-9":
            tensors = tensors_of(folder)
            saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        else:
            saved = load_file(folder / "model.safetensors")
        assert len(saved) > 10
        assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())


def test_a_model_in_the_cache_of_the_hub_is_loaded_through_its_links(plain_gpt2: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(plain_gpt2.iterdir())):
        shutil.copyfile(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number}"))
    model, _ = load_saved(snapshot)
    assert all(map(torch.equal, model.parameters(), load_saved(plain_gpt2)[0].parameters()))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(plain_gpt2 / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: a link; put the file itself there"):
        load_saved(snapshot)


def test_paths_without_a_model_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "absent", "absent is not a directory: give a run"),
        (run / "config.yaml", "is not a directory: give a run"),
        (tmp_path / "empty", r"holds no model \(no config.json\): give a run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_saved(path)


def test_pickles_are_refused_unread(plain_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain_gpt2, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"has no safetensors: a pickle can run any code.*convert it to safetensors"
    ):
        load_saved(folder)
    torch.save({}, folder / "model.safetensors")  # disguised: the loader reads no pickle, whatever its name
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no safetensors file"):
        load_saved(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_refused(run: Path, plain_gpt2: Path, tmp_path: Path, name: str) -> None:
    for i, saved in enumerate((run / "model", plain_gpt2, run / "checkpoints" / "step-10")):
        if i == 2 and name == "model.safetensors":
            name = "shard-00001-of-00001.safetensors"
        folder = shutil.copytree(saved, tmp_path / str(i))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=r"another checkpoint|resume from an earlier checkpoint") as caught:
            load_saved(folder)
        assert "\n" not in str(caught.value)


def test_a_changed_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run / "checkpoints" / "step-9", tmp_path / "step-9")
    shard = checkpoint / "shard-00001-of-00001.safetensors"
    with safe_open(shard, framework="pt") as file:
        notes = file.metadata()
    tensors = load_file(shard)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, shard, metadata=notes)
    with pytest.raises(CheckpointError, match=r"shard-\S+: (its content changed|\d+ bytes instead of)"):
        load_saved(checkpoint)


def test_missing_weights_are_not_made_up(run: Path, plain_gpt2: Path, tmp_path: Path) -> None:
    for i, saved in enumerate((run / "model", plain_gpt2)):
        folder = shutil.copytree(saved, tmp_path / str(i))
        tensors = load_file(folder / "model.safetensors")
        lost = next(name for name in tensors if name.endswith("ln_f.weight"))
        del tensors[lost]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"cannot load the model.*ln_f\.weight.*save it again"):
            load_saved(folder)


def test_tensors_that_are_not_what_the_config_says_are_named(run: Path, plain_gpt2: Path, tmp_path: Path) -> None:
    for i, saved in enumerate((run / "model", plain_gpt2)):
        folder = shutil.copytree(saved, tmp_path / str(i))
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            for other in (tensor[None], tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)):
                save_file(tensors | {name: other.contiguous()}, file, metadata={"format": "pt"})
                with pytest.raises(CheckpointError, match=rf"{file}: {name} is .* but the config asks for \("):
                    find_saved(folder)


def test_context_is_that_of_the_config() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=48, n_embd=4, n_layer=1, n_head=1))
    assert context_tokens(model) == 48
    model.config = type("Config", (), {"get_text_config": lambda self: self})()  # as for ALiBi models
    assert context_tokens(model) == 1024
