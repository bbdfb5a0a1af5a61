"""Activation checkpointing runs a forward twice; statistics, usage and updates see it once."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pkmem import MemoryConfig, MemoryUsage, ProductKeyMemory, RowAdam
from pkmem.layer.recomputation import is_recomputation

NORMS = ("batch", "layer", "rms", "none")
KIND = "Padding and recomputation"


class Block(nn.Module):
    """Stands for a transformer's block."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        config = MemoryConfig(
            dim=6, num_sub_keys=4, heads=2, knn=3, query_dim=4, query_norm=norm, query_dropout=0.1, dropout=0.1
        )
        self.norm, self.memory = nn.LayerNorm(6), ProductKeyMemory(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.memory(self.norm(x), mask).tanh()


def trained(block: Block, call: Callable[..., Tensor], masked: bool) -> dict[str, Tensor]:
    """Weights, statistics and usage after three updates of two backward passes each."""
    torch.manual_seed(1)
    optimizers = RowAdam(block, lr=0.1), torch.optim.SGD([p for n, p in block.named_parameters() if "values" not in n])
    usage = MemoryUsage(block.memory)
    for _ in range(3):
        for _ in range(2):
            x = torch.randn(2, 5, 6, requires_grad=True)
            mask = torch.rand(2, 5) < 0.7 if masked else torch.ones(2, 5, dtype=torch.bool)
            call(x, mask if masked else None)[mask].square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    counts = {"num_reads": usage.num_reads, "num_top1": usage.num_top1, "weight_sum": usage.weight_sum}
    return {**block.state_dict(), **counts}


def ways(block: Block, way: str) -> Callable[..., Tensor]:
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    match way:
        case "reentrant" | "not reentrant":
            return partial(checkpoint, block, use_reentrant=way == "reentrant")
        case "twice":
            return partial(checkpoint, partial(checkpoint, block, use_reentrant=False), use_reentrant=False)
        case "a compiled block":
            return partial(checkpoint, compiled(block), use_reentrant=False)
        case "inside what is compiled":
            return compiled(lambda x, mask: checkpoint(block, x, mask, use_reentrant=False))
    raise AssertionError(way)


@pytest.mark.case(
    KIND,
    "torch.utils.checkpoint of a memory with dropout, both kinds, every query norm: statistics, usage and updates",
    "works",
    "https://github.com/pytorch/pytorch/issues/96136",
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "twice"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_checkpointed_block_is_trained_and_counted_bitwise_as_without(norm, way, masked) -> None:
    plain = Block(norm)
    saving = copy.deepcopy(plain)
    expected, found = trained(plain, plain, masked), trained(saving, ways(saving, way), masked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert norm != "batch" or found["memory.query.norm.num_batches_tracked"] == 6


@pytest.mark.case(KIND, "torch.compile(fullgraph=True) inside and outside of torch.utils.checkpoint", "works", "")
@pytest.mark.parametrize("way", ["a compiled block", "inside what is compiled"])
def test_compiled_code_knows_a_recomputation_when_it_runs(way) -> None:
    plain = Block("batch")
    plain.memory.dropout.p = plain.memory.query.dropout.p = 0.0  # a compiler draws its own
    saving = copy.deepcopy(plain)
    expected, found = trained(plain, plain, True), trained(saving, ways(saving, way), True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["num_reads"], expected["num_reads"])


def test_statistics_follow_as_torchs_do_with_a_cumulative_average_too() -> None:
    memory = ProductKeyMemory(MemoryConfig(dim=6, num_sub_keys=4, heads=2, knn=3, query_dim=4))
    torchs = nn.BatchNorm1d(8, momentum=None)
    memory.query.norm.momentum = None
    for _ in range(4):
        x = torch.randn(9, 6)
        memory(x)
        torchs(memory.query.project(x))
    torch.testing.assert_close(memory.query.norm.state_dict(), torchs.state_dict())


def test_is_recomputation_is_true_inside_backward_alone() -> None:
    seen = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda grad: seen.append(is_recomputation()))
    (2 * x).sum().backward()
    assert seen == [True]
    assert not is_recomputation()
