"""Training a value table at the cost of its reads: RowAdam, and its union with any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pkmem.layer.config import require
from pkmem.layer.huge_pages import prefer_huge_pages
from pkmem.layer.values import Table, tables_in
from pkmem.ops.arguments import AdamStep
from pkmem.ops.backends import Backend, backend_module, choose_backend
from pkmem.ops.reading_log import ReadLog, SortedReads


class RowAdam(Optimizer):
    """Adam on the rows of value tables that were read since the last step.

    From its construction on, its tables keep a reading log instead of a dense gradient (`.grad` stays
    None): a step costs the reads, not the table, over any number of micro-batches and layers that share a
    table. A row not read is left bitwise as it was; the bias correction counts all steps. Equals
    `torch.optim.SparseAdam` on the sparse gradient. No weight decay.
    Where a row not read should move on as its moments say, use `torch.optim.Adam` on the dense gradient instead.

    A bf16 table is rounded up or down at random with the chances that keep the mean, since a step of lr 1e-4 is
    lost when rounded to nearest; so are bf16 moments. An fp16 table is rounded to nearest: keep its lr high.

    Args:
        tables: a module whose tables to train (a memory, a model), a `ValueTable`, or an iterable of these.
        lr: learning rate, > 0; the paper's for values is 1e-3.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        max_norm: clip the norm of all tables' gradients together to this, > 0; None does not clip.
        moment_dtype: torch.float32 or torch.bfloat16, which halves the moments; None is fp32 (fp64 for fp64 tables).
        seed: of the random rounding, >= 0; the same when resuming makes the same bits.

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
        *,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        require(lr > 0, "lr", lr, "> 0")
        require(all(0 <= beta < 1 for beta in betas), "betas", betas, "in [0, 1)")
        require(eps > 0, "eps", eps, "> 0")
        require(max_norm is None or max_norm > 0, "max_norm", max_norm, "None or > 0")
        dtypes = (None, torch.float32, torch.bfloat16)
        require(moment_dtype in dtypes, "moment_dtype", moment_dtype, "None, torch.float32 or torch.bfloat16")
        require(seed >= 0, "seed", seed, ">= 0")
        modules = [tables] if isinstance(tables, nn.Module) else list(tables)
        self._tables = list(dict.fromkeys(table for module in modules for table in tables_in(module)))
        if not self._tables:
            raise ValueError("no value table found: give RowAdam a ProductKeyMemory or a model with one")
        super().__init__([table.weight for table in self._tables], {"lr": lr, "betas": tuple(betas), "eps": eps})
        self.max_norm = max_norm
        self.moment_dtype = moment_dtype
        self.seed = seed
        self._num_skipped = torch.zeros((), dtype=torch.int64)
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
        scale = self._scale(reads)
        self._num_skipped = self._num_skipped.to(scale.device) + ~scale.isfinite()
        for table in self._tables:
            self._update(table, reads.get(table), scale)
        self.zero_grad()
        return loss

    @property
    def num_skipped(self) -> int:
        """Steps left out because a gradient was not finite."""
        return int(self._num_skipped)

    def grad_norm(self) -> float:
        """Euclidean norm of the gradient of all tables together, over the reads so far."""
        return self._norm(self._sorted_reads()).item()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the reads since the last step."""
        super().zero_grad(set_to_none)
        for table in self._tables:
            assert table.log is not None
            table.log.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the moments in `moment_dtype` where torch would take the table's dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, weight in zip(saved, self._weights(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if index in state_dict["state"]:
                    moment = state_dict["state"][index][name]
                    self.state[weight][name] = moment.to(weight.device, self._dtype_of_moments(weight))
            if index in state_dict["state"]:
                self.state[weight]["step"] = self.state[weight]["step"].to(weight.device)

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _sorted_reads(self) -> dict[Table, SortedReads]:
        sorted_reads = {
            table: table.log.sorted(_backend_of(table).sort_reads, table.weight.shape[0])
            for table in self._tables
            if table.log is not None
        }
        return {table: reads for table, reads in sorted_reads.items() if reads is not None}

    def _norm(self, reads: dict[Table, SortedReads]) -> Tensor:
        norms = [_backend_of(table).row_gradient_norm(some) for table, some in reads.items()]
        return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)

    def _scale(self, reads: dict[Table, SortedReads]) -> Tensor:
        """Factor on the gradients, an fp64 scalar that stays on the device: NaN where they are not finite."""
        if self.max_norm is not None:
            norm = self._norm(reads)
            is_finite, scale = norm.isfinite(), (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        else:
            are_finite = [_backend_of(table).gradient_is_finite(some) for table, some in reads.items()]
            is_finite = torch.stack(are_finite).all() if are_finite else torch.ones((), dtype=torch.bool)
            scale = torch.ones_like(is_finite, dtype=torch.float64)
        return torch.where(is_finite, scale, math.nan)

    def _update(self, table: Table, reads: SortedReads | None, scale: Tensor) -> None:
        state, group = self._state_of(table.weight), self._group_of(table)
        state["step"] += scale.isfinite()
        if reads is not None:
            update = AdamStep(group["lr"], group["betas"], group["eps"], state["step"], scale, self.seed)
            _backend_of(table).adam_rows(table.weight, state["exp_avg"], state["exp_avg_sq"], reads, update)

    def _group_of(self, table: Table) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is table.weight for p in group["params"]))

    def _dtype_of_moments(self, weight: Tensor) -> torch.dtype:
        return self.moment_dtype or torch.promote_types(weight.dtype, torch.float32)

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            dtype = self._dtype_of_moments(weight)
            state["step"] = torch.zeros((), device=weight.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = prefer_huge_pages(torch.empty_like(weight, dtype=dtype, requires_grad=False)).zero_()
        return state


def _backend_of(table: Table) -> Backend:
    return backend_module(choose_backend(table.weight.device, table.backend))


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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a new group belongs to one of the parts.

        Raises:
            ValueError: always, once built.
        """
        if not any(param_group is group for part in self.optimizers for group in part.param_groups):
            raise ValueError("CombinedOptimizer takes no groups of its own: add the group to one of its parts")
        super().add_param_group(param_group)

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
