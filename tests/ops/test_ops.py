"""The operators: against brute force, against the reference, and as citizens of torch."""

import gc
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import oracle
from pkmem.ops import choose_backend, flat_topk, prepare, product_key_topk, row_products, weighted_sum
from pkmem.ops.reading_log import ReadLog, RowGradient
from pkmem.ops.reference.selection import best_first

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32_EPS = 2.0**-24

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def error(computed: Tensor, truth: np.ndarray) -> float:
    """The largest error: absolute up to magnitude 1, relative to the largest entry above."""
    difference = np.abs(oracle.fp64(computed) - truth)
    return float(difference.max(initial=0) / np.abs(truth).max(initial=1))


def close(computed: Tensor, truth: np.ndarray, tolerance: float = 1e-12) -> bool:
    return tuple(computed.shape) == truth.shape and error(computed, truth) <= tolerance


# --- product_key_topk: the same slots as brute force ------------------------------------------------------


def random_topk_case(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shapes of query and sub_keys, and knn: every size from the smallest on, knn often 1 or s."""
    n, h, half, s = (int(rng.integers(low, high)) for low, high in ((0, 7), (1, 4), (1, 6), (1, 21)))
    knn = int(rng.choice([1, s, rng.integers(1, s + 1)]))
    return (n, h, 2 * half), (h, 2, s, half), knn


def test_slots_are_those_of_brute_force_on_integers_with_ties(backend: str) -> None:
    rng = np.random.default_rng(0)
    num_tied = 0
    for case in range(1000):
        query_shape, keys_shape, knn = random_topk_case(rng)
        query = torch.from_numpy(rng.integers(-2, 3, query_shape)).float()
        sub_keys = torch.from_numpy(rng.integers(-2, 3, keys_shape)).float()
        truth_scores, truth_slots = oracle.product_key_topk(query, sub_keys, knn)
        scores, slots = product_key_topk(query, sub_keys, knn, backend=backend)
        assert np.array_equal(oracle.integers(slots), truth_slots), (case, query_shape, keys_shape, knn)
        assert np.array_equal(oracle.fp64(scores), truth_scores), (case, query_shape, keys_shape, knn)
        num_tied += (truth_scores[..., 1:] == truth_scores[..., :-1]).any()
    assert num_tied > 400, "the cases must be full of ties"


def test_slots_score_as_those_of_brute_force_on_real_numbers(backend: str) -> None:
    rng = np.random.default_rng(1)
    for case in range(1000):
        query_shape, keys_shape, knn = random_topk_case(rng)
        query = torch.from_numpy(rng.standard_normal(query_shape)).float()
        sub_keys = torch.from_numpy(rng.standard_normal(keys_shape)).float()
        true_scores = oracle.all_scores(query, sub_keys)
        scores, slots = product_key_topk(query, sub_keys, knn, backend=backend)
        selected = np.take_along_axis(true_scores, oracle.integers(slots), axis=-1)
        # The classic bound of an inner product of q terms in fp32, in any order of summation.
        magnitude = oracle.all_scores(query.abs(), sub_keys.abs()).max(-1, keepdims=True, initial=0)
        rounding = query_shape[2] * FP32_EPS * magnitude
        assert (np.abs(oracle.fp64(scores) - selected) <= rounding).all(), case
        assert (np.abs(selected - oracle.best_first(true_scores, knn)[0]) <= 2 * rounding).all(), case
        assert (np.diff(np.sort(oracle.integers(slots), -1), axis=-1) > 0).all(), "a slot was chosen twice"


def test_equal_scores_go_by_lower_slot_when_zeros_differ_in_sign(backend: str) -> None:
    sub_keys = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0]).reshape(1, 1, 5, 1).expand(3, 2, 5, 1)
    query = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1).expand(2, 3, 2)
    scores, slots = product_key_topk(query, sub_keys, 5, backend=backend)
    assert (scores == 0).all()
    assert (slots == torch.arange(5)).all()


def test_best_first_is_a_stable_sort_for_every_float() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf])
    scores = special[torch.randint(len(special), (50, 30))]
    slots = torch.randperm(1000)[:30].expand(50, 30)
    by_slot = slots.argsort(-1)
    truth_scores, order = oracle.best_first(scores.gather(-1, by_slot), 12)
    truth_slots = np.take_along_axis(oracle.integers(slots.gather(-1, by_slot)), order, -1)
    for dtype in (torch.float32, torch.float64):
        best_scores, best_slots = best_first(scores.to(dtype), slots, 12, 1000)
        assert np.array_equal(oracle.fp64(best_scores), truth_scores)
        assert np.array_equal(oracle.integers(best_slots), truth_slots)


def test_best_first_keeps_slots_near_two_to_the_32_apart() -> None:
    for num_slots in (1 << 32, (1 << 32) + 1):
        slots = num_slots - 1 - torch.arange(6)
        scores = torch.tensor([2.0, -3.0, 2.0, -3.0, 5.0, 2.0])
        _, best = best_first(scores, slots, 6, num_slots)
        assert (num_slots - 1 - best).tolist() == [4, 5, 2, 0, 3, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_query_stays_in_range_and_disturbs_no_other_token(backend: str, bad: float) -> None:
    query, sub_keys = torch.randn(6, 2, 8), torch.randn(2, 2, 7, 4)
    spoiled = query.clone()
    spoiled[1] = bad
    spoiled[3, 0, 2] = bad
    scores, slots = product_key_topk(query, sub_keys, 5, backend=backend)
    spoiled_scores, spoiled_slots = product_key_topk(spoiled, sub_keys, 5, backend=backend)
    assert ((spoiled_slots >= 0) & (spoiled_slots < 49)).all()
    healthy = spoiled.isfinite().all(-1)
    assert torch.equal(spoiled_slots[healthy], slots[healthy])
    assert torch.equal(spoiled_scores[healthy], scores[healthy])
    assert not spoiled_scores[~healthy].isfinite().all()


# --- flat_topk --------------------------------------------------------------------------------------------


def all_flat_scores(query: Tensor, keys: Tensor) -> np.ndarray:
    return np.einsum("nhq,hmq->nhm", oracle.fp64(query), oracle.fp64(keys))


@by_dtype
def test_flat_slots_are_those_of_brute_force_on_integers_with_ties(backend: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        n, h, q, m = (int(rng.integers(low, high)) for low, high in ((0, 7), (1, 4), (1, 6), (1, 300)))
        knn = int(rng.choice([1, m, rng.integers(1, m + 1)]))
        query = torch.from_numpy(rng.integers(-2, 3, (n, h, q))).to(dtype)
        keys = torch.from_numpy(rng.integers(-2, 3, (h, m, q))).to(dtype)
        slots = flat_topk(query, keys, knn, backend=backend)
        assert np.array_equal(oracle.integers(slots), oracle.best_first(all_flat_scores(query, keys), knn)[1])


def test_flat_slots_score_as_those_of_brute_force_on_real_numbers(backend: str) -> None:
    random = torch.Generator().manual_seed(3)
    query, keys = torch.randn(130, 2, 16, generator=random), torch.randn(2, 2500, 16, generator=random)
    truth = all_flat_scores(query, keys)
    slots = oracle.integers(flat_topk(query, keys, 32, backend=backend))
    selected = np.take_along_axis(truth, slots, axis=-1)
    rounding = 16 * FP32_EPS * all_flat_scores(query.abs(), keys.abs()).max(-1, keepdims=True)
    assert (np.abs(selected - oracle.best_first(truth, 32)[0]) <= 2 * rounding).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_query_finds_flat_slots_that_exist(backend: str, bad: float) -> None:
    query, keys = torch.randn(6, 2, 8), torch.randn(2, 150, 8)
    slots = flat_topk(query, keys, 5, backend=backend)
    query[1] = bad
    spoiled = flat_topk(query, keys, 5, backend=backend)
    assert ((spoiled >= 0) & (spoiled < 150)).all()
    healthy = [0, 2, 3, 4, 5]
    assert torch.equal(spoiled[healthy], slots[healthy])


def test_flat_topk_computes_the_line_of_its_docstring(backend: str) -> None:
    query, keys = torch.randn(7, 3, 6, dtype=torch.float64), torch.randn(3, 40, 6, dtype=torch.float64)
    expected = torch.einsum("nhd,hmd->nhm", query, keys).topk(9).indices
    assert torch.equal(flat_topk(query, keys, 9, backend=backend), expected)


@pytest.mark.parametrize(
    ("query_shape", "keys_shape"),
    [((4, 6), (2, 5, 6)), ((4, 2, 6), (5, 6)), ((4, 3, 6), (2, 5, 6)), ((4, 2, 7), (2, 5, 6)), ((4, 0, 6), (0, 5, 6))],
)
def test_flat_topk_names_the_shapes_that_disagree(query_shape: tuple[int, ...], keys_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked below
        flat_topk(torch.zeros(query_shape), torch.zeros(keys_shape), 1)
    assert all(part in str(raised.value) for part in ("(h, m, q)", str(query_shape), str(keys_shape))), raised.value


@pytest.mark.parametrize("knn", [-1, 0, 6])
def test_flat_topk_names_a_knn_outside_its_range(knn: int) -> None:
    with pytest.raises(ValueError, match=rf"knn is {knn} but must be in \[1, m = 5\]"):
        flat_topk(torch.zeros(4, 2, 6), torch.zeros(2, 5, 6), knn)


# --- precision of the scores ------------------------------------------------------------------------------


def test_scores_of_bf16_are_accumulated_and_returned_in_fp32(backend: str) -> None:
    query, sub_keys = torch.ones(1, 1, 514).bfloat16(), torch.ones(1, 2, 3, 257).bfloat16()
    scores, _ = product_key_topk(query, sub_keys, 2, backend=backend)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[[514.0, 514.0]]]  # bf16 holds no odd number above 256 and no 514


# --- both operators against the oracle and their docstrings, in fp64 --------------------------------------


@st.composite
def topk_sizes(draw: st.DrawFn) -> tuple[int, ...]:
    n, h, half, s = draw(st.tuples(st.integers(0, 5), *[st.integers(1, 4)] * 2, st.integers(1, 9)))
    return n, h, 2 * half, s, draw(st.integers(1, s))


bag_sizes = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))  # m, v, n, b


def topk_inputs(n: int, h: int, q: int, s: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, h, q), torch.randn(h, 2, s, q // 2)


def bag_inputs(m: int, v: int, n: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(m, v), torch.randint(m, (n, b)), torch.randn(n, b)


@given(sizes=topk_sizes())
@settings(max_examples=60, deadline=None)
def test_topk_and_its_gradients_equal_the_oracle(backend: str, sizes: tuple[int, ...]) -> None:
    *shape, knn = sizes
    query, sub_keys = (leaf(tensor.double()) for tensor in topk_inputs(*shape))
    scores, slots = product_key_topk(query, sub_keys, knn, backend=backend)
    grad_scores = torch.randn_like(scores)
    grads = torch.autograd.grad(scores, (query, sub_keys), grad_scores)
    truth_scores, truth_slots = oracle.product_key_topk(query, sub_keys, knn)
    assert close(scores, truth_scores)
    assert np.array_equal(oracle.integers(slots), truth_slots)
    truths = oracle.product_key_topk_gradients(grad_scores, query, sub_keys, truth_slots)
    assert all(close(grad, truth) for grad, truth in zip(grads, truths, strict=True))


@given(sizes=bag_sizes)
@settings(max_examples=60, deadline=None)
def test_weighted_sum_and_its_gradients_equal_the_oracle(backend: str, sizes: tuple[int, ...]) -> None:
    values, slots, weights = bag_inputs(*sizes)
    values, weights = leaf(values.double()), leaf(weights.double())
    summed = weighted_sum(values, slots, weights, backend=backend)
    grad_output = torch.randn_like(summed)
    grads = torch.autograd.grad(summed, (values, weights), grad_output)
    assert close(summed, oracle.weighted_sum(values, slots, weights))
    truths = oracle.weighted_sum_gradients(values, slots, weights, grad_output)
    assert all(close(grad, truth) for grad, truth in zip(grads, truths, strict=True))


def test_topk_computes_the_lines_of_its_docstring(backend: str) -> None:
    query, sub_keys = (tensor.double() for tensor in topk_inputs(9, 3, 10, 11))
    first, second = query.chunk(2, -1)
    scores = (
        torch.einsum("nhd,hid->nhi", first, sub_keys[:, 0])[..., :, None]
        + torch.einsum("nhd,hjd->nhj", second, sub_keys[:, 1])[..., None, :]
    )
    scores, slots = scores.flatten(-2).topk(6)
    computed_scores, computed_slots = product_key_topk(query, sub_keys, 6, backend=backend)
    assert torch.equal(computed_slots, slots)
    torch.testing.assert_close(computed_scores, scores, rtol=1e-12, atol=1e-12)


def test_weighted_sum_computes_the_lines_of_its_docstring(backend: str) -> None:
    values, slots, weights = bag_inputs(13, 7, 9, 5)
    expected = (values.double()[slots] * weights.double()[..., None]).sum(1)
    computed = weighted_sum(values.double(), slots, weights.double(), backend=backend)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "knn"),
    [((3, 2, 4, 5), 3), ((2, 1, 6, 3), 1), ((2, 2, 2, 3), 3), ((2, 1, 2, 1), 1), ((0, 2, 4, 3), 2)],
    ids=["ragged", "knn-1", "knn-s", "one-slot", "no-tokens"],
)
def test_gradcheck_of_topk(backend: str, sizes: tuple[int, ...], knn: int) -> None:
    query, sub_keys = (leaf(tensor.double()) for tensor in topk_inputs(*sizes))
    assert torch.autograd.gradcheck(
        lambda query, sub_keys: product_key_topk(query, sub_keys, knn, backend=backend)[0], (query, sub_keys)
    )


@pytest.mark.parametrize(
    "sizes",
    [(7, 3, 4, 5), (2, 3, 4, 5), (1, 1, 1, 4), (5, 3, 0, 2), (5, 3, 2, 0)],
    ids=["ragged", "duplicates", "one-row", "no-tokens", "no-reads"],
)
def test_gradcheck_of_weighted_sum(backend: str, sizes: tuple[int, ...]) -> None:
    values, slots, weights = bag_inputs(*sizes)
    assert torch.autograd.gradcheck(
        lambda values, weights: weighted_sum(values, slots, weights, backend=backend),
        (leaf(values.double()), leaf(weights.double())),
    )


# --- a backend is at most twice as wrong as the reference -------------------------------------------------


def apart(tensor: Tensor) -> Tensor:
    """The same numbers, with other numbers between them in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def integral(tensor: Tensor) -> Tensor:
    return (2 * tensor).round()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "non-contiguous": apart,
    "tied": integral,
    "huge": lambda tensor: 1e4 * tensor,
    "denormal": lambda tensor: 1e-40 * tensor,  # zero in fp16
}
TOPK_SIZES = {
    "round": (64, 4, 32, 32, 8),
    "ragged": (37, 3, 10, 23, 5),
    "knn-1": (19, 2, 6, 13, 1),
    "knn-s": (19, 2, 6, 7, 7),
    "one-slot": (5, 2, 2, 1, 1),
    "no-tokens": (0, 2, 8, 5, 3),
}
BAG_SIZES = {
    "round": (64, 32, 48, 16),
    "ragged": (53, 7, 29, 5),
    "duplicates": (3, 17, 29, 40),
    "wide": (50, 1100, 150, 9),
    "one-column": (11, 1, 9, 3),
    "no-tokens": (11, 3, 0, 4),
    "no-reads": (11, 3, 6, 0),
}
TOPK_CASES = [(name, "") for name in TOPK_SIZES] + [("ragged", kind) for kind in KINDS]
BAG_CASES = [(name, "") for name in BAG_SIZES] + [("ragged", kind) for kind in KINDS]


def topk_errors(backend: str, query: Tensor, sub_keys: Tensor, knn: int) -> list[float]:
    """Errors to fp64 truth of scores, selection, d(query) and d(sub_keys)."""
    query, sub_keys = leaf(query), leaf(sub_keys)
    scores, slots = product_key_topk(query, sub_keys, knn, backend=backend)
    grad_scores = 0.01 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(scores, (query, sub_keys), grad_scores)
    assert [grad.dtype for grad in grads] == [query.dtype, sub_keys.dtype]
    truth = oracle.all_scores(query, sub_keys)
    best = oracle.best_first(truth, knn)[0]
    selected = torch.from_numpy(truth).gather(-1, slots)
    truths = oracle.product_key_topk_gradients(grad_scores, query, sub_keys, slots)
    return [error(scores, best), error(selected, best), error(grads[0], truths[0]), error(grads[1], truths[1])]


def bag_errors(backend: str, values: Tensor, slots: Tensor, weights: Tensor) -> list[float]:
    """Errors to fp64 truth of the sums, d(values) and d(weights)."""
    values, weights = leaf(values), leaf(weights)
    summed = weighted_sum(values, slots, weights, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grad_output = (0.01 * torch.randn(summed.shape, generator=generator)).to(summed.dtype)
    grads = torch.autograd.grad(summed, (values, weights), grad_output)
    assert [summed.dtype, *(grad.dtype for grad in grads)] == [values.dtype, values.dtype, weights.dtype]
    truths = oracle.weighted_sum_gradients(values, slots, weights, grad_output)
    sum_error = error(summed, oracle.weighted_sum(values, slots, weights))
    return [sum_error, error(grads[0], truths[0]), error(grads[1], truths[1])]


def assert_at_most_twice_as_wrong(errors: list[float], reference_errors: list[float]) -> None:
    assert np.isfinite(reference_errors).all()
    for ours, theirs in zip(errors, reference_errors, strict=True):
        assert ours <= 2 * theirs + 1e-6, (errors, reference_errors)


@by_dtype
@pytest.mark.parametrize(("name", "kind"), TOPK_CASES)
def test_topk_is_at_most_twice_as_wrong_as_the_reference(
    backend: str, name: str, kind: str, dtype: torch.dtype
) -> None:
    *shape, knn = TOPK_SIZES[name]
    query, sub_keys = (tensor.to(dtype) for tensor in topk_inputs(*shape))
    query = KINDS[kind](query) if kind else query
    sub_keys = KINDS[kind](sub_keys) if kind in ("non-contiguous", "tied") else sub_keys
    errors = [topk_errors(name, query, sub_keys, knn) for name in (backend, "reference")]
    assert_at_most_twice_as_wrong(*errors)


@by_dtype
@pytest.mark.parametrize(("name", "kind"), BAG_CASES)
def test_weighted_sum_is_at_most_twice_as_wrong_as_the_reference(
    backend: str, name: str, kind: str, dtype: torch.dtype
) -> None:
    values, slots, weights = bag_inputs(*BAG_SIZES[name])
    values, weights = values.to(dtype), weights.to(dtype)
    if kind:
        values = KINDS[kind](values)
    if kind == "huge":
        weights = weights.softmax(-1)  # or the sums would not fit fp16
    if kind == "non-contiguous":
        slots, weights = apart(slots), apart(weights)
    errors = [bag_errors(name, values, slots, weights) for name in (backend, "reference")]
    assert_at_most_twice_as_wrong(*errors)


@by_dtype
def test_the_reference_errs_by_no_more_than_the_rounding_of_its_output(dtype: torch.dtype) -> None:
    *shape, knn = TOPK_SIZES["round"]
    topk = topk_errors("reference", *(tensor.to(dtype) for tensor in topk_inputs(*shape)), knn)
    values, slots, weights = bag_inputs(*BAG_SIZES["round"])
    bag = bag_errors("reference", values.to(dtype), slots, weights.to(dtype))
    output_rounding = torch.finfo(dtype).eps / 2
    assert max(topk[:2]) <= 32 * FP32_EPS
    assert max(topk[2:] + bag) <= output_rounding + 32 * FP32_EPS


@pytest.mark.parametrize("weights_dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_weights_may_have_another_dtype_than_values(
    backend: str, dtype: torch.dtype, weights_dtype: torch.dtype
) -> None:
    values, slots, weights = bag_inputs(*BAG_SIZES["ragged"])
    values, weights = values.to(dtype), weights.to(weights_dtype)
    rounding = [torch.finfo(of).eps / 2 + 32 * FP32_EPS for of in (dtype, dtype, weights_dtype)]
    assert (np.array(bag_errors(backend, values, slots, weights)) <= rounding).all()


@pytest.mark.case(
    "Gradual surprises",
    "the decoder of a sparse autoencoder as a bag (`acts @ W_dec`): hundreds of activations a token, some zero or named "
    "twice, and batches without a token or without an activation",
    "works: `pkmem.weighted_sum`, values and gradients those of the matrix product",
    "https://github.com/decoderesearch/SAELens/issues/428",
)
@pytest.mark.parametrize(("num_tokens", "num_active"), [(3, 300), (3, 1), (0, 5), (3, 0)])
def test_a_bag_is_a_sparse_autoencoders_decoder(backend: str, num_tokens: int, num_active: int) -> None:
    decoder, slots, acts = bag_inputs(64, 5, num_tokens, num_active)
    decoder, acts = leaf(decoder.double()), leaf(acts.double().relu())
    dense = torch.zeros(num_tokens, 64, dtype=torch.float64).scatter_add(1, slots, acts)
    expected, summed = dense @ decoder, weighted_sum(decoder, slots, acts, backend=backend)
    torch.testing.assert_close(summed, expected)
    back = torch.randn(num_tokens, 5, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, (decoder, acts), back) for out in (summed, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_sums_of_bf16_rows_are_accumulated_in_fp32(backend: str) -> None:
    values = leaf(torch.tensor([[1.0], [2.0**-9]]).bfloat16())
    slots = torch.tensor([[0] + [1] * 256])
    summed = weighted_sum(values, slots, torch.ones(1, 257), backend=backend)
    assert summed.item() == 1.5  # in bf16 1 + 2 ** -9 is 1


def test_the_gradient_of_a_bf16_row_is_accumulated_in_fp32(backend: str) -> None:
    values = leaf(torch.zeros(1, 1).bfloat16())
    weights = torch.cat([torch.ones(1, 1), torch.full((256, 1), 2.0**-9)])
    weighted_sum(values, torch.zeros(257, 1, dtype=torch.int64), weights, backend=backend).sum().backward()
    assert values.grad.item() == 1.5


def test_fp32_weights_are_not_rounded_to_the_dtype_of_a_bf16_table(backend: str) -> None:
    values, slots = leaf(torch.ones(1, 1).bfloat16()), torch.zeros(1, 2, dtype=torch.int64)
    summed = weighted_sum(values, slots, torch.tensor([[1 + 2.0**-10, -1.0]]), backend=backend)
    summed.backward(torch.ones_like(summed))
    assert summed.item() == values.grad.item() == 2.0**-10  # in bf16 1 + 2 ** -10 is 1


# --- bit-reproducible -------------------------------------------------------------------------------------


def test_slots_and_gradients_are_bit_identical_in_two_runs(backend: str) -> None:
    query, sub_keys = topk_inputs(400, 4, 32, 48)
    values, _, _ = bag_inputs(48**2, 33, 0, 0)

    def run() -> list[Tensor]:
        leaves = leaf(query), leaf(sub_keys), leaf(values)
        scores, slots = product_key_topk(*leaves[:2], 16, backend=backend)
        weights = scores.softmax(-1).flatten(1)
        summed = weighted_sum(leaves[2], slots.flatten(1), weights, backend=backend)
        return [slots, summed, *torch.autograd.grad(summed.square().sum(), leaves)]

    first = run()
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(first, run(), strict=True))


# --- torch.library, autocast, checkpointing, compile ------------------------------------------------------


def opcheck_logged(operator: torch._ops.OpOverload, arguments: tuple) -> None:
    """All of opcheck; its comparison with compiled gradients with a frozen table, whose reads go another way there."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)
    torch.library.opcheck(operator, (arguments[0].detach(), *arguments[1:]), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
@pytest.mark.parametrize("num_tokens", [0, 5])
@by_dtype
def test_opcheck(backend: str, dtype: torch.dtype, num_tokens: int) -> None:
    query, sub_keys = (leaf(tensor.to(dtype)) for tensor in topk_inputs(num_tokens, 2, 6, 5))
    values, slots, weights = bag_inputs(11, 3, num_tokens, 4)
    bag = leaf(values.to(dtype)), slots, leaf(weights.to(dtype))
    log = ReadLog(bag[0])
    operators = torch.ops.pkmem
    torch.library.opcheck(operators.product_key_topk.default, (query, sub_keys, 3, backend))
    torch.library.opcheck(operators.flat_topk.default, (query, sub_keys[:, 0].repeat(1, 1, 2), 3, backend))
    torch.library.opcheck(operators.weighted_sum.default, (*bag, backend))
    opcheck_logged(operators.weighted_sum_logged.default, (*bag, log.counter, log.handle, backend))
    products = bag[0], slots, leaf(torch.randn(num_tokens, 3).to(dtype))
    torch.library.opcheck(operators.row_products.default, (*products, backend))
    opcheck_logged(operators.row_products_logged.default, (*products, log.counter, log.handle, backend))


@pytest.mark.parametrize("num_tokens", [0, 5])
@by_dtype
def test_opcheck_of_the_backward_operators(backend: str, dtype: torch.dtype, num_tokens: int) -> None:
    query, sub_keys = (tensor.to(dtype) for tensor in topk_inputs(num_tokens, 2, 6, 5))
    scores, chosen = product_key_topk(query, sub_keys, 3, backend=backend)
    _, slots, weights = bag_inputs(11, 3, num_tokens, 4)
    grad_output = torch.randn(num_tokens, 3).to(dtype)
    operators = torch.ops.pkmem
    torch.library.opcheck(
        operators.product_key_topk_backward.default, (torch.randn_like(scores), query, sub_keys, chosen, backend)
    )
    torch.library.opcheck(
        operators.weighted_sum_grad_values.default, (slots, weights.to(dtype), grad_output, 11, backend)
    )


def memory(backend: str, query: Tensor, sub_keys: Tensor, values: Tensor, log: ReadLog | None = None) -> Tensor:
    """A memory in three lines, as a layer would write it."""
    scores, slots = product_key_topk(query, sub_keys, 3, backend=backend)
    weights = scores.softmax(-1)
    return weighted_sum(values, slots.flatten(1), weights.flatten(1), log=log, backend=backend)


def results(run: Callable[..., Tensor], backend: str, logged: bool, n: int = 5) -> SimpleNamespace:
    """Output, gradients and logged reads of a memory that `run` runs, from the same start every time."""
    torch.manual_seed(n)
    leaves = [leaf(torch.randn(shape)) for shape in ((n, 2, 6), (2, 2, 5, 3), (25, 4))]
    log = ReadLog(leaves[2]) if logged else None
    output = run(backend, *leaves, log)
    output.square().sum().backward()
    return SimpleNamespace(
        output=output.detach(),
        grads=[tensor.grad.to_dense() for tensor in leaves],
        reads=[tensor for entry in (log.entries if log else []) for tensor in entry],
    )


def assert_same_results(ours: SimpleNamespace, theirs: SimpleNamespace) -> None:
    assert torch.equal(ours.output, theirs.output)
    assert all(torch.equal(*pair) for pair in zip(ours.grads, theirs.grads, strict=True))
    assert all(torch.equal(*pair) for pair in zip(ours.reads, theirs.reads, strict=True))


def test_autocast_changes_neither_results_nor_gradients(backend: str) -> None:
    def autocast_memory(*args: object) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return memory(*args)

    assert_same_results(results(autocast_memory, backend, False), results(memory, backend, False))


@pytest.mark.parametrize("logged", [False, True])
def test_checkpointing_gives_the_same_gradients_and_logs_reads_once(backend: str, logged: bool) -> None:
    checkpointed = results(lambda *args: checkpoint(memory, *args, use_reentrant=False), backend, logged)
    assert_same_results(checkpointed, results(memory, backend, logged))
    assert len(checkpointed.reads) == (3 if logged else 0)


def test_compile_gives_the_same_gradients_for_every_length(backend: str) -> None:
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    for n in (5, 7, 1, 0):
        assert_same_results(results(compiled, backend, False, n), results(memory, backend, False, n))


def test_compile_adds_each_backward_once_to_the_gradient_of_the_log_it_was_given(backend: str) -> None:
    compiled = torch.compile(memory, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same_results(results(compiled, backend, True), results(memory, backend, True))
    query, sub_keys = topk_inputs(4, 2, 6, 5)
    values = [leaf(torch.randn(25, 4)) for _ in range(2)]
    logs = [ReadLog(weight) for weight in values]
    for which in (0, 1, 0):
        compiled(backend, query, sub_keys, values[which], logs[which]).sum().backward()
    assert [len(log.entries) for log in logs] == [2, 1]
    assert [log.counter.item() for log in logs] == [2, 1]


def test_compiled_code_whose_log_is_gone_says_so(backend: str) -> None:
    values = leaf(torch.randn(25, 4))
    log = ReadLog(values)
    output = torch.compile(memory, fullgraph=True, backend="aot_eager")(backend, *topk_inputs(4, 2, 6, 5), values, log)
    del log
    gc.collect()
    with pytest.raises(RuntimeError, match="RowAdam that trained this table is gone since the forward pass"):
        output.sum().backward()


# --- which gradients are made -----------------------------------------------------------------------------


def test_a_log_takes_the_gradient_of_values(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    logged, dense = leaf(values), leaf(values)
    log = ReadLog(logged)
    grad_output = torch.randn(6, 3)
    logged_grad = leaf(weights), leaf(weights)
    weighted_sum(logged, slots, logged_grad[0], log=log, backend=backend).backward(grad_output)
    weighted_sum(dense, slots, logged_grad[1], backend=backend).backward(grad_output)
    assert isinstance(logged.grad, RowGradient)
    assert torch.equal(logged.grad.to_dense(), dense.grad)
    assert torch.equal(logged_grad[0].grad, logged_grad[1].grad)
    [entry] = log.entries
    assert all(torch.equal(*pair) for pair in zip(entry, (slots, weights, grad_output), strict=True))


def test_every_backward_pass_is_logged(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    values = leaf(values)
    log = ReadLog(values)
    summed = weighted_sum(values, slots, weights, log=log, backend=backend)
    summed.sum().backward(retain_graph=True)
    summed.sum().backward()
    assert len(log.entries) == 2


def test_logged_reads_survive_writing_over_what_was_logged(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    values, grad_output = leaf(values), torch.randn(6, 3)
    log = ReadLog(values)
    before = [tensor.clone() for tensor in (slots, weights, grad_output)]
    weighted_sum(values, slots, weights, log=log, backend=backend).backward(grad_output)
    for tensor in (slots, weights, grad_output):
        tensor.zero_()
    assert all(torch.equal(*pair) for pair in zip(log.entries[0], before, strict=True))


def test_values_learn_while_weights_are_frozen(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    logged, dense, grad_output = leaf(values), leaf(values), torch.randn(6, 3)
    log = ReadLog(logged)
    weighted_sum(logged, slots, weights, log=log, backend=backend).backward(grad_output)
    weighted_sum(dense, slots, weights, backend=backend).backward(grad_output)
    assert len(log.entries) == 1
    truth, _ = oracle.weighted_sum_gradients(values, slots, weights, grad_output)
    assert close(dense.grad, truth, 1e-6)


def test_frozen_values_get_no_gradient_and_no_reads(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    grad_output = torch.randn(6, 3)
    _, truth = oracle.weighted_sum_gradients(values, slots, weights, grad_output)
    for log in (None, ReadLog(values)):
        learned = leaf(weights)
        weighted_sum(values, slots, learned, log=log, backend=backend).backward(grad_output)
        assert close(learned.grad, truth, 1e-6)
        assert values.grad is None
        assert log is None or (log.entries == [] and log.counter.item() == 0)


def test_nothing_is_logged_without_gradients(backend: str) -> None:
    values, slots, weights = bag_inputs(11, 3, 6, 4)
    values = leaf(values)
    log = ReadLog(values)
    with torch.no_grad():
        summed = weighted_sum(values, slots, leaf(weights), log=log, backend=backend)
    assert not summed.requires_grad
    assert log.entries == []


def test_slots_need_no_gradient_and_frozen_keys_get_none(backend: str) -> None:
    query, sub_keys = topk_inputs(4, 2, 6, 5)
    query = leaf(query)
    scores, slots = product_key_topk(query, sub_keys, 3, backend=backend)
    scores.sum().backward()
    assert not slots.requires_grad
    assert query.grad is not None
    assert sub_keys.grad is None


# --- what a caller can get wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query_shape", "keys_shape", "named"),
    [
        ((4, 6), (2, 2, 5, 3), ["(n, h, q)", "(4, 6)"]),
        ((4, 2, 6), (2, 5, 3), ["(h, 2, s, q / 2)", "(2, 5, 3)"]),
        ((4, 2, 6), (2, 3, 5, 3), ["(h, 2, s, q / 2)", "(2, 3, 5, 3)"]),
        ((4, 3, 6), (2, 2, 5, 3), ["(4, 3, 6)", "(2, 2, 5, 3)", "heads (3 and 2)"]),
        ((4, 2, 8), (2, 2, 5, 3), ["(4, 2, 8)", "(2, 2, 5, 3)", "width (8 and twice 3)"]),
        ((4, 2, 7), (2, 2, 5, 3), ["(4, 2, 7)", "width (7 and twice 3)"]),
    ],
)
def test_topk_names_the_shapes_that_disagree(
    query_shape: tuple[int, ...], keys_shape: tuple[int, ...], named: list[str]
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is checked below
        product_key_topk(torch.zeros(query_shape), torch.zeros(keys_shape), 1)
    assert all(part in str(raised.value) for part in named), raised.value


@pytest.mark.parametrize("knn", [-1, 0, 6])
def test_topk_names_a_knn_outside_its_range(knn: int) -> None:
    with pytest.raises(ValueError, match=rf"knn is {knn} but must be in \[1, s = 5\]"):
        product_key_topk(torch.zeros(4, 2, 6), torch.zeros(2, 2, 5, 3), knn)


@pytest.mark.parametrize(
    ("values_shape", "slots_shape", "weights_shape"),
    [((7,), (4, 2), (4, 2)), ((7, 3), (4,), (4,)), ((7, 3), (4, 2), (4, 3)), ((7, 3), (4, 2), (4, 2, 1))],
)
def test_weighted_sum_names_the_shapes_that_disagree(
    values_shape: tuple[int, ...], slots_shape: tuple[int, ...], weights_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\(m, v\).*\(n, b\)") as raised:
        weighted_sum(torch.zeros(values_shape), torch.zeros(slots_shape, dtype=torch.int64), torch.zeros(weights_shape))
    assert all(str(shape) in str(raised.value) for shape in (values_shape, slots_shape, weights_shape))


@by_dtype
@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("slot", [-1, 7, 2**31, -(2**40)])
def test_weighted_sum_names_a_slot_outside_the_table(backend: str, slot: int, logged: bool, dtype: torch.dtype) -> None:
    values, slots, weights = bag_inputs(7, 3, 4, 2)
    slots[2, 1] = slot
    with pytest.raises(ValueError, match=rf"\b{slot}\b.*\[0, m = 7\)" if slot >= 0 else rf"{slot} .*m = 7\)"):
        weighted_sum(values.to(dtype), slots, weights, log=ReadLog(values) if logged else None, backend=backend)


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logged", [False, True])
def test_weighted_sum_refuses_slots_that_are_not_int64(
    backend: str, logged: bool, dtype: torch.dtype, slots_dtype: torch.dtype
) -> None:
    values, slots, weights = bag_inputs(2, 2, 2, 2)  # small enough for uint8 and bool slots to pass for a mask
    with pytest.raises(ValueError, match=f"slots are {slots_dtype} but must be torch.int64"):
        weighted_sum(
            values.to(dtype), slots.to(slots_dtype), weights, log=ReadLog(values) if logged else None, backend=backend
        )


@torch.no_grad()
def test_tensors_on_several_devices_are_named() -> None:
    query, sub_keys = topk_inputs(3, 2, 6, 5)
    values, slots, weights = bag_inputs(7, 3, 4, 2)
    for call, message in (
        (lambda: product_key_topk(query, sub_keys.to("meta"), 1), "query on cpu, sub_keys on meta"),
        (lambda: flat_topk(query, torch.zeros(2, 5, 6, device="meta"), 1), "query on cpu, keys on meta"),
        (lambda: weighted_sum(values, slots.to("meta"), weights), "values on cpu, slots on meta, weights on cpu"),
        (lambda: row_products(values.to("meta"), slots, torch.zeros(4, 3)), "table on meta, slots on cpu, x on cpu"),
    ):
        with pytest.raises(ValueError, match=f"all tensors must be on one device, not {message}: move them"):
            call()


def test_an_unknown_backend_is_named_with_those_there_are(backend: str) -> None:
    message = rf"'abacus' but must be one of .*\b{backend}\b"
    with pytest.raises(ValueError, match=message):
        choose_backend(torch.zeros(1, 1), "abacus")
    with pytest.raises(ValueError, match=message):
        product_key_topk(torch.zeros(1, 1, 2), torch.zeros(1, 2, 3, 1), 1, backend="abacus")
    with pytest.raises(ValueError, match=message):
        weighted_sum(torch.zeros(1, 1), torch.zeros(1, 1).long(), torch.zeros(1, 1), backend="abacus")


def test_prepare_compiles_what_a_step_on_the_cpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = pytest.importorskip("pkmem.ops.cpu")
    asked: list[tuple[torch.dtype, ...]] = []
    monkeypatch.setattr(cpu, "warmup", asked.append)
    for device, dtype in (("cpu", torch.bfloat16), ("cpu", torch.float64), ("cuda", torch.float32)):
        prepare(torch.device(device), dtype)
    assert asked == [(torch.bfloat16,)]


# --- row_products: the other side of weighted_sum ---------------------------------------------------------


def product_inputs(m: int, d: int, n: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    table, slots, _ = bag_inputs(m, d, n, b)
    return table, slots, torch.randn(n, d)


@given(sizes=bag_sizes)
@settings(max_examples=60, deadline=None)
def test_row_products_and_their_gradients_equal_the_oracle(backend: str, sizes: tuple[int, ...]) -> None:
    table, slots, x = product_inputs(*sizes)
    table, x = leaf(table.double()), leaf(x.double())
    products = row_products(table, slots, x, backend=backend)
    grad_output = torch.randn_like(products)
    grads = torch.autograd.grad(products, (table, x), grad_output)
    assert close(products, oracle.row_products(table, slots, x))
    truths = oracle.row_products_gradients(table, slots, x, grad_output)
    assert all(close(grad, truth) for grad, truth in zip(grads, truths, strict=True))


def test_row_products_compute_the_lines_of_their_docstring(backend: str) -> None:
    table, slots, x = product_inputs(13, 7, 9, 5)
    expected = (table.double()[slots] * x.double()[:, None]).sum(-1)
    computed = row_products(table.double(), slots, x.double(), backend=backend)
    torch.testing.assert_close(computed, expected, rtol=1e-12, atol=1e-12)


def product_errors(backend: str, table: Tensor, slots: Tensor, x: Tensor) -> list[float]:
    """Errors to fp64 truth of the products, d(table) and d(x)."""
    table, x = leaf(table), leaf(x)
    products = row_products(table, slots, x, backend=backend)
    grad_output = 0.01 * torch.randn(products.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(products, (table, x), grad_output)
    assert [products.dtype, *(grad.dtype for grad in grads)] == [torch.float32, table.dtype, x.dtype]
    truths = oracle.row_products_gradients(table, slots, x, grad_output)
    product_error = error(products, oracle.row_products(table, slots, x))
    return [product_error, error(grads[0], truths[0]), error(grads[1], truths[1])]


@by_dtype
@pytest.mark.parametrize(("name", "kind"), BAG_CASES)
def test_row_products_are_at_most_twice_as_wrong_as_the_reference(
    backend: str, name: str, kind: str, dtype: torch.dtype
) -> None:
    table, slots, x = product_inputs(*BAG_SIZES[name])
    table, x = (KINDS[kind](tensor) if kind else tensor for tensor in (table, x))
    table, x = table.to(dtype), x.to(dtype)
    if name == "ragged" and kind == "non-contiguous":
        slots = apart(slots)
    errors = product_errors(backend, table, slots, x)
    assert_at_most_twice_as_wrong(errors, product_errors("reference", table, slots, x))


@pytest.mark.parametrize("x_dtype", DTYPES)
@by_dtype
def test_hidden_states_may_have_another_dtype_than_the_rows(
    backend: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    table, slots, x = product_inputs(13, 7, 9, 5)
    assert max(product_errors(backend, table.to(dtype), slots, x.to(x_dtype))) < 0.02


def test_a_log_takes_the_gradient_of_the_rows(backend: str) -> None:
    table, slots, x = product_inputs(11, 6, 7, 4)
    table, x = leaf(table), leaf(x)
    log = ReadLog(table)
    grad_output = torch.randn(7, 4)
    row_products(table, slots, x, log=log, backend=backend).backward(grad_output)
    assert isinstance(table.grad, RowGradient)
    by_row = oracle.row_gradients([(slots, grad_output, x)])
    ((kept_slots, kept_weights, kept_x),) = log.entries
    assert all(torch.equal(*pair) for pair in ((kept_slots, slots), (kept_weights, grad_output), (kept_x, x)))
    dense = leaf(table)
    row_products(dense, slots, x, backend=backend).backward(grad_output)
    for row, gradient in by_row.items():
        assert close(dense.grad[row], gradient, 1e-5)


@pytest.mark.parametrize(
    ("table", "slots", "x"), [((5,), (2, 3), (2, 4)), ((5, 4), (2,), (2, 4)), ((5, 4), (2, 3), (3, 4)), ((5, 4), (2, 3), (2, 5))]
)  # fmt: skip
def test_row_products_name_the_shapes_that_disagree(table: tuple, slots: tuple, x: tuple) -> None:
    with pytest.raises(ValueError, match=r"table must be \(m, d\), slots \(n, b\) and x \(n, d\), not"):
        row_products(torch.zeros(table), torch.zeros(slots).long(), torch.zeros(x))


@pytest.mark.parametrize("logged", [False, True])
def test_row_products_name_slots_that_are_no_rows(backend: str, logged: bool) -> None:
    table, slots, x = product_inputs(7, 3, 4, 2)
    log = ReadLog(table) if logged else None
    with pytest.raises(ValueError, match=r"slots reach from 0 to 7: outside \[0, m = 7\)"):
        row_products(table, torch.tensor([[0, 7]] * 4), x, log=log, backend=backend)
    with pytest.raises(ValueError, match=r"slots are torch\.int32 but must be torch\.int64"):
        row_products(table, slots.int(), x, log=log, backend=backend)
    with pytest.raises(ValueError, match=r"the table is torch\.int64 but must be of a floating dtype"):
        row_products(table.long(), slots, x, log=log, backend=backend)
