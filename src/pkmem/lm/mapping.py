"""Tables that stay in the file they were saved in: mapped, so that opening costs nothing and each row is read when needed.

Processes that map the same file share its pages. Nothing is written to it: what is written into a mapped table stays in the
process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from torch import nn

from pkmem.files.tensor_file import TensorFile
from pkmem.lm.stored import file_of, stored_tables
from pkmem.ops.mapped_rows import MappedRows

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
        for table in stored_tables(model).values():
            table.weight = None  # type: ignore[assignment]
    return _come_later.get()


def map_tables(model: nn.Module, folder: Path) -> None:
    """Gives a model that was loaded inside `tables_come_later()` its tables, mapped from where they are saved.

    Args:
        model: as `save_pretrained` saved it into the folder.
        folder: with safetensors, whose tables are as the config says.

    Raises:
        ValueError: a table is missing, a link leads to its file, or the index names a file of another folder.
    """
    files: dict[Path, TensorFile] = {}
    for name, table in stored_tables(model).items():
        path = file_of(f"{name}.weight", folder)
        if path not in files:
            files[path] = TensorFile(path)
        file = files[path]
        if f"{name}.weight" not in file.stored:
            raise ValueError(f"{path} lacks the table {name}.weight: save the model again")
        table.weight = nn.Parameter(file[f"{name}.weight"], requires_grad=False)
        table.mapped = MappedRows(table.weight.detach(), file)
    for file in files.values():
        file.read_at_random()


def require_another_folder(model: nn.Module, folder: Path) -> None:
    """Refuses to save a model over the files that its tables are mapped from, which would be lost.

    Raises:
        ValueError: they are in that folder.
    """
    for name, table in stored_tables(model).items():
        if table.mapped is None or not folder.exists():
            continue
        path = table.mapped.file.path
        if folder.resolve() in (path.parent.resolve(), path.resolve().parent):
            raise ValueError(f"{name} is mapped from {path}, which would be overwritten: save the model elsewhere")
