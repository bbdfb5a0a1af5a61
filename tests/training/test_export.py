"""Export: what `save_pretrained` would write, from the shards of any number of processes, a little at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pkmem.files.documents import CheckpointError
from pkmem.lm.build import build_model
from pkmem.training import export
from pkmem.training.checkpoint import save_checkpoint
from pkmem.training.export import export_checkpoint, export_run, save_description
from pkmem.training.named_state import model_tensors
from pkmem.training.shards import Part, Shard, plan_shard
from pkmem.training.together import Together
from tiny import MEMORY, MODEL

pytest_plugins = "tiny"


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def in_columns(model: nn.Module, num_processes: int) -> list[Shard]:
    """The shards of processes that hold the columns of every table, and of the rest the first one all."""
    named = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    whole = plan_shard(named, Together())
    shards: list[Shard] = [Shard(f"shard-{i}.safetensors", {}, whole.tensors) for i in range(num_processes)]
    for name, (_, tensor) in whole.parts.items():
        if "values" in name:
            for shard, part in zip(shards, tensor.chunk(num_processes, 1), strict=True):
                at = sum(len(s.parts[name].tensor[0]) for s in shards if name in s.parts)
                shard.parts[name] = Part((0, at), part)
        else:
            shards[0].parts[name] = Part((0,) * tensor.dim(), tensor)
    return shards


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000])
@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("changes", [{"memory_layers": [0, 1], "share_values": True}, {"family": "llama"}])
def test_an_export_is_what_save_pretrained_writes(
    changes: dict, num_processes: int, max_file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_CHUNK_BYTES", 1000)
    model = build_model(MODEL.__class__(**(vars(MODEL) | changes)), MEMORY, 300, 0)
    first, *others = in_columns(model, num_processes)

    def write(folder: Path) -> None:
        save_description(folder, model, NoTokenizer())
        for shard in others:
            shard.write(folder)

    checkpoint = save_checkpoint(tmp_path, 1, write, first)
    export_checkpoint(checkpoint, tmp_path / "ours", max_file_bytes=max_file_bytes)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_file_bytes)
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names | {"tokenizer.json"}
    assert len([name for name in names if name.endswith(".safetensors")]) > (max_file_bytes < 10**9)
    for name in names:
        ours, theirs = ((tmp_path / folder / name).read_bytes() for folder in ("ours", "theirs"))
        if name == "model.safetensors.index.json":
            ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours == theirs, name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_an_export_is_whole_or_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = run / "checkpoints" / "step-9", tmp_path / "deep" / "out"

    def failing(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_weights", failing)
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(checkpoint, out)
        assert list(out.parent.iterdir()) == []
    export_checkpoint(checkpoint, out)
    (out / "mine").touch()
    with pytest.raises(ValueError, match="already exists: choose another --out, or --overwrite it"):
        export_checkpoint(checkpoint, out)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_write_weights", failing)
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(checkpoint, out, overwrite=True)
    assert (out / "mine").exists()
    export_checkpoint(checkpoint, out, overwrite=True)
    assert not (out / "mine").exists()
    assert list(out.parent.iterdir()) == [out]
    empty = tmp_path / "empty"
    empty.mkdir()
    export_checkpoint(checkpoint, empty)
    assert (empty / "model.safetensors").exists()


def test_a_run_exports_its_newest_valid_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert export_run(copy) == copy / "model-step-10"
    (copy / "checkpoints" / "step-10" / "journal.json").write_text("{}")
    assert export_run(copy) == copy / "model-step-9"
    assert "skipped step-10" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"step-10/journal\.json"):
        export_run(copy, step=10)
    assert export_run(copy, tmp_path / "out", 9) == tmp_path / "out"


@pytest.mark.linux
def test_a_table_is_never_whole_in_memory(tmp_path: Path) -> None:
    """A table of 256 MB passes through one of 32 MB."""
    table = torch.empty(1 << 20, 64)
    tensors = {"model.table": {"dtype": "F32", "shape": list(table.shape)}}
    left, right = (
        Shard(f"shard-{i}.safetensors", {"model.table": Part((0, 32 * i), table[:, 32 * i : 32 * i + 32])}, tensors)
        for i in range(2)
    )
    checkpoint = save_checkpoint(tmp_path, 1, right.write, left)
    del table, left, right
    before = anonymous_bytes()
    peak = [before]
    rows = export.Shards.rows

    def watched(*arguments: object) -> object:
        for chunk in rows(*arguments):
            peak.append(anonymous_bytes())
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.Shards, "rows", watched)
        export_checkpoint(checkpoint, tmp_path / "out")
    assert len(peak) > 8
    assert max(peak) - before < 100 << 20


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
