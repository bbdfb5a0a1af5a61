"""The weights of a saved model as they lie in its directory: which file holds each, and whether the config says the same."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from pkmem.files.documents import load_json
from pkmem.files.tensor_file import Stored, TensorFile
from pkmem.layer.config import MemoryConfig
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import Table
from pkmem.ops.packing import BITS, row_bytes

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # all weights in one file, or an index of several
_TABLE = re.compile(r"\.memory\.(values|neurons)\.weight$")  # as `MemoryMLP` names them


def stored_tables(model: nn.Module) -> dict[str, Table | QuantisedValues]:
    """The tables by name, a shared one by its first."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Table | QuantisedValues)}


def file_of(name: str, folder: Path) -> Path:
    """The file of a saved model's directory that holds a weight.

    Raises:
        ValueError: there is none, it is of another directory, or a link leads to it.
    """
    file = WHOLE
    if not (folder / WHOLE).exists():
        if not (folder / INDEX).exists():
            raise ValueError(
                f"{folder} has neither {WHOLE} nor {INDEX}: tables are mapped from a saved model's directory"
            )
        file = load_json(_itself(folder / INDEX)).get("weight_map", {}).get(name)
        if not isinstance(file, str):
            raise ValueError(f"{folder / INDEX} names no file for {name}: save the model again")
        if PurePosixPath(file).name != file or "\\" in file or not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX}: {file[:100]!r} is no file of this directory; save the model again")
    return _itself(folder / file)


def require_as_configured(folder: Path, memory: MemoryConfig, value_bits: int | None) -> None:
    """Looks at the tables of a saved model before anything is read: numbers of another kind would be converted in silence.

    Args:
        folder: of the model; a table that it lacks is left to who loads it.
        memory, value_bits: of its config; the memory with its width.

    Raises:
        CheckpointError: a file is broken or cut.
        ValueError: a table's shape or dtype is another one.
    """
    is_packed = value_bits in BITS
    width = row_bytes(memory.value_width, value_bits) if value_bits in BITS else memory.value_width
    widths = {"values": (width, is_packed), "neurons": (memory.bound_dim, False)}
    for path in sorted(folder.glob("*.safetensors")):
        for name, stored in TensorFile(path).stored.items():
            found = _TABLE.search(name)
            if found:
                width, is_packed = widths[found[1]]
                _require(path, name, stored, (memory.num_slots, width), is_packed)


def _require(path: Path, name: str, stored: Stored, shape: tuple[int, int], is_packed: bool) -> None:
    fits = stored.dtype == torch.uint8 if is_packed else stored.dtype.is_floating_point
    if stored.shape != shape or not fits:
        raise ValueError(
            f"{path}: {name} is {stored.shape} {stored.dtype} but the config asks for {shape} "
            f"{'torch.uint8' if is_packed else 'of a floating dtype'}: save the model again"
        )


def _itself(path: Path) -> Path:
    """A file that may be a link within the Hugging Face cache, and no other one."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        return path.resolve()
    if path.is_symlink():
        raise ValueError(f"{path}: a link; put the file itself there")
    return path
