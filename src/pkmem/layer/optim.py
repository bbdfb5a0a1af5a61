"""Training a value table at the cost of its reads: RowAdam."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pkmem.layer.config import require
from pkmem.layer.moments import FIRST, SECOND, Moments, has_all_columns
from pkmem.layer.trainable import require_trainable
from pkmem.layer.values import Table, tables_in
from pkmem.ops.arguments import AdamStep
from pkmem.ops.backends import backend_module, choose_backend
from pkmem.ops.reading_log import ReadLog, RowGradient, reads_of
from pkmem.ops.reads import OtherProcesses, Reads

_EPS_OF_CLIPPING = 1e-6  # of torch.nn.utils.clip_grad_norm_
_SURELY_FINITE = 1e30  # a norm below it has no entry that fp32 cannot hold


class RowAdam(Optimizer):
    """Adam on the rows of value tables that were read since the last step.

    While it lives, the gradient of its tables is kept as their reads, over any number of micro-batches and layers that
    share a table: a step costs the reads, not the table. To torch it is a `.grad` like any other, so `zero_grad` of any
    module or optimizer forgets it, `clip_grad_norm_` clips it and `GradScaler` unscales it. When the RowAdam is gone,
    and in every copy of a table, gradients are dense again.
    A row not read is left bitwise as it was; the bias correction counts all steps. Equals `torch.optim.SparseAdam` on
    the sparse gradient. No weight decay.
    Where a row not read should move on as its moments say, use `torch.optim.Adam` on the dense gradient instead.

    A bf16 table is rounded up or down at random with the chances that keep the mean, since a step of lr 1e-4 is
    lost when rounded to nearest; so are bf16 moments. An fp16 table is rounded to nearest: keep its lr high.

    The state can be smaller than twice the table: see `moment_dtype`, `second_moment` and `betas`.

    Args:
        tables: a module whose tables to train (a memory, a model), a `ValueTable`, an iterable of these, or an iterable
            of groups `{"params": a module or several, "lr": ...}` with options of their own.
        lr: learning rate, > 0; the paper's for values is 1e-3.
        betas: decay of the two moments, in [0, 1). Where the first is 0 there is no first moment to keep: a step then
            moves by the gradient itself. Where the second is 1 squares are summed, not averaged: (0, 1) is Adagrad, and
            with `second_moment="row"` the row-wise Adagrad of recommenders' tables, whose steps get shorter by themselves.
        eps: added to the root of the second moment, > 0.
        max_norm: clip the norm of all tables' gradients together to this, > 0; None does not clip.
        moment_dtype: torch.float32 or torch.bfloat16, which halves the moments; None is fp32 (fp64 for fp64 tables).
        second_moment: "element", one for each number of a table as in Adam; or "row", one for each row, of the mean square
            of its gradient, always in fp32 (fp64 for fp64 tables).
        seed: of the random rounding, >= 0; saved and restored with the state.

    Raises:
        ValueError: no table found, a table that is frozen, computed from other tensors or on Apple's GPU, a parameter
            that is no table, an option that is not one of Adam's by rows, or a number outside its range.
    """

    def __init__(
        self,
        tables: nn.Module | Iterable[nn.Module] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        max_norm: float | None = None,
        *,
        moment_dtype: torch.dtype | None = None,
        second_moment: Literal["element", "row"] = "element",
        seed: int = 0,
    ) -> None:
        require(max_norm is None or max_norm > 0, "max_norm", max_norm, "None or > 0")
        self.max_norm = max_norm
        self._moments = Moments(moment_dtype, second_moment)
        self._owned: list[tuple[Table, ReadLog]] = []
        self._has_warned = False
        given = [tables] if isinstance(tables, nn.Module) else list(tables)
        groups: list[Any] = given if given and isinstance(given[0], dict) else [{"params": given}]
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Trains further tables, with options of their own.

        Args:
            param_group: "params", a module or several, whose tables to train, and any of lr, betas, eps and seed.

        Raises:
            ValueError: as the constructor.
        """
        modules = param_group["params"]
        modules = [modules] if isinstance(modules, nn.Module | Tensor) else list(modules)
        _check_options({**self.defaults, **param_group})
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"RowAdam trains value tables but was given a {type(module).__name__}: give it the memory or its "
                    "ValueTable, and other parameters to another optimizer (pkmem.CombinedOptimizer joins the two)"
                )
        tables = dict.fromkeys(table for module in modules for table in tables_in(module))
        if not tables:
            raise ValueError("no value table found: give RowAdam a ProductKeyMemory or a model with one")
        for table in tables:
            require_trainable(table)
        weights = list(dict.fromkeys(table.weight for table in tables))
        super().add_param_group({**param_group, "params": weights})
        for table in tables:
            self._own(table)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the rows read since the last step and forgets their reads.

        A gradient that is not finite changes nothing but `num_skipped`.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.

        Returns:
            The closure's loss, if one is given.

        Raises:
            RuntimeError: a table was given to another RowAdam since, or another weight.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for table, log in self._owned:
            _check_owner(table, log)
        reads = self._reads()
        if not reads and not all(weight.is_cpu for weight in self._weights()):
            self._warn_of_no_reads()
        clip = self._clip(list(reads.values()))
        for group in self.param_groups:
            for weight in group["params"]:
                self._update(weight, group, reads.get(weight), clip)
        self.zero_grad()
        return loss

    @property
    def num_skipped(self) -> int:
        """Steps left out because a gradient was not finite."""
        return max((int(state["num_skipped"]) for state in self.state.values()), default=0)

    def grad_norm(self) -> float:
        """Euclidean norm of the gradient of all tables together, over the reads so far; collective for sharded ones."""
        return _norm(list(self._reads().values())).item()

    def state_dict(self) -> dict[str, Any]:
        """As in torch; the moments of a sharded table are DTensors, of which each process has its part."""
        whole = self.register_state_dict_post_hook(lambda _, state: self._converted(state, _as_distributed))
        try:
            return super().state_dict()
        finally:
            whole.remove()

    def _converted(self, state_dict: dict[str, Any], convert: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """A state dict with each table's state converted, by itself and the processes that hold the table's other columns."""
        state = dict(state_dict["state"])
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        logs = self._logs()
        for index, weight in zip(indices, self._weights(), strict=False):
            if index in state:
                state[index] = convert(state[index], logs[weight][0].others)
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, the moments in `moment_dtype` where torch would take the table's dtype.

        Where this RowAdam keeps one second moment a row, one for each number becomes its mean over the row; collective
        for sharded tables.

        Raises:
            ValueError: as in torch, or the state has one second moment a row and this RowAdam does not.
        """
        loaded: list[dict[str, Any]] = []

        def here(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            loaded.append(self._converted(given, self._held_here))
            return loaded[-1]

        last = self.register_load_state_dict_pre_hook(here)  # others may change it before
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        saved = [index for group in loaded[0]["param_groups"] for index in group["params"]]
        for index, weight in zip(saved, self._weights(), strict=True):
            if index not in loaded[0]["state"]:
                continue
            state, given = (
                self.state[weight],
                {"num_skipped": torch.zeros((), device="cpu"), **loaded[0]["state"][index]},
            )
            self._moments.put(state, given, weight)
            state["step"] = given["step"].to(weight.device)
            state["num_skipped"] = given["num_skipped"].to(weight.device, torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: its tables too, which the copy then trains."""
        own = {"max_norm": self.max_norm, "_moments": self._moments, "tables": [table for table, _ in self._owned]}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tables = state.pop("tables", None)  # None from load_state_dict, which sets the rest alone
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("seed", 0)
        if tables is not None:
            self._owned, self._has_warned = [], False
            for table in tables:
                self._own(table)

    def _own(self, table: Table) -> None:
        """From now on the table's gradient is its reads, and this optimizer's, until one of the two is gone."""
        logs = {log.weight: log for _, log in self._owned}
        log = logs.get(table.weight) or ReadLog(table.weight, table.others)
        table.weight.grad, table.log = None, log
        self._owned.append((table, log))
        weakref.finalize(self, _disown, weakref.ref(table), log).atexit = False

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _reads(self) -> dict[Tensor, Reads]:
        """The reads of each table that has any; a dense gradient, as of a penalty on the table, is read as one."""
        read = {}
        for weight, (log, backend) in self._logs().items():
            reads = Reads(len(weight), backend, [], log.others)
            if weight.grad is not None:
                reads = reads_of(weight.grad, backend, log.others)
            if log.others is not None:
                reads = reads.copy()  # more may be added yet
                reads.complete()
            if reads.sorted() is not None:
                read[weight] = reads
        return read

    def _logs(self) -> dict[Tensor, tuple[ReadLog, str]]:
        """The log and the backend of each table."""
        return {log.weight: (log, choose_backend(log.weight, table.backend)) for table, log in self._owned}

    def _warn_of_no_reads(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "RowAdam.step() found no reads, so it changes nothing: call backward() before it. A CUDA graph that is "
                "replayed logs none: leave the backward pass of a memory out of what you capture",
                stacklevel=4,
            )

    def _clip(self, reads: list[Reads]) -> Tensor:
        """Factor on the gradients, an fp64 scalar that stays on the device: NaN where they are not finite."""
        if self.max_norm is not None:
            bound = math.hypot(*(some.norm_bound() for some in reads)) + _EPS_OF_CLIPPING
            if bound <= min(self.max_norm, _SURELY_FINITE):  # most steps: no row has to be summed for it
                return torch.ones((), dtype=torch.float64, device="cpu")
            norm = _norm(reads)
            is_finite, clip = norm.isfinite(), (self.max_norm / (norm + _EPS_OF_CLIPPING)).clamp(max=1.0)
        else:
            are_finite = [some.is_finite() for some in reads]
            is_finite = _together(are_finite).all() if are_finite else torch.ones((), dtype=torch.bool, device="cpu")
            clip = torch.ones_like(is_finite, dtype=torch.float64)
        return torch.where(is_finite, clip, math.nan)

    def _update(self, weight: Tensor, group: dict[str, Any], reads: Reads | None, clip: Tensor) -> None:
        state, clip = self._state_of(weight, group), clip.to(weight.device)
        state["step"] += clip.isfinite()
        state["num_skipped"] += ~clip.isfinite()
        grouped = None if reads is None else reads.sorted()
        if reads is not None and grouped is not None:
            scale = clip * reads.factor
            first = 0 if reads.others is None else reads.others.first_column
            update = AdamStep(group["lr"], group["betas"], group["eps"], state["step"], scale, group["seed"], first)
            backend = backend_module(reads.backend)
            squares = None
            if self._moments.by_row and reads.others is not None:
                squares = reads.others.means(backend.row_mean_squares(grouped)).to(weight.device)
            backend.adam_rows(weight, state.get(FIRST), state[SECOND], grouped, update, squares)

    def _held_here(self, state: dict[str, Any], others: OtherProcesses | None) -> dict[str, Any]:
        """What this process keeps of a table's state."""
        if others is not None:
            state = {
                name: others.part_of(part) if has_all_columns(name, part) else part for name, part in state.items()
            }
        return self._moments.fitted(state, others)

    def _state_of(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["num_skipped"] = torch.zeros((), dtype=torch.int64, device=weight.device)
        self._moments.make(state, weight, group["betas"][0])
        return state


def _as_distributed(state: dict[str, Any], others: OtherProcesses | None) -> dict[str, Any]:
    """A table's state as it leaves this process."""
    if others is None:
        return state
    return {name: others.as_distributed(part) if has_all_columns(name, part) else part for name, part in state.items()}


def _check_options(group: dict[str, Any]) -> None:
    require(group["lr"] > 0, "lr", group["lr"], "> 0")
    first, second = group["betas"]
    require(0 <= first < 1 and 0 <= second <= 1, "betas", group["betas"], "in [0, 1), or 1 for the second")
    require(group["eps"] > 0, "eps", group["eps"], "> 0")
    require(group["seed"] >= 0, "seed", group["seed"], ">= 0")
    for option in ("weight_decay", "amsgrad", "maximize", "differentiable"):
        if group.get(option):
            raise ValueError(
                f"RowAdam has no {option}, which was set to {group[option]!r}: leave it out"
                + (" and negate the loss" if option == "maximize" else "")
            )


def _check_owner(table: Table, log: ReadLog) -> None:
    if table.log is not log:
        raise RuntimeError("another RowAdam was made for this table since this one: step that one, and drop this one")
    if table.weight is not log.weight:
        raise RuntimeError(
            "a table has another weight than when its RowAdam was made (load_state_dict(assign=True), for one, puts new "
            "weights in): make the RowAdam anew, after that"
        )


def _disown(owned: weakref.ref[Table], log: ReadLog) -> None:
    """Leaves the table of a RowAdam that is gone with a dense gradient."""
    table = owned()
    if table is not None and table.log is log:
        table.log = None
        if isinstance(log.weight.grad, RowGradient):
            log.weight.grad = None


def _norm(reads: list[Reads]) -> Tensor:
    norms = [some.norm() for some in reads]
    return _together(norms).norm() if norms else torch.zeros((), dtype=torch.float64, device="cpu")


def _together(scalars: list[Tensor]) -> Tensor:
    """Scalars as one tensor, on a GPU if one of them is: a copy from there to the host would wait."""
    device = next((scalar.device for scalar in scalars if not scalar.is_cpu), scalars[0].device)
    return torch.stack([scalar.to(device) for scalar in scalars])


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a model that are not value tables."""
    tables = {id(table.weight) for table in tables_in(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in tables]
