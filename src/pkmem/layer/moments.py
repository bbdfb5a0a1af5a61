"""Adam's moments of a table: how many numbers are kept, and in which dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pkmem.layer.config import require
from pkmem.layer.huge_pages import prefer_huge_pages
from pkmem.ops.reads import OtherProcesses

FIRST, SECOND = "exp_avg", "exp_avg_sq"  # torch's names


@dataclass(frozen=True)
class Moments:
    """What `RowAdam` keeps of each table.

    Args:
        dtype: torch.float32 or torch.bfloat16; None is fp32 (fp64 for fp64 tables).
        second: "element", one second moment for each number; or "row", one for each row, never in bf16.

    Raises:
        ValueError: a setting is none of these.
    """

    dtype: torch.dtype | None = None
    second: Literal["element", "row"] = "element"

    def __post_init__(self) -> None:
        dtypes = (None, torch.float32, torch.bfloat16)
        require(self.dtype in dtypes, "moment_dtype", self.dtype, "None, torch.float32 or torch.bfloat16")
        require(self.second in ("element", "row"), "second_moment", self.second, "'element' or 'row'")

    @property
    def by_row(self) -> bool:
        """Whether a row has one second moment."""
        return self.second == "row"

    def dtype_of(self, name: str, weight: Tensor) -> torch.dtype:
        """Of a moment of a table."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return wide if name == SECOND and self.by_row else self.dtype or wide

    def make(self, state: dict[str, Any], weight: Tensor, beta1: float) -> None:
        """Puts zeros for what is not there yet into a table's state; where the first beta is 0, the first moment goes."""
        shapes = {FIRST: weight.shape, SECOND: weight.shape[:1] if self.by_row else weight.shape}
        if beta1 == 0:
            del shapes[FIRST]
            state.pop(FIRST, None)
        for name, shape in shapes.items():
            if name not in state:
                made = torch.empty(shape, dtype=self.dtype_of(name, weight), device=weight.device)
                state[name] = prefer_huge_pages(made).zero_()

    def put(self, state: dict[str, Any], given: dict[str, Any], weight: Tensor) -> None:
        """Puts moments that were saved into a table's state."""
        for name in (FIRST, SECOND):
            if name in given:
                state[name] = given[name].to(weight.device, self.dtype_of(name, weight))

    def fitted(self, state: dict[str, Any], others: OtherProcesses | None) -> dict[str, Any]:
        """A state with one second moment for each row, if that is what is kept here and it has one for each number.

        Args:
            state: of a table, or of the columns held here.
            others: None, or those that hold the other columns; then this is collective.

        Raises:
            ValueError: it has one second moment for each row, and here is one for each number.
        """
        second = state.get(SECOND)
        if second is None or (second.dim() == 1) == self.by_row:
            return state
        if second.dim() == 1:
            raise ValueError(
                "the state has one second moment a row but this RowAdam keeps one for each number: make it with "
                "second_moment='row'"
            )
        means = second.mean(1, dtype=torch.promote_types(second.dtype, torch.float32))
        return {**state, SECOND: means if others is None else others.means(means)}


def has_all_columns(name: str, part: Any) -> bool:
    """Whether a part of a state has a number for each of the table."""
    return name in (FIRST, SECOND) and part.dim() == 2
