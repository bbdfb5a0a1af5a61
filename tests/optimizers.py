"""What several tests ask of an optimizer: all that it changes, and whether two of them agree to the last bit."""

import torch
from torch import Tensor


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters and of the optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in parameters]
    moments = [v for state in states for name, v in state.items() if isinstance(v, Tensor) and name != "num_skipped"]
    return [tensor.detach().clone() for tensor in (*parameters, *moments)]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
