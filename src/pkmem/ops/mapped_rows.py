"""A table that lies in a file: what is about to be read is asked for ahead, all rows of a call at once.

Otherwise each row that is not in memory yet would be waited for, one after another.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from pkmem.files.tensor_file import TensorFile
from pkmem.ops.backends import choose_backend
from pkmem.ops.registered import is_plain, is_transformed


class MappedRows:
    """The pages of a mapped table that were asked for already.

    Args:
        rows: (m, v), mapped from a file, contiguous.
        file: that file.
    """

    def __init__(self, rows: Tensor, file: TensorFile) -> None:
        self.file = file
        self._begin = rows.data_ptr()
        self._page_bytes = mmap.PAGESIZE
        num_pages = rows.nbytes // self._page_bytes + 2 if _can_ask() else 0
        self._asked = torch.zeros(num_pages, dtype=torch.uint8, device="cpu")
        self._faults = 0

    def ask(self, rows: Tensor, slots: Tensor) -> None:
        """Asks for the rows of some slots, if this is the table in its file still.

        Pages that had to be waited for nevertheless were dropped by the system since: then all are asked for again.

        Args:
            rows: (m, v) the table.
            slots: (...) int64; those outside the table are left out.

        Raises:
            CheckpointError: the file was cut or written to since it was opened.
        """
        if is_transformed() or not is_plain(rows) or rows.data_ptr() != self._begin:
            return
        self.file.require_unchanged()
        if not _can_ask() or choose_backend(rows) != "cpu":
            return
        from pkmem.ops.cpu.ahead import ask_for_rows

        slots = slots.flatten()
        slots = slots[(slots >= 0) & (slots < len(rows))]
        faults = _faults_that_waited()
        if faults > self._faults:
            self._asked.zero_()
        ask_for_rows(rows, slots, self._asked, self._page_bytes)
        self._faults = faults


def _can_ask() -> bool:
    """Whether this system takes advice on what will be read."""
    return hasattr(mmap, "MADV_WILLNEED")


def _faults_that_waited() -> int:
    """How often this process has waited for a page from a disk."""
    import resource  # not there on Windows, where nothing is asked for

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
