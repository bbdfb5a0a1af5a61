"""The reading log: grouping, lifetime, and what is computed from it row by row."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from pkmem.ops import backend_module, weighted_sum
from pkmem.ops.arguments import AdamStep, SortedReads
from pkmem.ops.reading_log import ReadLog, RowGradient
from pkmem.ops.reads import Reads
from pkmem.ops.reference.rows import row_gradients, sort_reads

Pass = tuple[Tensor, Tensor, Tensor]  # slots (n, b), weights (n, b), grad_output (n, v)


def random_pass(num_rows: int, width: int, n: int, b: int, dtype: torch.dtype = torch.float64) -> Pass:
    return torch.randint(num_rows, (n, b)), torch.randn(n, b, dtype=dtype), torch.randn(n, width, dtype=dtype)


def sorted_reads(passes: list[Pass]) -> SortedReads:
    return sort_reads(*(list(part) for part in zip(*passes, strict=True)), num_rows=400)


def dense(gradients: dict[int, np.ndarray], num_rows: int, width: int) -> np.ndarray:
    table = np.zeros((num_rows, width))
    for row, gradient in gradients.items():
        table[row] = gradient
    return table


# --- grouping ---------------------------------------------------------------------------------------------

pass_sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)  # n, b of each


@given(num_rows=st.integers(1, 9), sizes=pass_sizes)
@settings(max_examples=60, deadline=None)
def test_reads_are_grouped_by_row_in_the_order_of_reading(num_rows: int, sizes: list[tuple[int, int]]) -> None:
    passes = [random_pass(num_rows, 2, n, b) for n, b in sizes]
    reads = sorted_reads(passes)
    offsets = reads.offsets.tolist()
    grouped = {
        row: list(zip(reads.tokens[begin:end].tolist(), reads.weights[begin:end].tolist(), strict=True))
        for row, begin, end in zip(reads.rows.tolist(), offsets[:-1], offsets[1:], strict=True)
    }
    assert list(grouped.items()) == list(oracle.group_reads(passes).items())
    assert torch.equal(reads.grad_output, torch.cat([grad_output for _, _, grad_output in passes]))


def test_a_row_read_by_many_keeps_the_order_of_reading() -> None:
    passes = [(torch.full((50, 8), 3), torch.randn(50, 8), torch.randn(50, 1)) for _ in range(3)]
    reads = sorted_reads(passes)
    assert reads.rows.tolist() == [3]
    assert reads.offsets.tolist() == [0, 1200]
    assert torch.equal(reads.weights, torch.cat([weights.flatten() for _, weights, _ in passes]))
    assert torch.equal(reads.tokens, torch.arange(150).repeat_interleave(8))


# --- a gradient that is its reads -------------------------------------------------------------------------


def gradient_and_truth(backend: str, *sizes: tuple[int, int]) -> tuple[Tensor, RowGradient, Tensor]:
    """A table (9, 3), and what passes of sizes (n, b) give it: as reads, and as numbers by the oracle."""
    table = torch.randn(9, 3, dtype=torch.float64)
    passes = [random_pass(9, 3, n, b) for n, b in sizes]
    gradient = RowGradient(table, Reads(9, backend, passes))
    truth = dense(oracle.row_gradients(passes), 9, 3) if passes else np.zeros((9, 3))
    return table, gradient, torch.from_numpy(truth)


def assert_close(computed: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(computed, truth, rtol=1e-12, atol=1e-12)


def test_it_is_the_sum_of_all_passes(backend: str) -> None:
    _, gradient, truth = gradient_and_truth(backend, (4, 2), (0, 3), (5, 0), (1, 6))
    assert_close(gradient.to_dense(), truth)
    assert_close(gradient.clone().to_dense(), truth)
    assert_close(gradient.detach().to_dense(), truth)
    assert repr(gradient) == "RowGradient((9, 3), 4 backward passes, dtype=torch.float64)"
    assert (gradient.shape, gradient.dtype, gradient.device) == (truth.shape, truth.dtype, truth.device)


def test_without_reads_it_is_zero(backend: str) -> None:
    for sizes in ((), ((0, 4), (4, 0))):
        _, gradient, truth = gradient_and_truth(backend, *sizes)
        assert gradient.reads.sorted() is None
        assert torch.equal(gradient.to_dense(), truth)
        assert not truth.any()
        assert torch.linalg.vector_norm(gradient) == 0
        assert gradient.reads.is_finite()


OPERATIONS = {
    "scaled by a number": lambda g, _: g * 0.3,
    "scaled by a tensor": lambda g, _: g * torch.tensor(0.3),
    "divided": lambda g, _: g / 4.0,
    "scaled in place": lambda g, _: g.mul_(torch.tensor(-0.3)),
    "scaled twice": lambda g, _: g.div_(3.0).mul_(2.0),
    "zeroed": lambda g, _: g.zero_(),
    "added": lambda g, other: g + other,
    "added in place": lambda g, other: g.add_(other),
    "added to one scaled": lambda g, other: g.mul_(0.3).add_(other),
    "added with a factor": lambda g, other: g.add(other, alpha=2.0),
    "subtracted": lambda g, other: g - other,
    "copied": lambda g, other: g.copy_(other),
    "norm": lambda g, _: torch.linalg.vector_norm(g),
    "norm of a scaled one": lambda g, _: torch.linalg.vector_norm(g.mul_(-0.3)),
    "largest": lambda g, _: torch.linalg.vector_norm(g, float("inf")),
    "norm by rows": lambda g, _: torch.linalg.vector_norm(g, dim=1),
    "absolute": lambda g, _: g.abs(),
    "several": lambda g, other: torch._foreach_norm([g, other])[0],
    "several in place": lambda g, other: (torch._foreach_mul_([g, other], 0.5), g)[1],
    "in another dtype": lambda g, _: g.float(),
}


@pytest.mark.parametrize("other_is", ["reads", "dense"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_to_it_is_what_is_done_to_the_numbers(operation: str, other_is: str, backend: str) -> None:
    _, gradient, truth = gradient_and_truth(backend, (4, 2), (3, 5))
    _, other, other_truth = gradient_and_truth(backend, (2, 2))
    done = OPERATIONS[operation](gradient, other if other_is == "reads" else other_truth.clone())
    expected = OPERATIONS[operation](truth.clone(), other_truth.clone())
    assert done.shape == expected.shape
    torch.testing.assert_close(
        done.to_dense(), expected, rtol=1e-6 if expected.dtype == torch.float32 else 1e-12, atol=1e-12
    )


def test_what_would_write_numbers_into_it_is_refused() -> None:
    _, gradient, truth = gradient_and_truth("reference", (4, 2))
    rows = torch.tensor([0, 1])
    for write in (
        lambda g: g.clamp_(-1, 1),
        lambda g: torch._foreach_clamp_min_([g], 0.0),
        lambda g: g.index_fill_(0, rows, 0.0),
        lambda g: g.__setitem__(rows, 0.0),
    ):
        with pytest.raises(TypeError, match="would write into the gradient of a table that a living RowAdam trains"):
            write(gradient)
    for write in (lambda g: g[0].zero_(), lambda g: g.__setitem__(slice(3), 0.0)):
        with pytest.raises(TypeError, match="could not be written to, since it is kept as its reads"):
            write(gradient)
    assert_close(gradient.to_dense(), truth)


def test_a_view_is_the_same_gradient_and_a_copy_is_not() -> None:
    _, gradient, truth = gradient_and_truth("reference", (4, 2))
    copied, view = gradient.clone(), gradient.detach()
    gradient.mul_(2.0)
    assert_close(view.to_dense(), 2 * truth)
    assert_close(copied.to_dense(), truth)
    gradient.add_(copied)
    assert_close(view.to_dense(), 3 * truth)
    assert_close(copied.to_dense(), truth)


def test_forgotten_reads_are_freed() -> None:
    table, entry = torch.randn(9, 3, requires_grad=True), random_pass(9, 3, 4, 2)
    freed = weakref.ref(entry[2])
    table.grad = RowGradient(table, Reads(9, "reference", [entry]))
    table.grad = table.grad.add_(torch.ones(9, 3))
    del entry
    table.grad = None
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_scaler_finds_what_is_not_finite_and_unscales_the_rest(value: float, backend: str) -> None:
    for bad in (None, value):
        _, gradient, truth = gradient_and_truth(backend, (4, 2), (3, 5))
        plain, found, inverse = torch.ones(3), torch.zeros(1), torch.full((1,), 0.25)
        if bad is not None:
            gradient.reads.entries[0][2][1, 2] = bad
        torch._amp_foreach_non_finite_check_and_unscale_([plain, gradient], found, inverse)
        assert found.item() == (bad is not None)
        assert plain.tolist() == [0.25] * 3
        if bad is None:
            assert_close(gradient.to_dense(), truth / 4)


def test_many_passes_that_nobody_takes_are_told_of_once() -> None:
    _, gradient, _ = gradient_and_truth("reference", (1, 1))
    one = gradient.clone()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(1500):
            gradient.add_(one)
    assert [str(warning.message)[:53] for warning in told] == ["the reads of 1000 backward passes wait for RowAdam.st"]


def test_accumulated_and_shared_reads_sum_to_the_dense_gradient(backend: str) -> None:
    table = torch.randn(9, 3, dtype=torch.float64)
    logged, accumulated = table.clone().requires_grad_(), table.clone().requires_grad_()
    log = ReadLog(logged)
    for micro_batch in range(2):
        for values, its_log in ((logged, log), (accumulated, None)):
            torch.manual_seed(micro_batch)
            outputs = [
                weighted_sum(values, *random_pass(9, 3, n, b)[:2], log=its_log, backend=backend)
                for n, b in ((4, 5), (7, 2))  # two layers that share the table
            ]
            penalty = values[:2].square().sum()  # read by other means, too
            (sum(output.square().sum() for output in outputs) + penalty * micro_batch).backward()
    assert_close(logged.grad.to_dense(), accumulated.grad)


# --- what autograd does with it ---------------------------------------------------------------------------


def loss_of(values: Tensor, log: ReadLog | None, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    slots = random_pass(9, 3, 4, 5)[0]
    return (weighted_sum(values, slots, x, log=log) ** 2).sum()


def test_a_gradient_asked_for_leaves_none_behind() -> None:
    values, x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double().requires_grad_()
    log, dense_values = ReadLog(values), values.detach().clone().requires_grad_()
    asked = torch.autograd.grad(loss_of(values, log, x), (values, x))
    expected = torch.autograd.grad(loss_of(dense_values, None, x), (dense_values, x))
    for ours, theirs in zip(asked, expected, strict=True):
        assert_close(ours.to_dense(), theirs)
    loss_of(values, log, x).backward(inputs=[x])
    assert values.grad is None  # nothing that a later step would train on


def test_hooks_see_it_and_may_change_it() -> None:
    values, x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double()
    log, dense_values, seen = ReadLog(values), values.detach().clone().requires_grad_(), []
    values.register_hook(lambda gradient: gradient * 0.5)
    values.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    for _ in range(2):
        loss_of(values, log, x).backward()
        loss_of(dense_values, None, x).backward()
    assert_close(values.grad.to_dense(), dense_values.grad / 2)
    assert seen[-1] is values.grad


def test_a_handle_dies_with_its_log() -> None:
    values = torch.randn(9, 3, requires_grad=True)
    log = ReadLog(values)
    handle, died = log.handle, weakref.ref(log)
    loss_of(values, log, torch.randn(4, 5)).backward()
    assert ReadLog.of(handle) is log
    del log
    gc.collect()
    assert died() is None
    with pytest.raises(RuntimeError, match="RowAdam that trained this table is gone"):
        ReadLog.of(handle)
    assert ReadLog(values).handle != handle


# --- row by row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_read", [1, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gradients_are_exact_on_both_sides_of_a_chunk_border(num_read: int, dtype: torch.dtype) -> None:
    width = 1 << 15  # 8 rows of fp32, and what Adam makes of them, fill a chunk
    chosen = torch.randperm(40)[:num_read]
    slots = torch.cat([chosen, chosen[torch.randint(num_read, (20 - num_read,))]]).view(4, 5)
    entry = (slots, torch.randint(-3, 4, (4, 5)).to(dtype), torch.randint(-3, 4, (4, width)).to(dtype))
    truth = oracle.row_gradients([entry])
    reads = sorted_reads([entry])
    chunks = list(row_gradients(reads))
    assert len(chunks) == -(-num_read // 8)
    assert all(gradients.dtype == torch.float32 for _, gradients in chunks)
    assert torch.cat([reads.rows[part] for part, _ in chunks]).tolist() == list(truth)
    computed = torch.cat([gradients for _, gradients in chunks])
    assert np.array_equal(oracle.fp64(computed), np.stack(list(truth.values())))


def test_row_gradients_come_row_by_row_when_a_row_is_wider_than_a_chunk() -> None:
    entry = random_pass(50, (1 << 18) + 1, 2, 3)
    reads = sorted_reads([entry])
    chunks = list(row_gradients(reads))
    truth = oracle.row_gradients([entry])
    assert [reads.rows[part].tolist() for part, _ in chunks] == [[row] for row in truth]
    for (_, gradients), expected in zip(chunks, truth.values(), strict=True):
        assert np.abs(oracle.fp64(gradients[0]) - expected).max() <= 1e-12


def test_row_gradients_of_no_reads_are_none() -> None:
    assert list(row_gradients(sorted_reads([random_pass(5, 3, 0, 2)]))) == []


def test_row_gradient_norm_is_the_norm_of_the_dense_gradient(backend: str) -> None:
    values = torch.randn(300, 5000, dtype=torch.float64, requires_grad=True)  # six chunks
    slots, weights, grad_output = random_pass(300, 5000, 60, 8)
    (values[slots] * weights[..., None]).sum(1).backward(grad_output)
    norm = backend_module(backend).row_gradient_norm(sorted_reads([(slots, weights, grad_output)]))
    assert norm.dtype == torch.float64
    assert abs(norm.item() / torch.linalg.vector_norm(values.grad).item() - 1) <= 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_gradient_norm_of_a_non_finite_gradient_is_not_finite(backend: str, bad: float, dtype: torch.dtype) -> None:
    slots, weights, grad_output = random_pass(9, 3, 4, 2, dtype)
    grad_output[2, 1] = bad
    norm = backend_module(backend).row_gradient_norm(sorted_reads([(slots, weights, grad_output)]))
    assert not norm.isfinite()


# --- Adam on the rows read --------------------------------------------------------------------------------

ADAM = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def adam_run(
    backend: str, values: Tensor, moments: Tensor, passes: list[list[Pass]], scale: float = 1.0
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Table and moments after the updates, by pkmem and by the oracle, from the same start."""
    computed = [values.clone(), moments.clone(), moments.clone()]
    truth = [oracle.fp64(tensor) for tensor in computed]
    for step, update in enumerate(passes, start=1):
        backend_module(backend).adam_rows(*computed, sorted_reads(update), AdamStep(**ADAM, step=step, scale=scale))
        gradients = {row: scale * gradient for row, gradient in oracle.row_gradients(update).items()}
        oracle.adam(*truth, gradients, **ADAM, step=step)
    return computed, truth


def five_updates(num_rows: int, width: int, dtype: torch.dtype) -> list[list[Pass]]:
    return [[random_pass(num_rows, width, n, 3, dtype) for n in (2, 0, 3)] for _ in range(5)]


def test_adam_rows_in_fp64_equals_the_oracle(backend: str) -> None:
    values, moments = torch.randn(23, 7, dtype=torch.float64), torch.zeros(23, 7, dtype=torch.float64)
    computed, truth = adam_run(backend, values, moments, five_updates(23, 7, torch.float64), scale=0.3)
    for ours, theirs in zip(computed, truth, strict=True):
        assert np.abs(oracle.fp64(ours) - theirs).max() <= 1e-12


def test_adam_rows_in_fp32_equals_the_oracle_to_fp32_rounding(backend: str) -> None:
    computed, truth = adam_run(backend, torch.randn(23, 7), torch.zeros(23, 7), five_updates(23, 7, torch.float32))
    for ours, theirs in zip(computed, truth, strict=True):
        assert np.abs(oracle.fp64(ours) - theirs).max() <= 1e-6


def test_adam_rows_across_many_chunks_equals_the_oracle(backend: str) -> None:
    width = 1 << 14  # 16 rows to a chunk
    passes = [[(torch.randperm(40).view(8, 5), torch.randn(8, 5), torch.randn(8, width))]]
    computed, truth = adam_run(backend, torch.randn(40, width), torch.zeros(40, width), passes)
    assert np.abs(oracle.fp64(computed[0]) - truth[0]).max() <= 1e-6


def test_adam_rows_on_a_bf16_table_errs_by_less_than_one_bf16_step(backend: str) -> None:
    values, moments = torch.randn(23, 7).bfloat16(), torch.zeros(23, 7)
    computed, truth = adam_run(backend, values, moments, five_updates(23, 7, torch.bfloat16)[:1])
    assert [tensor.dtype for tensor in computed] == [torch.bfloat16, torch.float32, torch.float32]
    assert (np.abs(oracle.fp64(computed[0]) - truth[0]) <= 2.0**-7 * np.abs(truth[0])).all()
    assert not torch.equal(computed[0], values)
    for ours, theirs in zip(computed[1:], truth[1:], strict=True):
        assert np.abs(oracle.fp64(ours) - theirs).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_rows_leaves_every_other_row_bit_identical(backend: str, dtype: torch.dtype) -> None:
    values, moments = torch.randn(23, 7).to(dtype), torch.rand(23, 7)
    slots, weights, grad_output = random_pass(23, 7, 3, 3, dtype)
    computed, _ = adam_run(backend, values, moments, [[(slots, weights, grad_output)]])
    touched = torch.zeros(23, dtype=torch.bool)
    touched[slots] = True
    for before, after in zip((values, moments, moments), computed, strict=True):
        assert torch.equal(before[~touched], after[~touched])
        assert (before[touched] != after[touched]).any(1).all()


# --- with less state --------------------------------------------------------------------------------------


def lean_run(
    backend: str, values: Tensor, passes: list[list[Pass]], has_first: bool, is_by_row: bool, given: bool = False
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Table and those moments that there are after the updates, by pkmem and by the oracle.

    Args:
        given: whether the mean squares are handed to the update, as where other columns count as well.
    """
    module, adam = backend_module(backend), {**ADAM, "betas": (0.9 if has_first else 0.0, 0.98)}
    wide = torch.promote_types(values.dtype, torch.float32)
    table, first = values.clone(), torch.zeros(values.shape, dtype=wide)
    second = torch.zeros(values.shape[: 1 if is_by_row else 2], dtype=wide)
    truth = [oracle.fp64(tensor) for tensor in (table, first, second)]
    for step, update in enumerate(passes, start=1):
        reads = sorted_reads(update)
        squares = module.row_mean_squares(reads) if given else None
        step_of = AdamStep(**adam, step=step, scale=0.3)
        module.adam_rows(table, first if has_first else None, second, reads, step_of, squares)
        gradients = {row: 0.3 * gradient for row, gradient in oracle.row_gradients(update).items()}
        (oracle.adam_by_row if is_by_row else oracle.adam)(*truth, gradients, **adam, step=step)
    return ([table, first, second], truth) if has_first else ([table, second], [truth[0], truth[2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("has_first", "is_by_row", "given"),
    [(True, True, False), (False, True, False), (False, False, False), (True, True, True), (False, True, True)],
)
def test_adam_rows_with_less_state_equals_the_oracle(backend: str, dtype, has_first, is_by_row, given) -> None:
    for num_rows, width in ((23, 7), (9, 1), (40, 1 << 14)):
        passes = [[random_pass(num_rows, width, n, 3, dtype) for n in (2, 0, 3)] for _ in range(3)]
        computed, truth = lean_run(
            backend, torch.randn(num_rows, width, dtype=dtype), passes, has_first, is_by_row, given
        )
        for ours, theirs in zip(computed, truth, strict=True):
            assert ours.dtype == dtype
            assert np.abs(oracle.fp64(ours) - theirs).max() <= (1e-12 if dtype == torch.float64 else 1e-6)


def test_a_bf16_table_with_one_second_moment_a_row_errs_by_less_than_one_bf16_step(backend: str) -> None:
    values = torch.randn(23, 7).bfloat16()
    for has_first in (True, False):
        computed, truth = lean_run(backend, values, five_updates(23, 7, torch.bfloat16)[:1], has_first, True)
        assert (np.abs(oracle.fp64(computed[0]) - truth[0]) <= 2.0**-7 * np.abs(truth[0])).all()
        assert not torch.equal(computed[0], values)
        assert np.abs(oracle.fp64(computed[-1]) - truth[-1]).max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("has_first", [True, False])
def test_rows_that_were_not_read_keep_their_second_moment(backend: str, has_first: bool, dtype: torch.dtype) -> None:
    module, second = backend_module(backend), torch.rand(23, dtype=dtype)
    slots, weights, grad_output = random_pass(23, 7, 3, 3, dtype)
    first, before = torch.rand(23, 7, dtype=dtype) if has_first else None, second.clone()
    table = torch.randn(23, 7, dtype=dtype)
    start = table.clone()
    reads = sorted_reads([(slots, weights, grad_output)])
    for scale in (torch.nan, torch.inf):
        module.adam_rows(table, first, second, reads, AdamStep(**ADAM, step=1, scale=scale))
        assert torch.equal(second, before)
        assert torch.equal(table, start)
    module.adam_rows(table, first, second, reads, AdamStep(**ADAM, step=1, scale=1.0))
    touched = torch.zeros(23, dtype=torch.bool)
    touched[slots] = True
    assert torch.equal(touched, second != before)
    assert torch.equal(touched, (table != start).any(1))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_mean_squares_of_the_largest_and_the_smallest_gradients_are_exact(backend: str, scale: float) -> None:
    gradients = torch.randn(9, 300) * torch.logspace(-6, 6, 300) * scale
    reads = sorted_reads([(torch.arange(9)[:, None], torch.ones(9, 1), gradients)])
    squares = backend_module(backend).row_mean_squares(reads)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares[:9], gradients.double().square().mean(1), rtol=1e-6, atol=0)


def test_adam_rows_over_all_rows_is_the_adam_of_torch(backend: str) -> None:
    values = torch.randn(6, 4, dtype=torch.float64)
    parameter = values.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], **ADAM)
    passes = [[(torch.randperm(6).view(3, 2), *random_pass(6, 4, 3, 2)[1:])] for _ in range(5)]
    for update in passes:
        parameter.grad = torch.from_numpy(dense(oracle.row_gradients(update), 6, 4))
        optimizer.step()
    computed, truth = adam_run(backend, values, torch.zeros_like(values), passes)
    for updated in (computed[0], truth[0]):
        assert np.abs(oracle.fp64(updated) - oracle.fp64(parameter)).max() <= 1e-12
