"""The operators under torch.func, forward mode and second derivatives: as in a loop, as in fp64 without them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import oracle
from pkmem.ops import flat_topk, product_key_topk, row_products, weighted_sum

KIND = "Modules that others rewrite"
VMAP = "https://github.com/pytorch/pytorch/issues/86819"
TWICE = "https://github.com/NVlabs/tiny-cuda-nn/issues/131"

# Torch's own rules of forward mode are scripts.
of_forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")


def one_by_one(function: Callable[..., Tensor], in_dims: tuple[int | None, ...], *given: Tensor) -> Tensor:
    """What vmap means."""
    batch = next(tensor.shape[dim] for tensor, dim in zip(given, in_dims, strict=True) if dim is not None)
    return torch.stack(
        [
            function(
                *(
                    tensor if dim is None else tensor.select(dim, place)
                    for tensor, dim in zip(given, in_dims, strict=True)
                )
            )
            for place in range(batch)
        ]
    )


@pytest.mark.case(KIND, "`torch.vmap` over tokens, over memories, or over both", "works", VMAP)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("in_dims", [(0, None), (2, None), (None, 0), (None, 1), (1, 2)])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_vmap_of_the_selections_is_a_loop(backend: str, in_dims: tuple[int | None, ...], n: int, grad: bool) -> None:
    query, sub_keys, keys = torch.randn(n, 2, 6), torch.randn(2, 2, 5, 3), torch.randn(2, 7, 6)
    query_dim, keys_dim = in_dims
    if query_dim is not None:
        query = torch.randn(4, n, 2, 6).movedim(0, query_dim)
    if keys_dim is not None:
        sub_keys = torch.randn(4, 2, 2, 5, 3).movedim(0, keys_dim)
        keys = torch.randn(4, 2, 7, 6).movedim(0, keys_dim)
    with torch.set_grad_enabled(grad):
        for function, second in (
            (lambda query, keys: product_key_topk(query, keys, 3, backend=backend)[0], sub_keys),
            (lambda query, keys: product_key_topk(query, keys, 3, backend=backend)[1], sub_keys),
            (lambda query, keys: flat_topk(query, keys, 3, backend=backend), keys),
        ):
            batched = torch.vmap(function, in_dims)(query, second)
            torch.testing.assert_close(batched, one_by_one(function, in_dims, query, second))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 1, None), (None, None, 0), (1, 0, 2), (0, 0, 0)])
def test_vmap_of_the_reads_is_a_loop(backend: str, in_dims: tuple[int | None, ...]) -> None:
    def batch(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor[0] if dim is None else tensor.movedim(0, dim)

    for operator, third in ((weighted_sum, torch.randn(4, 3, 5)), (row_products, torch.randn(4, 3, 6))):
        given = torch.randn(4, 9, 6), torch.randint(9, (4, 3, 5)), third
        given = [batch(tensor, dim) for tensor, dim in zip(given, in_dims, strict=True)]

        def function(*given: Tensor, operator: Callable[..., Tensor] = operator) -> Tensor:
            return operator(*given, backend=backend)

        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(torch.vmap(function, in_dims)(*given), one_by_one(function, in_dims, *given))


def test_vmap_in_vmap(backend: str) -> None:
    query, sub_keys = torch.randn(3, 4, 5, 2, 6), torch.randn(4, 2, 2, 5, 3)
    function = torch.vmap(torch.vmap(lambda q, k: product_key_topk(q, k, 3, backend=backend)[1]), (0, None))
    expected = [[product_key_topk(query[i, j], sub_keys[j], 3)[1] for j in range(4)] for i in range(3)]
    assert function(query, sub_keys).equal(torch.stack([torch.stack(row) for row in expected]))


def test_slots_outside_the_table_are_refused_under_vmap(backend: str) -> None:
    values, weights = torch.randn(9, 6), torch.ones(4, 3, 1)
    for slot in (-1, 9):
        slots = torch.full((4, 3, 1), slot)
        with pytest.raises((IndexError, ValueError), match="range"):
            torch.vmap(lambda *read: weighted_sum(values, *read, backend=backend))(slots, weights)


@pytest.mark.case(
    KIND, "`torch.func.grad`, `vjp`, `jvp`, `jacrev`, `jacfwd` and `hessian`", "works: holds the rows that are read", ""
)
@pytest.mark.parametrize("grad", [True, False])
def test_gradients_of_torch_func_equal_the_oracle(backend: str, grad: bool) -> None:
    query, sub_keys = torch.randn(5, 2, 6).double(), torch.randn(2, 2, 5, 3).double()
    values, slots, weights, x = torch.randn(9, 4).double(), torch.randint(9, (5, 3)), torch.randn(5, 3).double(), None
    x = torch.randn(5, 4).double()
    with torch.set_grad_enabled(grad):
        scores, pull = torch.func.vjp(lambda *given: product_key_topk(*given, 3, backend=backend)[0], query, sub_keys)
        back = torch.randn_like(scores)
        chosen = oracle.product_key_topk(query, sub_keys, 3)
        assert np.allclose(scores, chosen[0], rtol=0, atol=1e-12)
        truth = oracle.product_key_topk_gradients(back, query, sub_keys, chosen[1])
        for ours, theirs in zip(pull(back), truth, strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-12)
        for operator, third, truth_of, gradients_of in (
            (weighted_sum, weights, oracle.weighted_sum, oracle.weighted_sum_gradients),
            (row_products, x, oracle.row_products, oracle.row_products_gradients),
        ):
            out, pull = torch.func.vjp(
                lambda table, third, operator=operator: operator(table, slots, third, backend=backend), values, third
            )
            assert np.allclose(out, truth_of(values, slots, third), rtol=0, atol=1e-12)
            back = torch.randn_like(out)
            for ours, theirs in zip(pull(back), gradients_of(values, slots, third, back), strict=True):
                assert np.allclose(ours, theirs, rtol=0, atol=1e-12)


def a_memory(backend: str) -> Callable[..., Tensor]:
    """A memory in three lines, as a layer would write it."""

    def read(query: Tensor, sub_keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
        scores, slots = product_key_topk(query, sub_keys, 3, backend=backend)
        slots, weights = slots.flatten(1), scores.softmax(-1).flatten(1)
        weights = weights * row_products(table, slots, query.flatten(1), backend=backend)
        return weighted_sum(values, slots, weights, backend=backend)

    return read


def leaves() -> list[Tensor]:
    shapes = (2, 2, 4), (2, 2, 4, 2), (16, 3), (16, 8)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.case(
    KIND, "a gradient penalty: `torch.autograd.grad(..., create_graph=True)`, then backward", "works", TWICE
)
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_second_derivatives_are_right(backend: str) -> None:
    assert torch.autograd.gradgradcheck(a_memory(backend), leaves(), fast_mode=True)


def test_second_derivatives_are_right_where_some_inputs_have_none(backend: str) -> None:
    for needs in range(4):
        inputs = [tensor.requires_grad_(place == needs) for place, tensor in enumerate(leaves())]
        assert torch.autograd.gradgradcheck(a_memory(backend), inputs, fast_mode=True)


@of_forward_mode
def test_torch_func_finds_the_same_second_derivatives(backend: str) -> None:
    inputs = leaves()
    read = a_memory(backend)
    grads = torch.autograd.grad(read(*inputs).square().sum(), inputs, create_graph=True)
    twice = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    def penalty(*inputs: Tensor) -> Tensor:
        grads = torch.func.grad(lambda *inputs: read(*inputs).square().sum(), (0, 1, 2, 3))(*inputs)
        return sum(grad.square().sum() for grad in grads)

    plain = [tensor.detach() for tensor in inputs]
    for ours, theirs in zip(torch.func.grad(penalty, (0, 1, 2, 3))(*plain), twice, strict=True):
        torch.testing.assert_close(ours, theirs)
    hessian = torch.func.hessian(lambda query: read(query, *plain[1:]).square().sum())(plain[0])
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda query: read(query, *plain[1:]).square().sum(), plain[0])
    )


@pytest.mark.case(
    KIND,
    "forward mode: `torch.autograd.forward_ad` and `torch.func.jvp`, with and without `no_grad`",
    "works",
    "https://github.com/flatironinstitute/pytorch-finufft/issues/110",
)
@of_forward_mode
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_tangents_are_those_of_reverse_mode(backend: str, grad: bool, frozen: bool) -> None:
    read, inputs = a_memory(backend), leaves()
    tangents = [torch.randn_like(tensor) for tensor in inputs]
    rows = torch.autograd.functional.jacobian(read, tuple(inputs))
    expected = sum((row * tangent).flatten(2).sum(-1) for row, tangent in zip(rows, tangents, strict=True))
    inputs = [tensor.detach().requires_grad_(not frozen) for tensor in inputs]
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            out = read(*map(forward_ad.make_dual, inputs, tangents))
            ours = forward_ad.unpack_dual(out).tangent
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.func.jvp(read, tuple(inputs), tuple(tangents))[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    """One of each 300 ones would be lost from a sum in bf16 or fp16 at 256 or 2,048."""
    ones = torch.ones(1, 2, 4096, dtype=dtype)
    table = torch.ones(4096, 4, dtype=dtype)
    slots, weights = torch.arange(4096).unsqueeze(0), torch.ones(1, 4096, dtype=dtype)

    def read(x: Tensor) -> tuple[Tensor, ...]:
        return (
            product_key_topk(ones[:, :1] * x, ones.view(2, 2, 1, 2048)[:1], 1, backend=backend)[0],
            weighted_sum(table * x, slots, weights, backend=backend),
            row_products(table.T * x, slots[:, :4], weights, backend=backend),
        )

    with torch.no_grad():
        for plain, transformed in zip(
            read(torch.ones((), dtype=dtype)), torch.vmap(read)(torch.ones(1, dtype=dtype)), strict=True
        ):
            assert plain.unique().tolist() == [4096.0]
            assert transformed[0].equal(plain)
            assert transformed.dtype is plain.dtype


@pytest.mark.case(
    KIND, "`torch.compile` around `torch.func.grad` or `vmap`, and `torch.func.grad` around it", "works", ""
)
def test_compiled_transforms() -> None:
    inputs = [tensor.detach() for tensor in leaves()]
    read = a_memory("reference")

    def loss(*inputs: Tensor) -> Tensor:
        return read(*inputs).square().sum()

    expected = torch.func.grad(loss, (0, 1, 2, 3))(*inputs)
    compiled = torch.compile(loss, backend="aot_eager")
    value = compiled(*inputs)
    for function in (
        torch.compile(torch.func.grad(loss, (0, 1, 2, 3)), backend="aot_eager"),
        torch.func.grad(compiled, (0, 1, 2, 3)),
    ):
        for ours, theirs in zip(function(*inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(compiled(*inputs), value)
