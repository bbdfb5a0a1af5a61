"""Padding reads nothing: real tokens come out, learn and are counted as if they were alone."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from pkmem import MemoryConfig, MemoryUsage, ProductKeyMemory, RowAdam
from pkmem.layer.padding import reads_of_real_tokens
from pkmem.layer.values import tables_in

NORMS = ("batch", "layer", "rms", "none")
VARIANTS = {"plain": {}, "gate": {"gate": True, "value_dim": 3}, "flat": {"keys": "flat"}, "experts": {"experts": True}}
KIND = "Padding and recomputation"


def make(norm: str = "layer", **options) -> ProductKeyMemory:
    config = MemoryConfig(dim=6, num_sub_keys=8, heads=2, knn=3, query_dim=4, query_norm=norm, **options)
    memory = ProductKeyMemory(config).double()
    for parameter in memory.query.norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return memory


def padded(tokens: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """Ten real tokens (10, 6) in two sequences of eight, one padded on each side, and their mask."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]).bool()
    x = torch.full((2, 8, 6), filling, dtype=tokens.dtype)
    x[mask] = tokens
    return x, mask


@pytest.mark.case(KIND, "Train on a padded batch with a mask, whatever stands in the padding", "works", "")
@pytest.mark.parametrize("filling", [0.0, 1e3, float("nan")])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_real_tokens_come_out_and_learn_as_if_alone(norm, variant, filling) -> None:
    memory = make(norm, **VARIANTS[variant])
    alone = copy.deepcopy(memory)
    tokens = torch.randn(10, 6, dtype=torch.float64)
    x, mask = padded(tokens, filling)
    for leaf in (x, tokens):
        leaf.requires_grad_()
    for training in (True, False):
        out, expected = memory.train(training)(x, mask), alone.train(training)(tokens)
        torch.testing.assert_close(out[mask], expected, rtol=1e-9, atol=1e-12)
        assert (out[~mask] == 0).all()
        directions = torch.randn_like(expected)
        back = torch.full_like(out, filling)  # into the padding, too, some of it not finite
        back[mask] = directions
        out.backward(back)
        expected.backward(directions)
        torch.testing.assert_close(x.grad[mask], tokens.grad, rtol=1e-9, atol=1e-12)
        assert (x.grad[~mask] == 0).all()
    for (name, ours), theirs in zip(memory.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(dict(memory.named_buffers()), dict(alone.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.case(
    KIND,
    "MemoryUsage on padded batches, in training and evaluation",
    "works",
    "https://github.com/huggingface/transformers/issues/28505",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_usage_counts_real_tokens_alone(variant, training) -> None:
    memory = make("batch", **VARIANTS[variant]).train(training)
    tokens = torch.randn(10, 6, dtype=torch.float64)
    x, mask = padded(tokens, 7.0)
    with MemoryUsage(memory) as usage, torch.no_grad():
        memory(x, mask)
    with MemoryUsage(memory) as alone, torch.no_grad():
        memory(tokens)
    assert usage.num_reads.sum() == 10 * 2 * 3
    assert torch.equal(usage.num_reads, alone.num_reads)
    assert torch.equal(usage.num_top1, alone.num_top1)
    torch.testing.assert_close(usage.weight_sum, alone.weight_sum, rtol=1e-9, atol=1e-12)


@pytest.mark.case(
    KIND,
    "RowAdam after a padded batch: rows that padding alone would have read",
    "works",
    "https://github.com/pytorch/pytorch/issues/18404",
)
@pytest.mark.parametrize("variant", ["plain", "flat", "experts"])
@pytest.mark.parametrize("filling", [5.0, float("nan")])
def test_a_row_that_no_real_token_read_is_left_bitwise_as_it_was(variant, filling, backend) -> None:
    memory = make("rms", **VARIANTS[variant])
    memory.backend = backend
    optimizer = RowAdam(memory, lr=0.1)
    memory(torch.randn(60, 6, dtype=torch.float64)).square().sum().backward()  # all rows get momentum
    optimizer.step()
    before = [table.weight.detach().clone() for table in tables_in(memory)]
    tokens = torch.randn(10, 6, dtype=torch.float64)
    x, mask = padded(tokens, filling)
    with torch.no_grad():
        read = torch.zeros(64, dtype=torch.bool)
        read[memory.keys(memory.query(tokens))[0].unique()] = True
    memory(x, mask)[mask].square().sum().backward()
    optimizer.step()
    assert 0 < (~read).sum() < 64
    for old, table in zip(before, tables_in(memory), strict=True):
        moved = (table.weight != old).any(1)
        assert torch.equal(moved, read)


@pytest.mark.case(
    KIND, "RowAdam after a batch of nothing but padding", "works", "https://github.com/pytorch/pytorch/issues/82486"
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_of_nothing_but_padding_changes_nothing(norm, variant) -> None:
    memory = make(norm, **VARIANTS[variant])
    optimizer = RowAdam(memory, lr=0.1)
    memory(torch.randn(60, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    tables = [table.weight.detach().clone() for table in tables_in(memory)]
    statistics = {name: buffer.clone() for name, buffer in memory.named_buffers() if "num_batches" not in name}
    x = torch.full((3, 4, 6), float("nan"), dtype=torch.float64, requires_grad=True)
    memory.zero_grad()
    with MemoryUsage(memory) as usage:
        out = memory(x, torch.zeros(3, 4, dtype=torch.bool))
    out.sum().backward()
    optimizer.step()
    assert (out == 0).all()
    assert (x.grad == 0).all()
    assert usage.num_reads.sum() == 0
    assert all(torch.equal(old, table.weight) for old, table in zip(tables, tables_in(memory), strict=True))
    assert all(torch.equal(old, memory.get_buffer(name)) for name, old in statistics.items())
    assert all((p.grad == 0).all() for p in memory.parameters() if type(p.grad) is Tensor)


def test_padding_repeats_the_reads_of_real_tokens_in_turn_with_weight_zero() -> None:
    slots, weights = torch.arange(6).view(6, 1, 1), torch.ones(6, 1, 1)
    mask = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    slots, weights = reads_of_real_tokens(slots, weights, mask)
    assert slots.flatten().tolist() == [1, 1, 1, 4, 4, 4]
    assert weights.flatten().tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.case(
    KIND, "torch.compile(fullgraph=True) of a training step with a mask, RowAdam and MemoryUsage", "works", ""
)
@pytest.mark.parametrize(("norm", "variant"), [("batch", "plain"), ("rms", "experts")])
def test_a_compiled_step_with_a_mask_is_the_eager_one(norm, variant) -> None:
    eager = make(norm, **VARIANTS[variant])
    compiled = copy.deepcopy(eager)
    optimizers = [RowAdam(memory, lr=0.1) for memory in (eager, compiled)]
    usages = [MemoryUsage(memory) for memory in (eager, compiled)]
    calls = eager, torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, mask = padded(torch.randn(10, 6, dtype=torch.float64), 3.0)
        for call, optimizer in zip(calls, optimizers, strict=True):
            call(x, mask)[mask].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-9, atol=1e-12)
    assert torch.equal(usages[0].num_reads, usages[1].num_reads)
    assert usages[0].num_reads.sum() == 2 * 10 * 2 * 3


def test_a_mask_is_taken_where_nothing_can_be_counted() -> None:
    memory = make("batch").float().to("meta")
    out = memory(torch.empty(2, 8, 6, device="meta"), torch.empty(2, 8, dtype=torch.bool, device="meta"))
    assert out.shape == (2, 8, 6)


@torch.no_grad()
def test_a_few_tokens_in_evaluation_mind_the_mask_as_many_do() -> None:
    memory = make("batch").float().eval()
    x, mask = torch.randn(4, 6), torch.tensor([True, False, True, True])
    out = memory(x, mask)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[mask], memory(x)[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.case(
    "Gradual surprises",
    "A mask of another shape, or of numbers, as an attention mask is",
    "refused: ValueError with both shapes and dtypes; give bool, True where a token is real",
    "",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_mask_that_does_not_fit_is_refused_with_both_shapes_and_dtypes(norm, training) -> None:
    memory, x = make(norm).train(training), torch.randn(2, 8, 6, dtype=torch.float64)
    fits = torch.ones(2, 8)
    for mask, given in (
        (fits, r"\(2, 8\) torch.float32 on cpu"),
        (fits.long(), r"\(2, 8\) torch.int64 on cpu"),
        (fits.bool().T, r"\(8, 2\) torch.bool on cpu"),
        (fits.bool().flatten(), r"\(16,\) torch.bool on cpu"),
        (fits.bool().to("meta"), r"\(2, 8\) torch.bool on meta"),
    ):
        with pytest.raises(ValueError, match=rf"^mask is {given} but must be \(2, 8\) torch.bool on cpu, True where"):
            memory(x, mask)


def test_a_token_alone_has_a_mask_of_no_dimension() -> None:
    memory, x = make(), torch.randn(6, dtype=torch.float64)
    assert torch.equal(memory(x, torch.tensor(True)), memory(x))
    assert (memory(x, torch.tensor(False)) == 0).all()


def test_shapes_with_a_mask_are_kept() -> None:
    memory = make(gate=True, value_dim=3)
    for shape in itertools.chain([(), (0,), (2, 0), (2, 1, 3)]):
        x = torch.randn(*shape, 6, dtype=torch.float64)
        assert memory(x, torch.ones(shape, dtype=torch.bool)).shape == x.shape
