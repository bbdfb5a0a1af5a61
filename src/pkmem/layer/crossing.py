"""The way of a batch between processes that each hold some columns of a table: out to the columns, and back.

torch.distributed's all-to-all carries everything: it takes batches of any sizes, and what comes back to a token is summed
in the order of the processes, the same in every run. What is sent out has as gradient the sum of what its copies get back.
A loss is the mean over a process's own tokens, and what is trained the mean over all processes: so the gradient that
reaches a table is divided by their number, as DistributedDataParallel does with everything else, and multiplied again on
its way to what is this process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_INT32_ROWS = 1 << 31


class Crossing:
    """The processes of a group, and how many tokens each brings; collective.

    A process whose tokens read nothing, since all are padding, brings none.

    Args:
        group: the processes that share the columns.
        slots: (n, ...) of the tokens here; others may have more, fewer or none.
        num_averaged: processes whose gradients are averaged, those of other groups too.
    """

    def __init__(self, group: Any, slots: Tensor, num_averaged: int) -> None:
        self.group, self.num_averaged = group, num_averaged
        self._shape = slots.shape
        reads = slots[:1].numel()
        self.own = len(slots) if reads else 0
        tokens, reads_each = gathered(torch.tensor([self.own, reads], device=slots.device), group).unbind(1)
        self.num_tokens: list[int] = tokens.tolist()
        self._num_reads = int(reads_each.max())

    def slots(self, slots: Tensor, num_rows: int) -> Tensor:
        """Slots (n, ...) -> those of all processes (N, b), four bytes each on the way where that is enough."""
        narrow = slots.to(torch.int32) if num_rows <= _INT32_ROWS else slots
        return _to_all(self, narrow.reshape(self.own, self._num_reads)).to(slots.dtype)

    def to_all(self, weights: Tensor) -> Tensor:
        """Numbers (n, ...) that every process needs -> those of all processes (N, b)."""
        weights = weights.reshape(self.own, self._num_reads)
        out: Tensor = _Crossed.apply(weights, self, _to_all, _summed, self.num_averaged)
        return out

    def to_columns(self, x: Tensor) -> Tensor:
        """Rows (n, d) of which each process needs its columns -> own columns of all processes' rows (N, d / C)."""
        out: Tensor = _Crossed.apply(x[: self.own], self, _to_columns, _joined, self.num_averaged)
        return out

    def joined(self, sums: Tensor) -> Tensor:
        """Own columns for all processes' tokens (N, v / C) -> all columns for the tokens here (n, v)."""
        out: Tensor = _Crossed.apply(sums, self, _joined, _to_columns, 1 / self.num_averaged)
        return torch.cat((out, out.new_zeros(self._shape[0] - self.own, out.shape[1])))

    def summed(self, products: Tensor) -> Tensor:
        """What own columns give to all processes' tokens (N, b) -> the sum over columns for the tokens here (n, ...)."""
        out: Tensor = _Crossed.apply(products, self, _summed, _to_all, 1 / self.num_averaged)
        return out.reshape(self._shape)


class _Crossed(torch.autograd.Function):
    """Goes `there`; gradients come `back` times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, crossing: Crossing, there: Any, back: Any, factor: float) -> Tensor:
        ctx.crossing, ctx.back, ctx.factor = crossing, back, factor
        way: Callable[[Crossing, Tensor], Tensor] = there
        return way(crossing, tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(ctx.crossing, grad) * ctx.factor, None, None, None, None


def _to_all(crossing: Crossing, part: Tensor) -> Tensor:
    """(n, b) -> (N, b)."""
    counts = crossing.num_tokens
    return all_to_all(part.repeat(len(counts), 1), counts, [crossing.own] * len(counts), crossing.group)


def _summed(crossing: Crossing, parts: Tensor) -> Tensor:
    """(N, b) -> (n, b), the sum of what each process has for the tokens here."""
    counts = crossing.num_tokens
    back = all_to_all(parts, [crossing.own] * len(counts), counts, crossing.group)
    return back.view(len(counts), crossing.own, parts.shape[1]).sum(0)


def _to_columns(crossing: Crossing, rows: Tensor) -> Tensor:
    """(n, v) -> (N, v / C)."""
    counts = crossing.num_tokens
    by_process = rows.unflatten(1, (len(counts), -1)).transpose(0, 1).flatten(0, 1)
    return all_to_all(by_process, counts, [crossing.own] * len(counts), crossing.group)


def _joined(crossing: Crossing, parts: Tensor) -> Tensor:
    """(N, v / C) -> (n, v)."""
    counts = crossing.num_tokens
    back = all_to_all(parts, [crossing.own] * len(counts), counts, crossing.group)
    return back.view(len(counts), crossing.own, parts.shape[1]).transpose(0, 1).flatten(1)


def all_to_all(rows: Tensor, counts_out: list[int], counts_in: list[int], group: Any) -> Tensor:
    """Sends `counts_in` rows to each process of a group in turn, and returns the `counts_out` that come from each."""
    received = rows.new_empty(sum(counts_out), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), counts_out, counts_in, group=group)
    return received


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """A tensor of the same shape on all C processes -> all of them (C, ...), the first process's first."""
    size = dist.get_world_size(group)
    return all_to_all(tensor.expand(size, *tensor.shape), [1] * size, [1] * size, group)


class _Gathered(torch.autograd.Function):
    """As `gathered`; the gradient is the sum of what all processes have for the tensor here."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gathered(tensor, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        size = len(grad)
        return all_to_all(grad, [1] * size, [1] * size, ctx.group).sum(0), None


class Connections:
    """What leads to other processes: copies of a module share it, and no other process can be sent it; abstract."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Connections:
        return self

    def __getstate__(self) -> Any:
        raise TypeError(
            "a model with sharded tables belongs to its processes and cannot be pickled: save model.state_dict() with "
            "torch.distributed.checkpoint"
        )


class AllProcesses(Connections):
    """All processes of a mesh, by the groups of its dimensions.

    Args:
        groups: the last dimension's first.

    Attributes:
        gathered: a tensor of the same shape on all processes -> all of them (g, ...), with a gradient; collective.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups
        self.gathered: Callable[[Tensor], Tensor] = torch.compiler.disable(self._gathered)

    def _gathered(self, tensor: Tensor) -> Tensor:
        out = tensor.unsqueeze(0)
        for group in self._groups:
            made: Tensor = _Gathered.apply(out, group)
            out = made.flatten(0, 1)
        return out
