"""Tables that stay in the file they were saved in: mapped, so that opening costs nothing and each row is read when needed.

Processes that map the same file share its pages. Nothing is written to it: what is written into a mapped table stays in the
process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path, PurePosixPath

import torch
from torch import nn

from pkmem.files.documents import load_json
from pkmem.files.tensor_file import TensorFile
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import Table
from pkmem.ops.read_ahead import ReadAhead, can_read_ahead

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_come_later: ContextVar[bool] = ContextVar("come_later", default=False)


@contextlib.contextmanager
def tables_come_later() -> Iterator[None]:
    """Inside the block models are loaded without their tables, for `map_tables`."""
    token = _come_later.set(True)
    try:
        yield
    finally:
        _come_later.reset(token)


def leave_out_tables_that_come_later(model: nn.Module) -> bool:
    """Takes the tables' weights out of a model inside `tables_come_later()`: nothing is read for them, or made.

    Returns:
        whether this is inside.
    """
    if _come_later.get():
        for table in _tables_of(model).values():
            table.awaited = tuple(table.weight.shape)  # type: ignore[assignment]
            table.weight = None  # type: ignore[assignment]
    return _come_later.get()


def map_tables(model: nn.Module, folder: Path) -> None:
    """Gives a model that was loaded inside `tables_come_later()` its tables, mapped from where they are saved.

    Args:
        model: as `save_pretrained` saved it into the folder.
        folder: with safetensors.

    Raises:
        ValueError: a table is missing, of another shape or dtype than the config says, in a file that is broken or that
            a link leads to, or the index names a file of another folder.
    """
    files: dict[Path, TensorFile] = {}
    for name, table in _tables_of(model).items():
        path = _file_of(f"{name}.weight", folder)
        stored = files.setdefault(path, TensorFile(path)).stored.get(f"{name}.weight")
        if stored is None:
            raise ValueError(f"{path} lacks the table {name}.weight: save the model again")
        wanted, is_packed = table.__dict__.pop("awaited"), isinstance(table, QuantisedValues)
        if (
            stored.shape != wanted
            or stored.dtype.is_floating_point is is_packed
            or (is_packed and stored.dtype != torch.uint8)
        ):
            raise ValueError(
                f"{path}: {name}.weight is {stored.shape} {stored.dtype} but the config asks for {wanted} "
                f"{'torch.uint8' if is_packed else 'of a floating dtype'}: save the model again"
            )
        table.mapped_from = path  # type: ignore[assignment]
        table.weight = nn.Parameter(files[path][f"{name}.weight"], requires_grad=False)
        if can_read_ahead():
            table.ahead = ReadAhead(table.weight.detach())
    for file in files.values():
        file.read_at_random()


def require_another_folder(model: nn.Module, folder: Path) -> None:
    """Refuses to save a model over the files that its tables are mapped from, which would be lost.

    Raises:
        ValueError: they are in that folder.
    """
    for name, table in _tables_of(model).items():
        path = table.__dict__.get("mapped_from")
        if path is not None and folder.exists() and folder.resolve() in (path.parent.resolve(), path.resolve().parent):
            raise ValueError(f"{name} is mapped from {path}, which would be overwritten: save the model elsewhere")


def _tables_of(model: nn.Module) -> dict[str, Table | QuantisedValues]:
    """The tables by name, a shared one by its first."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Table | QuantisedValues)}


def _file_of(name: str, folder: Path) -> Path:
    """The file of a folder that holds a weight."""
    file = _WHOLE
    if not (folder / _WHOLE).exists():
        if not (folder / _INDEX).exists():
            raise ValueError(
                f"{folder} has neither {_WHOLE} nor {_INDEX}: tables are mapped from a saved model's directory"
            )
        file = load_json(_itself(folder / _INDEX)).get("weight_map", {}).get(name)
        if not isinstance(file, str):
            raise ValueError(f"{folder / _INDEX} names no file for {name}: save the model again")
        if PurePosixPath(file).name != file or "\\" in file or not (folder / file).is_file():
            raise ValueError(f"{folder / _INDEX}: {file[:100]!r} is no file of this directory; save the model again")
    return _itself(folder / file)


def _itself(path: Path) -> Path:
    """A file that may be a link within the Hugging Face cache, and no other one."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        return path.resolve()
    if path.is_symlink():
        raise ValueError(f"{path}: a link; put the file itself there")
    return path
