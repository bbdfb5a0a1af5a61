"""The gradient of a value table is its reading log: who read what, with which weight, what came back.

A table of a billion parameters is read at a few rows per token. Its gradient is kept as those reads, never as a tensor
of the table's size, and summed row by row when the table is updated. To torch it is a tensor all the same, and the
table's `.grad`: so whoever zeroes, adds up, clips or unscales gradients does so to the reads, too.
"""

from __future__ import annotations

import itertools
import operator
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pkmem.ops.backends import backend_module
from pkmem.ops.reads import OtherProcesses, Reads

_handles = itertools.count()
_logs: weakref.WeakValueDictionary[int, ReadLog] = weakref.WeakValueDictionary()
_aten = torch.ops.aten
_ADD_TO_MOMENTS = {"aten::lerp_", "aten::addcmul_", "aten::_foreach_lerp_", "aten::_foreach_addcmul_"}


class RowGradient(Tensor):
    """The gradient (m, v) of a table, held as its reads: `.grad` while a `pkmem.RowAdam` trains the table.

    What changes, adds up or measures gradients works on the reads; anything else makes the dense tensor first.

    Args:
        table: (m, v) whose gradient it is.
        reads: its reads; views share them.
    """

    reads: Reads
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, table: Tensor, reads: Reads) -> RowGradient:
        made: RowGradient = Tensor._make_wrapper_subclass(
            cls, table.shape, strides=table.stride(), dtype=table.dtype, device=table.device
        )
        made.reads = reads
        return made

    def __init__(self, table: Tensor, reads: Reads) -> None:
        """All is done in `__new__`: torch makes tensors there."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RowGradient({tuple(self.shape)}, {len(self.reads.entries)} backward passes, dtype={self.dtype})"

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The gradient as a tensor of numbers, of the table's size."""
        grouped = self.reads.sorted()
        if grouped is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        dense = backend_module(self.reads.backend).weighted_sum_grad_values(grouped, self.shape[0])
        return (dense * self.reads.factor).to(self.dtype)

    def numpy(self, *, force: bool = False) -> Any:
        """The gradient as an array, for those who plot it."""
        return self.to_dense().numpy(force=force)

    def tolist(self) -> Any:
        """The gradient as lists of numbers."""
        return self.to_dense().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.to_dense().__dlpack__(*args, **kwargs)

    def share_memory_(self) -> RowGradient:
        """Refused: `Module.share_memory` would reach for memory that is not there, and crash.

        Raises:
            TypeError: always.
        """
        raise TypeError("a gradient that is kept as its reads has no memory to share: call zero_grad() before that")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        on_reads = _ON_READS.get(func)
        done = NotImplemented if on_reads is None else on_reads(*args, **(kwargs or {}))
        return _on_numbers(func, args, kwargs or {}) if done is NotImplemented else done


def row_gradient(
    table: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, backend: str, handle: int
) -> RowGradient:
    """What one backward pass gives a table: slots and weights (n, b), grad_output (n, v); by the handle of its log."""
    # Copies: the caller, or a compiler, may reuse the memory of what it passed.
    entry = (slots.clone(), weights.clone(), grad_output.clone())
    log = _logs.get(handle)
    return RowGradient(table, Reads(len(table), backend, [entry], None if log is None else log.others))


def reads_of(gradient: Tensor, backend: str, others: OtherProcesses | None = None) -> Reads:
    """The reads of a gradient; a dense one reads each of its rows that are not zero, with weight 1."""
    if isinstance(gradient, RowGradient):
        return gradient.reads
    rows = gradient.any(1).nonzero()
    entry = (rows, torch.ones_like(rows, dtype=gradient.dtype), gradient[rows[:, 0]])
    return Reads(len(gradient), backend, [entry], others)


def _on_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the dense gradients; one that would write into them is refused."""
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and _holds_reads(given):
            raise TypeError(
                f"{func} would write into the gradient of a table that a living RowAdam trains, which is kept as its "
                "reads: leave the table out of what does this (pkmem's dense_parameters lists all else), "
                "or delete the RowAdam for a dense gradient"
            )
    if func._schema.name in _ADD_TO_MOMENTS:
        warnings.warn(
            "another optimizer steps by the gradient of a table that a living RowAdam trains: if both step, the table is "
            "trained twice, once at the cost of all its rows; leave it out there (pkmem's dense_parameters lists the rest)",
            stacklevel=2,
        )
    return func(*tree_map_only(RowGradient, RowGradient.to_dense, args), **kwargs)


def _holds_reads(given: Any) -> bool:
    return any(isinstance(part, RowGradient) for part in (given if isinstance(given, list | tuple) else [given]))


def _alias(gradient: RowGradient) -> RowGradient:
    return RowGradient(gradient, gradient.reads)


def _clone(gradient: RowGradient, **_: Any) -> RowGradient:
    return RowGradient(gradient, gradient.reads.copy())


def _add_(gradient: Any, other: Tensor, *, alpha: float = 1) -> Any:
    if not isinstance(gradient, RowGradient) or alpha != 1 or other.shape != gradient.shape:
        return NotImplemented
    gradient.reads.add(reads_of(other, gradient.reads.backend))
    return gradient


def _add(gradient: Any, other: Any, *, alpha: float = 1) -> Any:
    both = isinstance(gradient, RowGradient) and isinstance(other, RowGradient)
    return _add_(_clone(gradient), other, alpha=alpha) if both else NotImplemented


def _scaled_by(operation: Callable[[Any, Any], Any], in_place: bool) -> Callable[..., Any]:
    """A product with a scalar, or a quotient."""

    def scale(gradient: Any, other: Any) -> Any:
        is_scalar = other.dim() == 0 if isinstance(other, Tensor) else isinstance(other, int | float)
        if not isinstance(gradient, RowGradient) or not is_scalar:
            return NotImplemented
        scaled = gradient if in_place else _clone(gradient)
        scaled.reads.scale(operation(1.0, other.double() if isinstance(other, Tensor) else other))
        return scaled

    return scale


def _zero_(gradient: RowGradient) -> RowGradient:
    gradient.reads.replace(Reads(gradient.reads.num_rows, gradient.reads.backend, []))
    return gradient


def _copy_(gradient: Any, source: Tensor, non_blocking: bool = False) -> Any:
    """DistributedDataParallel writes back like this what it has averaged."""
    if not isinstance(gradient, RowGradient) or source.shape != gradient.shape:
        return NotImplemented
    if _among_processes() and not isinstance(source, RowGradient):
        warnings.warn(
            "the processes exchange a gradient of the whole table at every step: call pkmem.shard_values(model, mesh) before "
            "DistributedDataParallel, and they exchange what was read",
            stacklevel=2,
        )
    gradient.reads.replace(reads_of(source.to(gradient.device), gradient.reads.backend))
    return gradient


def _norm(gradient: RowGradient, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if order != 2 or dim is not None or keepdim:
        return NotImplemented
    return gradient.reads.norm().to(gradient.device, dtype or gradient.dtype)


def _norms(gradients: list[Tensor], *order: Any, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(gradient, *order, dtype=dtype) for gradient in gradients]


def _for_each(operation: Callable[..., Any]) -> Callable[..., None]:
    def on_all(gradients: list[Tensor], *given: Any) -> None:
        for gradient in gradients:
            operation(gradient, *given)

    return on_all


def _part(gradient: RowGradient, *_: Any) -> None:
    raise TypeError(
        "a part of this gradient could not be written to, since it is kept as its reads while a RowAdam lives: "
        "look at gradient.to_dense() instead"
    )


def _unscale(gradients: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """What `torch.amp.GradScaler` does before a step."""
    dense = [gradient for gradient in gradients if not isinstance(gradient, RowGradient)]
    if dense:
        _aten._amp_foreach_non_finite_check_and_unscale_(dense, found_inf, inverse_scale)
    for gradient in gradients:
        if isinstance(gradient, RowGradient):
            found_inf += ~gradient.reads.is_finite()
            gradient.reads.scale(inverse_scale.double().squeeze())


_ON_READS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten.select.int: _part,
    _aten.slice.Tensor: _part,
    _aten.add.Tensor: _add,
    _aten.add_.Tensor: _add_,
    _aten.mul.Tensor: _scaled_by(operator.mul, in_place=False),
    _aten.mul_.Tensor: _scaled_by(operator.mul, in_place=True),
    _aten.div.Tensor: _scaled_by(operator.truediv, in_place=False),
    _aten.div_.Tensor: _scaled_by(operator.truediv, in_place=True),
    _aten.zero_.default: _zero_,
    _aten.copy_.default: _copy_,
    _aten.linalg_vector_norm.default: _norm,
    _aten._foreach_norm.Scalar: _norms,
    _aten._foreach_mul_.Tensor: _for_each(Tensor.mul_),
    _aten._foreach_mul_.Scalar: _for_each(Tensor.mul_),
    _aten._foreach_div_.Tensor: _for_each(Tensor.div_),
    _aten._foreach_zero_.default: _for_each(Tensor.zero_),
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}


def _among_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class ReadLog:
    """Where the reads of one table go while a living `pkmem.RowAdam` trains it: into the `.grad` of its weight.

    Compiled code takes tensors and numbers only, so it finds the weight through `handle`; it counts in `counter`, a
    tensor it declares to change, so that the compiler keeps what it does.

    Args:
        weight: (m, v) the table, or the columns of it that are here.
        others: None, or the processes that hold other columns, or the same ones.
    """

    def __init__(self, weight: Tensor, others: OtherProcesses | None = None) -> None:
        self.weight, self.others = weight, others
        self.counter = torch.zeros((), dtype=torch.int64, device="cpu")  # whatever torch's default: it picks the kernel
        self.handle = next(_handles)
        _logs[self.handle] = self

    @staticmethod
    def of(handle: int) -> ReadLog:
        """The living log with this handle.

        Raises:
            RuntimeError: its RowAdam is gone.
        """
        log = _logs.get(handle)
        if log is None:
            raise RuntimeError("the RowAdam that trained this table is gone since the forward pass: run forward again")
        return log

    @property
    def entries(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The reads that wait for an update: of each backward pass slots and weights (n, b), grad_output (n, v)."""
        return self.weight.grad.reads.entries if isinstance(self.weight.grad, RowGradient) else []

    def append(self, gradient: RowGradient) -> None:
        """Adds to the weight's gradient, as autograd does with what it is given.

        Raises:
            RuntimeError: several processes each have the whole table, which DistributedDataParallel does not see.
        """
        if self.others is None and _among_processes():
            raise RuntimeError(
                "a compiled model logs its reads where DistributedDataParallel does not see them, so the tables of the "
                "processes would drift apart: call pkmem.shard_values(model, mesh) before the RowAdam is made"
            )
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)
