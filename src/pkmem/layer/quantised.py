"""Value tables in few bits, for inference: a row is read at a few places per token, so it need not be exact to 32 bits."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.journey import sent_to
from pkmem.layer.values import NeuronTable, Table
from pkmem.ops.mapped_rows import MappedRows
from pkmem.ops.packing import BITS, pack_rows, require_bits, row_bytes, unpack_rows

_BF16 = 16


@final
class QuantisedValues(nn.Module):
    """The values (m, v) as codes of 8 or 4 bits with a scale per row; they do not train.

    Args:
        num_slots: m.
        width: of a value, v.
        bits: of a stored number, 8 or 4.
        device: of the rows, None for torch's own.

    Attributes:
        weight: (m, bytes of a row) uint8, zeros at first; see `pkmem.ops.packing`.
        backend: None for the fastest on the device, or one of `pkmem.ops.BACKENDS`.
        mapped: None, or the file that the table lies in.

    Raises:
        ValueError: `bits` is neither 8 nor 4.
    """

    def __init__(self, num_slots: int, width: int, bits: int, device: torch.device | None = None) -> None:
        super().__init__()
        require_bits(bits)
        rows = torch.zeros(num_slots, row_bytes(width, bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.width, self.bits = width, bits
        self.backend: str | None = None
        self.mapped: MappedRows | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: only the original may lie in a file."""
        return self.__dict__ | {"mapped": None}

    @classmethod
    def of(cls, table: Table, bits: int) -> QuantisedValues:
        """A table's values in few bits; of a table without numbers, on the meta device, one without numbers.

        Raises:
            ValueError: `bits` is neither 8 nor 4, or a number of the table is not finite.
        """
        num_slots, width = table.weight.shape
        made = cls(num_slots, width, bits, torch.device("meta"))
        rows = torch.empty_like(made.weight) if table.weight.is_meta else pack_rows(table.weight, bits)
        made.weight = nn.Parameter(rows, requires_grad=False)
        made.backend = table.backend
        return made.train(table.training)

    @property
    def num_parameters(self) -> int:
        """Numbers of the table, each stored in a few bits."""
        return len(self.weight) * self.width

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Slots and weights (n, h, knn) -> sums over heads and neighbours (n, v) fp32 (eq. 3)."""
        here = slots.device
        slots, weights = sent_to(self.weight, slots, weights)
        self.ask_ahead(slots)
        sums = ops.packed_sum(
            self.weight, slots.flatten(1), weights.flatten(1), self.width, self.bits, backend=self.backend
        )
        return sums.to(here)

    def ask_ahead(self, slots: Tensor) -> None:
        """Asks for the rows of slots about to be read, if the table lies in a file."""
        if self.mapped is not None and not torch.compiler.is_compiling():
            self.mapped.ask(self.weight.detach(), slots)

    def norms(self) -> Tensor:
        """The norm of each value, (m,) fp32."""
        parts = [unpack_rows(rows, self.width, self.bits).norm(dim=1) for rows in self.weight.detach().split(1 << 14)]
        return torch.cat(parts)

    def extra_repr(self) -> str:
        return f"num_slots={len(self.weight)}, width={self.width}, bits={self.bits}"


def quantise_values(model: nn.Module, bits: int) -> None:
    """Stores the value tables of a model in few bits, in place; a shared one stays shared.

    Args:
        model: with memories, or a memory.
        bits: of a stored number: 16 for bf16, in which tables still train; or 8 or 4, see `QuantisedValues`.

    Raises:
        ValueError: `bits` is none of these; there is no value table, or one that is sharded or trained by a `RowAdam`, or
            for fewer than 16 bits one of experts, or with a number that is not finite. The model is as it was.
    """
    if bits not in (_BF16, *BITS):
        raise ValueError(f"bits is {bits!r} but must be one of {_BF16}, {', '.join(map(str, BITS))}")
    places = [
        (module, name, part)
        for module in model.modules()
        for name, part in module._modules.items()
        if isinstance(part, Table)
    ]
    for _, _, table in places:
        _require_whole(table)
        if bits != _BF16 and isinstance(table, NeuronTable):
            raise ValueError("the slots are experts, whose input weights are not read as sums: leave them as they are")
    if not places:
        raise ValueError("no value table found inside: give quantise_values a ProductKeyMemory or a model with one")
    if bits == _BF16:
        for _, _, table in places:
            table.to(torch.bfloat16)
        return
    made = {table: QuantisedValues.of(table, bits) for table in dict.fromkeys(table for _, _, table in places)}
    for module, name, table in places:
        setattr(module, name, made[table])


def _require_whole(table: Table) -> None:
    if table.others is not None:
        raise ValueError("the tables are sharded: quantise a whole model, as `pkmem export` writes it")
    if table.log is not None:
        raise ValueError("a RowAdam trains the tables: quantise a model that is loaded or copied for inference")
