"""Training a value table at the cost of its reads: RowAdam, and its union with any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pkmem.memory import ValueTable, tables_in
from pkmem.ops import backend_module, choose_backend
from pkmem.ops.reading_log import ReadLog, SortedReads


class RowAdam(Optimizer):
    """Adam on the rows of value tables that were read since the last step (lazy moments).

    From its construction on, its tables keep a reading log instead of a dense gradient (`.grad` stays
    None): a step costs the reads, not the table, over any number of micro-batches and layers that share a
    table. A row not read is left bitwise as it was; the bias correction counts all steps. Equals
    `torch.optim.SparseAdam` on the sparse gradient. No weight decay.

    Args:
        tables: a module whose tables to train (a memory, a model), a `ValueTable`, or an iterable of these.
        lr: learning rate, > 0; the paper's for values is 1e-3.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        max_norm: clip the norm of all tables' gradients together to this, > 0; None does not clip.

    Attributes:
        num_skipped: steps left out because a gradient was not finite.

    Raises:
        ValueError: no table found, or a number outside its range.
    """

    def __init__(
        self,
        tables: nn.Module | Iterable[nn.Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        max_norm: float | None = None,
    ) -> None:
        _in_range("lr", lr, lr > 0, "> 0")
        _in_range("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)")
        _in_range("eps", eps, eps > 0, "> 0")
        _in_range("max_norm", max_norm, max_norm is None or max_norm > 0, "None or > 0")
        modules = [tables] if isinstance(tables, nn.Module) else list(tables)
        self._tables = list(dict.fromkeys(table for module in modules for table in tables_in(module)))
        if not self._tables:
            raise ValueError("no value table found: give RowAdam a ProductKeyMemory or a model with one")
        super().__init__([table.weight for table in self._tables], {"lr": lr, "betas": tuple(betas), "eps": eps})
        self.max_norm = max_norm
        self.num_skipped = 0
        for table in self._tables:
            table.log = table.log or ReadLog()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the rows read since the last step and forgets their reads.

        A gradient that is not finite changes nothing but `num_skipped`.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, if one is given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reads = self._sorted_reads()
        scale = 1.0
        if reads:
            norm = self._norm(reads)
            if not math.isfinite(norm):
                self.num_skipped += 1
                self.zero_grad()
                return loss
            if self.max_norm is not None:
                scale = min(1.0, self.max_norm / (norm + 1e-6))
        for table in self._tables:
            self._update(table, reads.get(table), scale)
        self.zero_grad()
        return loss

    def grad_norm(self) -> float:
        """Euclidean norm of the gradient of all tables together, over the reads so far."""
        return self._norm(self._sorted_reads())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the reads since the last step."""
        super().zero_grad(set_to_none)
        for table in self._tables:
            assert table.log is not None
            table.log.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the moments in fp32 where torch would take the table's dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, weight in zip(saved, self._weights(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if index in state_dict["state"]:
                    self.state[weight][name] = state_dict["state"][index][name].to(weight.device)

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _sorted_reads(self) -> dict[ValueTable, SortedReads]:
        sorted_reads = {
            table: table.log.sorted(_backend_of(table).sort_reads) for table in self._tables if table.log is not None
        }
        return {table: reads for table, reads in sorted_reads.items() if reads is not None}

    def _norm(self, reads: dict[ValueTable, SortedReads]) -> float:
        norms = [_backend_of(table).row_gradient_norm(some) for table, some in reads.items()]
        return torch.stack(norms).norm().item() if norms else 0.0

    def _update(self, table: ValueTable, reads: SortedReads | None, scale: float) -> None:
        state = self._state_of(table.weight)
        state["step"] += 1
        if reads is None:
            return
        group = next(group for group in self.param_groups if any(p is table.weight for p in group["params"]))
        _backend_of(table).adam_rows(
            table.weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            reads,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            step=int(state["step"]),
            scale=scale,
        )

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=dtype)
        return state


def _backend_of(table: ValueTable) -> Any:
    return backend_module(choose_backend(table.weight.device, table.backend))


def _in_range(name: str, number: Any, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {number} but must be {allowed}")


class CombinedOptimizer(Optimizer):
    """Several optimizers that step as one, for trainers that take a single one.

    Args:
        optimizers: each with its own parameters, e.g. `torch.optim.AdamW(...)` and `RowAdam(...)`.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # the very dicts, so that a scheduler's lr reaches the parts

    @property
    def state(self) -> Any:
        """The states of all parts, by parameter."""
        return {key: value for part in self.optimizers for key, value in part.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        """Ignored: each part holds its own."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every part; the closure runs once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """`{"parts": [state of each optimizer]}`."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, into the same kinds of optimizers in the same order."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a model that are not value tables."""
    tables = {id(table.weight) for table in tables_in(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
