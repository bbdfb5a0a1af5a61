"""Edits of a run that is not finished: they took minutes each, and a run that is stopped goes on from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from pkmem.editing.edit import Edit
from pkmem.editing.fingerprint import fingerprint
from pkmem.text.facts import Fact


class Unfinished:
    """Keeps the edits of a run in a folder.

    Args:
        folder: of this run with this very code; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def edit(self, number: int, facts: Sequence[Fact], model: nn.Module, learn: Callable[[], Edit]) -> Edit:
        """An edit that was learned before, of these facts for this model; else it is learned, and kept."""
        if self._folder is None:
            return learn()
        file = self._folder / f"edit-{number:02d}.safetensors"
        if file.exists():
            try:
                edit = Edit.load(file)
            except ValueError:
                edit = None  # damaged
            if edit is not None and (edit.facts, edit.fingerprint) == (list(facts), fingerprint(model)):
                return edit
        edit = learn()
        self._folder.mkdir(parents=True, exist_ok=True)
        edit.save(file)
        return edit

    def forget(self) -> None:
        """Deletes what is kept: the run is finished."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
