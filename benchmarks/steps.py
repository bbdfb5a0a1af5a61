"""Training steps of a layer: forward, backward, update. Ours, and others' with each optimizer they have.

To fit side by side, all steps train one value table, and all that keep two moments of each number one pair of them; what
a step costs does not depend on the numbers in them, and the learning rate is too small to change what is read. Ours clips twice (the dense part and the
values, each a pass over the gradient), at a norm that never bites; the peers do not clip, in their favour.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam

from harness import check_same
from peers import FFN, LAYERS, PEER, PKM, PLAIN, PlainMemory
from pkmem import RowAdam
from pkmem.layer.config import MemoryConfig
from pkmem.layer.memory import ProductKeyMemory
from pkmem.layer.optim import dense_parameters

OURS, LEAN = "pkmem", "pkmem with one second moment a row alone"
SPARSE, FUSED, FOREACH = "SparseAdam", "dense Adam (fused)", "dense Adam (foreach)"
DENSE = (FUSED, FOREACH, PKM, PEER)
LR, BETAS, NEVER = 1e-5, (0.9, 0.98), 1e9
NOTES = {
    LEAN: 'with one second moment a row alone: RowAdam(second_moment="row", betas=(0, b2)), four bytes of state a row',
    SPARSE: "SparseAdam: plain torch with nn.EmbeddingBag(sparse=True); the same rule as ours",
    FUSED: "dense Adam: plain torch, every row updated at every step; fused and foreach forms",
    "clip": "ours clips its gradient norms (two more passes), the peers do not",
}


class TrainingStep:
    """One step of one layer when called.

    Args:
        layer: (n, d) -> (n, v).
        optimizers: of its parameters.
        x, grad_output: what goes in, and what comes back.
        clipped: parameters whose gradient norm is clipped.
    """

    def __init__(
        self, layer: nn.Module, optimizers: list[Optimizer], x: Tensor, grad_output: Tensor, clipped: list[Tensor]
    ) -> None:
        self.layer, self.optimizers, self.clipped = layer, optimizers, clipped
        self.x, self.grad_output = x.clone().requires_grad_(), grad_output

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        self.x.grad = None
        self.layer(self.x).backward(self.grad_output)
        if self.clipped:
            nn.utils.clip_grad_norm_(self.clipped, NEVER)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def our_step(memory: ProductKeyMemory, x: Tensor, grad_output: Tensor) -> TrainingStep:
    """Clipped RowAdam for the values, clipped Adam for the rest."""
    dense = dense_parameters(memory)
    optimizers = [Adam(dense, LR, BETAS, fused=True), RowAdam(memory, LR, BETAS, max_norm=NEVER)]
    return TrainingStep(memory, optimizers, x, grad_output, dense)


def lean_step(memory: ProductKeyMemory, x: Tensor, grad_output: Tensor) -> TrainingStep:
    """Ours with one second moment a row and no first: of the same table, by way of a second memory."""
    table = memory.values.weight
    twin = copy.deepcopy(memory, {id(table): table})
    dense = dense_parameters(twin)
    values = RowAdam(twin, LR, (0.0, BETAS[1]), max_norm=NEVER, second_moment="row")
    return TrainingStep(twin, [Adam(dense, LR, BETAS, fused=True), values], x, grad_output, dense)


def sparse_step(memory: ProductKeyMemory, x: Tensor, grad_output: Tensor) -> TrainingStep:
    """SparseAdam for the values, Adam for the rest."""
    table, dense = memory.values.weight, dense_parameters(memory)
    optimizers = [Adam(dense, LR, BETAS, fused=True), SparseAdam([table], LR, BETAS)]
    return TrainingStep(PlainMemory(memory, sparse=True), optimizers, x, grad_output, [])


def dense_step(layer: nn.Module, x: Tensor, grad_output: Tensor, form: str = "fused") -> TrainingStep:
    """Adam for everything."""
    return TrainingStep(layer, [Adam(layer.parameters(), LR, BETAS, **{form: True})], x, grad_output, [])


STEPS: dict[str, Callable[[ProductKeyMemory, Tensor, Tensor], TrainingStep]] = {
    OURS: our_step,
    LEAN: lean_step,
    SPARSE: sparse_step,
    FUSED: lambda memory, *flow: dense_step(PlainMemory(memory), *flow),
    FOREACH: lambda memory, *flow: dense_step(PlainMemory(memory), *flow, form="foreach"),
    PKM: lambda memory, *flow: dense_step(LAYERS[PKM](memory), *flow),
    PEER: lambda memory, *flow: dense_step(LAYERS[PEER](memory), *flow),
    FFN: lambda memory, *flow: dense_step(LAYERS[FFN](memory), *flow),
}
assert set(LAYERS) <= {PLAIN, *STEPS}


def flow_of(config: MemoryConfig, num_tokens: int) -> tuple[Tensor, Tensor]:
    """x and grad_output for a layer, the same in every process."""
    torch.manual_seed(1)
    return torch.randn(num_tokens, config.bound_dim), torch.randn(num_tokens, config.output_dim)


def moments_of(optimizer: Optimizer, table: Tensor) -> dict[str, Tensor]:
    """Adam's two moments of a table."""
    return {name: optimizer.state[table][name] for name in ("exp_avg", "exp_avg_sq")}


def share_moments(step: TrainingStep, table: Tensor, moments: dict[str, Tensor]) -> None:
    """Lets a peer's step use moments that are there already."""
    for optimizer in step.optimizers:
        if any(p is table for group in optimizer.param_groups for p in group["params"]):
            count = 0 if isinstance(optimizer, SparseAdam) else torch.zeros(())
            optimizer.state[table] = {"step": count, **moments}


def steps_on_one_table(
    memory: ProductKeyMemory, names: tuple[str, ...], x: Tensor, grad_output: Tensor
) -> dict[str, Callable[[], None]]:
    """Ours, and the steps named, checked: the first step of each plain-torch one must do what ours does.

    Of ours with less state, the gradient of x.

    Raises:
        ArithmeticError: a step makes another table, or other keys, than ours.
    """
    table = memory.values.weight
    with torch.no_grad():
        rows = memory.keys(memory.query(x))[0].unique()
    before = _parameters(memory, rows)
    ours = our_step(memory, x, grad_output)
    ours()
    moments = moments_of(ours.optimizers[-1], table)
    expected = _gradients(ours, rows, moments)
    steps: dict[str, Callable[[], None]] = {OURS: ours}
    for name in names:
        _restore(memory, rows, before, moments)
        try:
            step = STEPS[name](memory, x, grad_output)
        except ImportError as error:
            steps[name] = _raising(error)
            continue
        if name != LEAN:
            share_moments(step, table, moments)
        if name in (LEAN, SPARSE, FUSED, FOREACH):
            step()
            found = _gradients(step, rows, {} if name == LEAN else moments)
            for what, gradient in found.items():
                check_same(f"{name} and ours, {what} after one step", gradient, expected[what])
        steps[name] = step
    return steps


def _raising(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def _gradients(step: TrainingStep, rows: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a first step leaves of its gradients: that of x, and the moments of some of the rows it touched."""
    assert step.x.grad is not None
    some = rows[:: 1 + len(rows) // 1000]
    return {"gradient of x": step.x.grad.clone()} | {name: moment[some] for name, moment in moments.items()}


@torch.no_grad()
def _parameters(memory: ProductKeyMemory, rows: Tensor) -> list[Tensor]:
    """The dense parameters, and the rows of the table."""
    return [*(parameter.clone() for parameter in dense_parameters(memory)), memory.values.weight[rows]]


@torch.no_grad()
def _restore(memory: ProductKeyMemory, rows: Tensor, before: list[Tensor], moments: dict[str, Tensor]) -> None:
    for parameter, value in zip(dense_parameters(memory), before, strict=False):
        parameter.copy_(value)
    memory.values.weight[rows] = before[-1]
    for moment in moments.values():
        moment[rows] = 0
