"""The edits of a saved model: put into its files and taken out again without loading it, whole or not at all.

Whether an edit is in is read off the tables' rows. The copies in the folder `edits` say whose rows those are.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.edit import Edit, State
from pkmem.editing.fingerprint import fingerprint_of, saved_tensors, table_names
from pkmem.files.documents import load_json
from pkmem.files.durable import replacing
from pkmem.files.tensor_file import Stored, TensorFile
from pkmem.layer.memory import memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.stored import INDEX, WHOLE
from pkmem.training.saved import is_checkpoint, locate_saved
from pkmem.training.screening import screen_model
from pkmem.training.tables_apart import TABLES, write_with_tables_apart

_EDITS = "edits"
_BLOCK_BYTES = 1 << 15  # smaller ones save room, larger ones time


class SavedModel:
    """A model directory, of whose weights nothing is read before it is needed.

    Args:
        path: the directory, or a run that has one.

    Attributes:
        folder: the directory.
        fingerprint: of the model, as `pkmem.editing.fingerprint` has it of the loaded one.
        tables: weights of the tables by name, mapped.
        seen: the identity of each weights file, before anything of it was read.

    Raises:
        ValueError: no model is there, it is not safe to load, it lacks weights, or it has no memories.
    """

    def __init__(self, path: Path) -> None:
        self.folder = locate_saved(path)
        if is_checkpoint(self.folder):
            raise _no_directory(self.folder, path)
        model = screen_model(self.folder)
        self._file_of = _files_of_weights(self.folder, path)
        self.seen = {name: _identity(self.folder / name) for name in set(self._file_of.values())}
        files = {name: TensorFile(self.folder / name) for name in self.seen}
        tables = table_names(model)
        if not tables:
            if memories_in(model):
                raise ValueError(f"the values of {path} are quantised: use the model as it was before `pkmem convert`")
            raise ValueError(f"{path} has no memories: put some in with `pkmem retrofit {path} --out DIR`")
        tensors = {}
        for name in saved_tensors(model):
            file = self._file_of.get(name)
            if file is None or name not in files[file].stored:
                raise ValueError(f"{self.folder} lacks the weight {name!r}: save the model again")
            tensors[name] = files[file][name]
        self.fingerprint = fingerprint_of(tensors, model)
        self.tables: dict[str, Tensor] = {name: tensors[name] for name in tables}

    def reopen(self) -> None:
        """Maps the tables anew, after a file of them was replaced."""
        self.tables = {name: TensorFile(self.folder / self._file_of[name])[name] for name in self.tables}

    def is_zero(self) -> bool:
        """Whether all values are zero, as `pkmem retrofit` leaves them."""
        return not any(part.any() for table in self.tables.values() for part in table.split(1 << 16))

    def copies(self) -> list[Edit]:
        """The edits in the folder `edits`, by name, whether they are in or not.

        Raises:
            ValueError: one is broken.
        """
        return [Edit.load(file) for file in sorted((self.folder / _EDITS).glob("*.safetensors"))]

    def edits_in(self) -> list[Edit]:
        """The edits of which all rows have the new values, by name.

        Raises:
            ValueError: a copy in the folder `edits` is broken.
        """
        return [edit for edit in self.copies() if self.holds(edit)]

    def holds(self, edit: Edit) -> bool:
        """Whether an edit is in."""
        return edit.fingerprint == self.fingerprint and edit.state_in(self.tables) == "in"

    def copy_of(self, edit: Edit) -> Path:
        """The file of the folder `edits` that an edit has while it is in."""
        return self.folder / _EDITS / f"{edit.name}.safetensors"

    def files_of(self, names: Iterable[str]) -> list[Path]:
        """The weights files that hold these tables."""
        return sorted({self.folder / self._file_of[name] for name in names})


def apply_edits(path: Path, edits: Sequence[Edit]) -> SavedModel:
    """Puts edits into a saved model: all of them or, whatever happens meanwhile, none.

    Args:
        path: as in `SavedModel`.
        edits: none of which is in, all with rows of their own.

    Returns:
        the model, with the edits in.

    Raises:
        ValueError: an edit is of another model, is in already, or has rows that another edit owns or something else has
            changed; or the tables cannot be replaced at once. Nothing has changed.
        OSError: the disk is full or cannot be written. Nothing has changed.
    """
    model = SavedModel(path)
    inside = model.edits_in()
    for place, edit in enumerate(edits):
        _require(model, edit, "out", inside)
        for other in (*inside, *edits[:place]):
            if edit.overlaps(other):
                _refuse_overlap(edit, other)
    weights = _one_file(model, edits)
    (model.folder / _EDITS).mkdir(exist_ok=True)
    try:
        for edit in edits:
            edit.save(model.copy_of(edit))
        _patch(weights, model.seen[weights.name], [(edit.rows, edit.new) for edit in edits])
    finally:
        _keep_copies_of_what_is_in(model, edits)
    return model


def forget_edit(path: Path, name: str) -> tuple[SavedModel, Edit]:
    """Takes an edit out of a saved model: its rows are as they were before, bit for bit.

    Args:
        path: as in `SavedModel`.
        name: of an edit that is in, or a file with it.

    Returns:
        the model, without the edit; and the edit.

    Raises:
        ValueError: there is no such edit, it is of another model or not in, or rows of it have been changed since.
            Nothing has changed.
        OSError: the disk is full or cannot be written. Nothing has changed.
    """
    model = SavedModel(path)
    inside = model.edits_in()
    edit = next((edit for edit in inside if edit.name == name), None)
    if edit is None:
        if not Path(name).is_file():
            known = f"its edits are {', '.join(edit.name for edit in inside)}" if inside else "no edit is in"
            raise ValueError(f"{name} is neither a file nor an edit in {path}: {known}")
        edit = Edit.load(Path(name))
    _require(model, edit, "in", inside)
    weights = _one_file(model, [edit])
    try:
        _patch(weights, model.seen[weights.name], [(edit.rows, edit.old)])
    finally:
        _keep_copies_of_what_is_in(model, [edit])
    return model, edit


def save_with_tables_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Saves a model with its tables in a file of their own, so that an edit replaces that file alone.

    Zeros, of which tables consist before the first edit, take no room on disks that know holes in files.

    Args:
        model: with memories, whole on this process; `from_pretrained` loads it as what `save_pretrained` writes.
        tokenizer: its tokenizer.
        out: a new or empty directory.

    Raises:
        ValueError: the model has no memories, or `out` is not empty.
        OSError: the disk is full or cannot be written.
    """
    if not tables_in(model):
        raise ValueError("the model has no memories: put some in with pkmem.add_memory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists: choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_with_tables_apart(out, model, tokenizer)
    _patch(out / TABLES, _identity(out / TABLES), [])  # zeros become holes


def _files_of_weights(folder: Path, path: Path) -> dict[str, str]:
    """Weight -> name of the file that `from_pretrained` takes it from."""
    if (folder / WHOLE).exists():
        return dict.fromkeys(TensorFile(folder / WHOLE).stored, WHOLE)
    if not (folder / INDEX).exists():
        raise _no_directory(folder, path)
    weight_map = load_json(folder / INDEX).get("weight_map", {})
    return {str(name): str(file) for name, file in weight_map.items()}


def _no_directory(folder: Path, path: Path) -> ValueError:
    return ValueError(
        f"{folder} has neither {WHOLE} nor an index: edits go into a model directory; "
        f"`pkmem export {path}` makes one of a run's newest checkpoint"
    )


def _require(model: SavedModel, edit: Edit, wanted: State, inside: Sequence[Edit]) -> None:
    edit.require_model(model.fingerprint)
    owners = [other.name for other in inside if other.name != edit.name and other.overlaps(edit)]
    edit.require_state(edit.state_in(model.tables), wanted, ", ".join(owners))


def _refuse_overlap(edit: Edit, other: Edit) -> None:
    if edit.name == other.name:
        raise ValueError(f"the edit {edit.name} is given twice: name it once")
    raise ValueError(
        f"rows of the edit {edit.name} belong to {other.name}, so each could not be taken out alone: "
        f"use one of the two, or teach the facts of the other anew with `pkmem learn`"
    )


def _one_file(model: SavedModel, edits: Sequence[Edit]) -> Path:
    """The one file that these edits change."""
    files = model.files_of(name for edit in edits for name in edit.rows)
    if len(files) != 1:
        raise ValueError(
            f"the tables are in {len(files)} files, which cannot be replaced at once: save the model in one, "
            "`model.save_pretrained(DIR, max_shard_size='1TB')`"
        )
    if files[0].is_symlink():
        raise ValueError(f"{files[0]}: a link into the Hugging Face cache; copy the directory and edit the copy")
    return files[0]


def _identity(file: Path) -> tuple[int, ...]:
    """Changes when the file is written or replaced."""
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _patch(
    weights: Path, seen: tuple[int, ...], changes: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]
) -> None:
    """Replaces a weights file by one with other rows.

    Args:
        weights: the file.
        seen: its identity when it was read.
        changes: rows and values by table.
    """
    with weights.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written into it stays in memory
        parts = list(_written(file, len(mapped)))
    stored = TensorFile(weights).stored
    for rows, values in changes:
        for name, numbers in rows.items():
            parts += _change(mapped, stored[name], numbers, values[name])
    for left in weights.parent.glob(f"{weights.name}.????????.tmp"):  # by one that was killed
        left.unlink(missing_ok=True)
    with replacing(weights) as new:
        shutil.copymode(weights, new.name)
        _write(new, mapped, parts)
        if _identity(weights) != seen:
            raise ValueError(f"{weights} was changed by another program meanwhile: try again")


def _change(mapped: mmap.mmap, table: Stored, rows: Tensor, values: Tensor) -> list[tuple[int, int]]:
    """Writes rows of a table into a mapped file; returns where their bytes begin and end."""
    held = torch.frombuffer(mapped, dtype=table.dtype, count=math.prod(table.shape), offset=table.start)
    held.view(table.shape).index_copy_(0, rows, values)
    row_bytes = values[0].nbytes
    return [(start, start + row_bytes) for start in (table.start + rows * row_bytes).tolist()]


def _write(target: BinaryIO, mapped: mmap.mmap, parts: Iterable[tuple[int, int]]) -> None:
    """Writes parts of a mapped file into a new one in blocks; blocks of zeros become holes, as all else does.

    Holes take no room and no time where the disk knows them. Many small ones would take more time than they save, above
    all when the file is removed.
    """
    touched = {block for start, stop in parts for block in range(start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES))}
    zeros = bytes(_BLOCK_BYTES)
    for block in sorted(touched):
        start = block * _BLOCK_BYTES
        if (data := mapped[start : start + _BLOCK_BYTES]) != zeros[: len(data)]:
            target.seek(start)
            target.write(data)
    target.truncate(len(mapped))


def _written(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes, as far as the system tells."""
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    stop = 0
    while stop < size:
        try:
            start = os.lseek(file.fileno(), stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # holes alone from here on
                return
            start, stop = stop, size
        else:
            stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield start, stop


def _keep_copies_of_what_is_in(model: SavedModel, edits: Sequence[Edit]) -> None:
    """Removes the copies of those of the edits that are not in, and their folder where it is empty."""
    model.reopen()
    for edit in edits:
        if not model.holds(edit):
            model.copy_of(edit).unlink(missing_ok=True)
    folder = model.folder / _EDITS
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
