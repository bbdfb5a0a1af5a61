"""The values, eq. 3: slots and weights -> sums of rows of a table; and the rows of PEER's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.drawing import draw_normal, new_seed, tables_stay_undrawn
from pkmem.layer.huge_pages import converted, prefer_huge_pages
from pkmem.layer.journey import sent_to
from pkmem.layer.room import require_room
from pkmem.ops.mapped_rows import MappedRows
from pkmem.ops.reading_log import ReadLog
from pkmem.ops.reads import OtherProcesses


class Table(nn.Module):
    """A row per slot, found by the slot's number; abstract.

    Attributes:
        weight: (m, v) the rows.
        log: None while `weight.grad` is a dense tensor; a reading log while a living `pkmem.RowAdam` trains this very
            table (a copy or a reloaded table has none), and `weight.grad` holds the reads.
        mapped: None, or the file that the table lies in.
        backend: None for the fastest on the device, or one of `pkmem.ops.BACKENDS`.
        seed: of the rows, 0-d int64.
        std: standard deviation of the rows as they are drawn, 1 / sqrt(v) as in the paper's public code; 0 where they
            start at zero.
    """

    def __init__(self, num_slots: int, width: int) -> None:
        super().__init__()
        device = torch.device("meta") if tables_stay_undrawn() else None
        require_room(f"a table of {num_slots:,} rows", num_slots * width, device)
        self.weight = nn.Parameter(prefer_huge_pages(torch.empty(num_slots, width, device=device)))
        self.log: ReadLog | None = None
        self.mapped: MappedRows | None = None
        self.backend: str | None = None
        self.std = width**-0.5
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation `std`."""
        self.seed = new_seed()
        self.draw()

    def draw(self) -> None:
        """The rows by the seed; a table on the meta device keeps it for later."""
        if not self.weight.is_meta:
            draw_normal(self.weight, self.std, self.seed, 0, self.weight.shape[1])

    def start_at_zero(self) -> None:
        """All rows zero, now and whenever they are drawn."""
        self.std = 0.0
        self.draw()

    @property
    def others(self) -> OtherProcesses | None:
        """The processes that hold other columns of the table, or the same ones; None if it is whole, and of no others."""
        return None

    @property
    def num_parameters(self) -> int:
        """Numbers of the whole table, whatever part of it is here."""
        return self.weight.numel()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: the RowAdam trains the original, and only that may lie in a file."""
        return self.__dict__ | {"log": None, "mapped": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        # What `.to()`, `.bfloat16()` and `.cpu()` do; torch has no public name for it.
        return super()._apply(lambda tensor: converted(fn, tensor), recurse)

    def ask_ahead(self, slots: Tensor) -> None:
        """Asks for the rows of slots about to be read, if the table lies in a file."""
        if self.mapped is not None and not torch.compiler.is_compiling():
            self.mapped.ask(self.weight.detach(), slots)

    def log_of_reads(self) -> ReadLog | None:
        """The log, if the weight read is the one that its RowAdam trains: not one put in its place for a call."""
        return self.log if self.log is not None and self.log.weight is self.weight else None

    def extra_repr(self) -> str:
        return f"num_slots={self.weight.shape[0]}, width={self.weight.shape[1]}"

    def _replicate_for_data_parallel(self) -> Table:
        raise ValueError(
            "nn.DataParallel would copy the whole table to every device at every step: start a process per device with "
            "torchrun, or show one device only (CUDA_VISIBLE_DEVICES=0)"
        )


@final
class ValueTable(Table):
    """The values (m, v), read by all heads, possibly by several memories."""

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Slots and weights (n, h, knn) -> sums over heads and neighbours (n, v) (eq. 3)."""
        here = slots.device
        slots, weights = sent_to(self.weight, slots, weights)
        self.ask_ahead(slots)
        sums = ops.weighted_sum(
            self.weight, slots.flatten(1), weights.flatten(1), log=self.log_of_reads(), backend=self.backend
        )
        return sums.to(here)


@final
class NeuronTable(Table):
    """Input weights (m, d) of experts of one neuron, one per slot: v * gelu(u x) (He 2024, PEER, eq. 2)."""

    def forward(self, slots: Tensor, x: Tensor) -> Tensor:
        """Slots (n, h, knn) and hidden states (n, d) -> their inner products (n, h, knn)."""
        here = slots.device
        slots, x = sent_to(self.weight, slots, x)
        self.ask_ahead(slots)
        products = ops.row_products(self.weight, slots.flatten(1), x, log=self.log_of_reads(), backend=self.backend)
        return products.view_as(slots).to(here)


def tables_in(module: nn.Module) -> list[Table]:
    """The tables of a module, values and neurons, a shared one once."""
    return [part for part in module.modules() if isinstance(part, Table)]
