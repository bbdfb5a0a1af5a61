"""One optimizer for a whole model: RowAdam for its tables, any of torch's for the rest."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class CombinedOptimizer(Optimizer):
    """Several optimizers that step as one, for trainers that take a single one.

    Schedulers, loss scalers, hooks and `state_dict` see one optimizer with the parameter groups of all; `defaults` has
    the options that all parts have.

    Args:
        optimizers: each with its own parameters, e.g. `torch.optim.AdamW(...)` and `RowAdam(...)`.

    Raises:
        ValueError: two optimizers train the same parameter, or one of them needs a closure for itself, as LBFGS does.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                raise ValueError(f"{type(optimizer).__name__} runs the closure itself, many times: step it on its own")
        self.optimizers = optimizers
        parameters = [p for group in self.param_groups for p in group["params"]]
        if len(set(parameters)) < len(parameters):
            raise ValueError("two of the optimizers train the same parameter: give each parameter to one alone")
        first, *others = (optimizer.defaults for optimizer in optimizers)
        shared = {name: value for name, value in first.items() if all(name in other for other in others)}
        super().__init__(self.param_groups, shared)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a new group belongs to one of the parts.

        Raises:
            ValueError: the group is not one of a part's.
        """
        if not any(param_group is group for group in self.param_groups):
            raise ValueError("CombinedOptimizer takes no groups of its own: add the group to one of its parts")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The very groups of all parts, so that a scheduler's lr reaches them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        """Ignored: each part holds its own."""

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
        """The states and the groups of all parts, in torch's own form."""
        joined = self.register_state_dict_post_hook(lambda *_: self._joined(), prepend=True)
        try:
            return super().state_dict()
        finally:
            joined.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, into the same kinds of optimizers in the same order."""
        if "parts" in state_dict:  # an earlier form
            state_dict = _joined(state_dict["parts"])
        loading = self.register_load_state_dict_pre_hook(lambda _, given: self._load(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            loading.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizers" in state:  # else torch's load_state_dict, after the parts have loaded theirs
            CombinedOptimizer.__init__(self, *state["optimizers"])

    def _joined(self) -> dict[str, Any]:
        return _joined([optimizer.state_dict() for optimizer in self.optimizers])

    def _load(self, state_dict: dict[str, Any]) -> None:
        groups = iter(state_dict["param_groups"])
        for optimizer in self.optimizers:
            own = list(itertools.islice(groups, len(optimizer.param_groups)))
            indices = {index for group in own for index in group["params"]}
            states = {index: state for index, state in state_dict["state"].items() if index in indices}
            optimizer.load_state_dict({"state": states, "param_groups": own})


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dicts of several optimizers as that of one: their parameters counted on."""
    states: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for part in parts:
        first = sum(len(group["params"]) for group in groups)
        states |= {first + index: state for index, state in part["state"].items()}
        groups += [{**group, "params": [first + index for index in group["params"]]} for group in part["param_groups"]]
    return {"state": states, "param_groups": groups}
