"""conversion.py: a saved model with its value tables in few bits; everything else bit for bit."""

import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pkmem.files.tensor_file import TensorFile
from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.lm.build import build_model
from pkmem.ops.packing import pack_rows, row_bytes
from pkmem.training.conversion import convert_saved
from pkmem.training.saved import load_saved
from tiny import MEMORY, MODEL

pytest_plugins = "tiny"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("values", ["int8", "int4", "bf16", "same"])
def test_tables_are_stored_so_and_all_else_is_as_it_was(values: str, run: Path, tmp_path: Path) -> None:
    store: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "int8": lambda table: pack_rows(table, 8),
        "int4": lambda table: pack_rows(table, 4),
        "bf16": torch.Tensor.bfloat16,
        "same": lambda table: table,
    }
    out = tmp_path / "few" / "bits"
    said = convert_saved(run, out, values)
    before, after = weights_in(run / "model"), weights_in(out)
    assert before.keys() == after.keys()
    tables = [name for name in before if name.endswith("values.weight")]
    assert tables
    for name, tensor in before.items():
        assert torch.equal(after[name], store[values](tensor) if name in tables else tensor), name
    sizes = [sum(file[name].nbytes for name in tables) / 1e6 for file in (before, after)]
    form = "as they were" if values == "same" else f"in {values}"
    assert f"{form}: {sizes[0]:,.1f} MB became {sizes[1]:,.1f} MB" in said
    assert f"saved in {out}; next: pkmem eval {out}" in said
    model, tokenizer = load_saved(out)
    assert any(isinstance(part, QuantisedValues) for part in model.modules()) == values.startswith("int")
    assert {memory.values.weight.dtype for memory in memories_in(model).values()} == {after[tables[0]].dtype}
    stored = TensorFile(out / "model-tables.safetensors").stored
    assert stored.keys() == set(tables)
    assert min(table.start for table in stored.values()) % mmap.PAGESIZE == 0
    mapped = load_saved(out, values="mmap")[0]
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(mapped(tokens).logits, model(tokens).logits)
    assert len(tokenizer) == len(load_saved(run)[1])
    assert not list(out.parent.glob("*.tmp"))


def test_what_cannot_be_converted_is_named_and_nothing_is_made(run: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    convert_saved(run, few, "int8")
    dense = tmp_path / "dense"
    build_model(replace(MODEL, memory_layers=[]), MEMORY, 300, eos_token_id=0).save_pretrained(dense)
    load_saved(run)[1].save_pretrained(dense)
    for path, out, why in (
        (few, tmp_path / "fewer", "stored in 8 bits already"),
        (dense, tmp_path / "other", "has no memories: there are no value tables to convert"),
        (run, few, "already exists: choose another --out"),
        (tmp_path / "nowhere", tmp_path / "other", "not a directory"),
    ):
        there = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=why):
            convert_saved(path, out, "int8")
        assert sorted(tmp_path.iterdir()) == there
    tables = [tensor for name, tensor in weights_in(few).items() if name.endswith("values.weight")]
    assert [table.shape[1] for table in tables] == [row_bytes(MODEL.width, 8)]


def test_a_folder_that_is_empty_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    convert_saved(run, tmp_path / "few", "int8")
    assert (tmp_path / "few" / "config.json").exists()


def test_a_disk_that_is_full_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pkmem.training.conversion.sync", full)
    with pytest.raises(OSError, match="No space left"):
        convert_saved(run, tmp_path / "few", "int8")
    assert list(tmp_path.iterdir()) == []
