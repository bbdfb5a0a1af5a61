"""journey.py: a table on the CPU beside a model on another device answers and trains as one that is with it."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.quantised import quantise_values

SIZES = {"dim": 32, "num_sub_keys": 8, "knn": 4, "query_dim": 16}
CASES: dict[str, Callable[[], None]] = {}


def case(check: Callable[[], None]) -> Callable[[], None]:
    CASES[check.__name__] = check
    return check


def apart(memory: nn.Module, **batch: torch.Tensor) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy whose tables stay, and all else is far, the batch too."""
    from far_device import FAR, send

    sent = copy.deepcopy(memory)
    send(sent, *[part for part in (sent.values, sent.neurons) if part is not None])
    return sent, {name: tensor.to(FAR) for name, tensor in batch.items()}


def read(memory: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of the hidden states and of all weights."""
    x = x.detach().requires_grad_()
    out = memory(x, mask)
    out.square().sum().backward()
    return out, x.grad, *[weight.grad for weight in memory.parameters()]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours = getattr(ours, "numbers", ours)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), (ours.shape, (ours - theirs).abs().max())


@case
def an_answer_and_all_gradients_are_the_same() -> None:
    for options in ({}, {"query_norm": "layer", "experts": True}, {"value_dim": 48, "gate": True}, {"keys": "flat"}):
        memory = ProductKeyMemory(MemoryConfig(**SIZES | options))
        x, mask = torch.randn(3, 7, 32), torch.rand(3, 7) < 0.7
        sent, batch = apart(memory, x=x, mask=mask)
        for ours, theirs in zip(read(sent, **batch), read(memory, x, mask), strict=True):
            same(ours, theirs)
        assert sent.values.weight.grad.device.type == "cpu"
        assert sent.query.project.weight.grad.device.type == "far"


@case
def one_token_and_none_are_read() -> None:
    memory = ProductKeyMemory(MemoryConfig(**SIZES)).eval()
    for num_tokens in (1, 0):
        x = torch.randn(num_tokens, 32)
        sent, batch = apart(memory, x=x)
        with torch.no_grad():
            same(sent(**batch), memory(x))


@case
def packed_values_are_read() -> None:
    memory = ProductKeyMemory(MemoryConfig(**SIZES)).eval()
    quantise_values(memory, 8)
    x = torch.randn(5, 32)
    sent, batch = apart(memory, x=x)
    same(sent(**batch), memory(x))


@case
def a_row_adam_trains_the_table_where_it_is() -> None:
    memory = ProductKeyMemory(MemoryConfig(**SIZES | {"query_norm": "layer"}))
    sent, _ = apart(memory)
    before = memory.values.weight.detach().clone()
    optimizers = []
    for one in (memory, sent):
        rest = [weight for name, weight in one.named_parameters() if not name.startswith("values")]
        optimizers.append(CombinedOptimizer(torch.optim.SGD(rest, lr=0.1), RowAdam(one, lr=0.1)))
    for _ in range(3):
        x = torch.randn(9, 32)
        for one, optimizer, batch in zip((memory, sent), optimizers, (x, apart(memory, x=x)[1]["x"]), strict=True):
            one(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(sent.parameters(), memory.parameters(), strict=True):
        same(ours, theirs)
    assert not torch.equal(memory.values.weight, before)
    assert all(state.device.type == "cpu" for state in optimizers[1].state[sent.values.weight].values())


@pytest.fixture(scope="module")
def held() -> set[str]:
    """The cases that held in a process of their own: a second device is there for the whole of it."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    print(run.stdout, run.stderr)
    return set(run.stdout.split())


@pytest.mark.parametrize("name", CASES)
def test_with_a_table_apart(name: str, held: set[str]) -> None:
    assert name in held


if __name__ == "__main__":
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from far_device import Far

    torch.manual_seed(0)
    for name, check in CASES.items():
        with Far():
            check()
        print(name)
