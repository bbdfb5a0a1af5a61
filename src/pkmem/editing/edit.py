"""A few rows of a model's tables, before and after: put in, taken out again to the last bit, shipped as a small file."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from pkmem.editing.fingerprint import fingerprint, saved_tensors, table_names
from pkmem.editing.rounding import from_bytes, to_bytes
from pkmem.files.documents import LARGEST_DOCUMENT, CheckpointError, parse_json
from pkmem.files.durable import replacing
from pkmem.files.tensor_file import TensorFile, write_tensor_file
from pkmem.text.facts import Fact

State = Literal["in", "out", "changed"]
_VERSION = "1"  # of the file's form
_PARTS = ("rows", "old", "new")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """What was learned: rows of tables, before and after. It owns them: another edit has other rows.

    Rows that are the same before and after are left out.

    Args:
        rows: the weight's name in the model, a shared one's first -> (n,) int64, increasing.
        old: the same names -> (n, v) before, in the table's dtype.
        new: the same names -> (n, v) after, finite.
        facts: that were taught.
        figures: what is known of it, numbers and text by name.
        fingerprint: of the model it belongs to, see `pkmem.editing.fingerprint`.

    Raises:
        ValueError: shapes or dtypes do not go together, rows are not increasing, values are not finite, or nothing
            changes.
    """

    rows: dict[str, Tensor]
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    facts: list[Fact]
    figures: dict[str, Any]
    fingerprint: str

    def __post_init__(self) -> None:
        if not self.rows.keys() == self.old.keys() == self.new.keys():
            raise ValueError("rows, old and new must have the same tables")
        made: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name in sorted(self.rows):
            rows, old, new = (getattr(self, part)[name].detach().cpu() for part in _PARTS)
            _require_rows(name, rows, old, new)
            changes = (_bits(old) != _bits(new)).any(1)
            if changes.any():
                for part, tensor in zip(_PARTS, (rows, old, new), strict=True):
                    made[part][name] = tensor[changes]
        if not made["rows"]:
            raise ValueError("the edit changes no row: there is nothing to put in")
        for part in _PARTS:
            object.__setattr__(self, part, made[part])

    @functools.cached_property
    def name(self) -> str:
        """12 hex digits of a hash over tables, rows and new values."""
        digest = hashlib.sha256()
        for name, rows in self.rows.items():
            digest.update(f"{name}\n".encode())
            digest.update(_bytes(rows))
            digest.update(_bytes(self.new[name]))
        return digest.hexdigest()[:12]

    @property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        return sum(map(len, self.rows.values()))

    def apply(self, model: nn.Module) -> None:
        """Puts the edit into a model, in place.

        Raises:
            ValueError: it is another model, the edit is in already, or rows of it have been changed; the model is as
                it was.
        """
        tables = self._tables(model)
        self.require_state(self.state_in(tables), "out")
        self.write(tables, self.new)

    def undo(self, model: nn.Module) -> None:
        """Takes the edit out of a model, in place: its rows are as they were before, bit for bit.

        Raises:
            ValueError: it is another model, the edit is not in, or rows of it have been changed since; the model is
                as it was.
        """
        tables = self._tables(model)
        self.require_state(self.state_in(tables), "in")
        self.write(tables, self.old)

    def is_in(self, model: nn.Module) -> bool:
        """Whether a model is the edit's own and all rows have the new values, bit for bit."""
        return fingerprint(model) == self.fingerprint and self.state_in(self._tables(model)) == "in"

    def state_in(self, tables: Mapping[str, Tensor]) -> State:
        """Whether its rows in a model's tables are all new ("in"), all old ("out"), or neither ("changed").

        Args:
            tables: weights by name, which may be mapped from a file.

        Raises:
            ValueError: the edit has a table, rows or a dtype that the model has not.
        """
        for name, rows in self.rows.items():
            table, new = tables.get(name), self.new[name]
            if table is None:
                raise ValueError(f"the edit changes {name!r}, which is no table of this model")
            if table.dtype != new.dtype or table.shape[1:] != new.shape[1:] or rows[-1] >= len(table):
                raise ValueError(
                    f"the edit has rows up to {rows[-1]:,} of width {new.shape[1]}, {new.dtype}, but {name!r} is "
                    f"{tuple(table.shape)}, {table.dtype}"
                )
        now = {name: _bits(tables[name][rows.to(tables[name].device)].cpu()) for name, rows in self.rows.items()}
        if all(torch.equal(now[name], _bits(self.new[name])) for name in now):
            return "in"
        return "out" if all(torch.equal(now[name], _bits(self.old[name])) for name in now) else "changed"

    def require_model(self, other: str) -> None:
        """Refuses a model with another fingerprint.

        Raises:
            ValueError: it has.
        """
        if other != self.fingerprint:
            raise ValueError(
                f"the edit {self.name} belongs to model {self.fingerprint}, this is model {other}: use it on its own "
                "model, or teach this one the same facts with `pkmem learn`"
            )

    def require_state(self, state: State, wanted: State, owners: str = "") -> None:
        """Refuses an edit whose rows are not in the state wanted, "out" to put it in or "in" to take it out.

        Args:
            state: of its rows.
            wanted: what it must be.
            owners: the edits that have changed its rows, where they are known.

        Raises:
            ValueError: it is another.
        """
        if state == wanted:
            return
        if state == "changed":
            who = f"rows of it belong to {owners}" if owners else "something else has changed rows of it since"
            raise ValueError(f"the edit {self.name} is neither in nor out, {who}: take that out first")
        raise ValueError(f"the edit {self.name} is {'in already' if state == 'in' else 'not in'}: nothing to do")

    def overlaps(self, other: Edit) -> bool:
        """Whether the two have a row in common."""
        return any(
            bool(torch.isin(rows, other.rows[name]).any()) for name, rows in self.rows.items() if name in other.rows
        )

    def save(self, path: Path | str) -> None:
        """Writes the edit as a safetensors file, whole or not at all; another file of that name is replaced.

        Old values of a table that are all zero, as before the first edit, are not written; new values take a
        byte each where they fit, as those of `pkmem.learn` do (`pkmem.editing.rounding`).

        Args:
            path: the file, in a folder that exists.

        Raises:
            ValueError: the facts are too long for a file's header.
            OSError: the disk is full or broken.
        """
        path = Path(path)
        tensors = {f"{name}.{part}": getattr(self, part)[name] for name in self.rows for part in _PARTS}
        tensors = {name: t for name, t in tensors.items() if not name.endswith(".old") or _bits(t).any()}
        dtypes = {}  # of what is written in bytes
        for name, new in self.new.items():
            if (short := to_bytes(new)) is not None:
                tensors[f"{name}.new"], tensors[f"{name}.exponents"] = short
                dtypes[name] = str(new.dtype).removeprefix("torch.")
        facts = json.dumps([fact.to_dict() for fact in self.facts], ensure_ascii=False)
        notes = {
            "format": "pt",
            "pkmem_edit": _VERSION,
            "fingerprint": self.fingerprint,
            "dtypes": json.dumps(dtypes),
            "facts": facts,
            "figures": json.dumps(self.figures, ensure_ascii=False),
        }
        size = len(json.dumps(notes, ensure_ascii=False).encode())
        if size > LARGEST_DOCUMENT // 2:
            raise ValueError(f"the edit's facts are {size:,} bytes, more than {LARGEST_DOCUMENT // 2:,}: split them")
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with replacing(path) as file:
            write_tensor_file(Path(file.name), layout, lambda name: iter([tensors[name]]), notes)

    @classmethod
    def load(cls, path: Path | str) -> Edit:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is missing, broken, or no edit.
        """
        path = Path(path)
        try:
            return cls._read(TensorFile(path))
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{path}: ").rsplit("; ", 1)[0]
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"{path}: no edit ({reason}): copy it again, or make it anew with `pkmem learn`")

    @classmethod
    def _read(cls, file: TensorFile) -> Edit:
        if file.notes.get("pkmem_edit") != _VERSION:
            raise ValueError(f"it does not say that it is one of form {_VERSION}")
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in (*_PARTS, "exponents")}
        for key in file.stored:
            name, _, part = key.rpartition(".")
            if part not in parts:
                raise ValueError(f"{key!r} is neither rows nor values")
            parts[part][name] = file[key].clone()
        dtypes = parse_json(file.notes.get("dtypes", "{}").encode(), file.path)
        if not isinstance(dtypes, dict):
            raise ValueError("its dtypes are no object")
        for name, dtype in dtypes.items():
            whole, exponents = parts["new"].get(name), parts["exponents"].pop(name, None)
            table_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else None
            if whole is None or exponents is None or table_dtype is None or not _are_bytes(whole, exponents):
                raise ValueError(f"{name!r} has no bytes and exponents that stand for {dtype!r}")
            parts["new"][name] = from_bytes(whole, exponents, table_dtype)
        if parts.pop("exponents"):
            raise ValueError("it has exponents of no values")
        for name in parts["new"].keys() - parts["old"].keys():
            parts["old"][name] = torch.zeros_like(parts["new"][name])
        facts, figures = (parse_json(file.notes.get(note, "").encode(), file.path) for note in ("facts", "figures"))
        if not isinstance(facts, list) or not isinstance(figures, dict):
            raise ValueError("its facts are no list or its figures no object")
        for name, figure in figures.items():
            if not isinstance(figure, str | int | float):
                raise ValueError(f"the figure {name!r} is neither a number nor text")
        known = [Fact.from_dict(fact) for fact in facts]
        return cls(**parts, facts=known, figures=figures, fingerprint=file.notes.get("fingerprint", ""))

    def _tables(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tables by name, if it is the edit's model."""
        self.require_model(fingerprint(model))
        tensors = saved_tensors(model)
        return {name: tensors[name] for name in table_names(model)}

    def write(self, tables: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Writes its old or its new values into a model's tables, whatever these hold now: the caller knows the model.

        Args:
            tables: weights by name.
            values: `old` or `new`.
        """
        with torch.no_grad():
            for name, rows in self.rows.items():
                table = tables[name]  # detached, and with the weight's own version counter
                table.index_copy_(0, rows.to(table.device), values[name].to(table.device))


def _require_rows(name: str, rows: Tensor, old: Tensor, new: Tensor) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows) or rows[0] < 0 or (rows.diff() <= 0).any():
        raise ValueError(f"rows of {name!r} must be increasing int64 numbers from 0, one or more")
    if new.dim() != 2 or len(new) != len(rows) or old.shape != new.shape or not new.shape[1]:
        raise ValueError(
            f"{name!r} has {len(rows)} rows, old values {tuple(old.shape)} and new values {tuple(new.shape)}: they must "
            "be (rows, width)"
        )
    if old.dtype != new.dtype or not new.is_floating_point():
        raise ValueError(
            f"old values of {name!r} are {old.dtype} and new ones {new.dtype}: they must be one float dtype"
        )
    if not new.isfinite().all():
        raise ValueError(f"new values of {name!r} are not finite")


def _are_bytes(whole: Tensor, exponents: Tensor) -> bool:
    are_int8 = whole.dtype == exponents.dtype == torch.int8
    return are_int8 and whole.dim() == 2 and exponents.shape == whole.shape[:1]


def _bits(tensor: Tensor) -> Tensor:
    """(n, ...) numbers -> (n, bytes), in which 0 and -0 differ and NaN equals itself."""
    return tensor.contiguous().view(len(tensor), -1).view(torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
