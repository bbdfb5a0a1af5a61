"""The contract of a backend: every one has the protocol's functions, and keeps what the protocol promises beyond values."""

import inspect
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from pkmem.ops.backends import BACKENDS, Backend, backend_module

CONTRACT = {
    name: function for name, function in vars(Backend).items() if inspect.isfunction(function) and name[0] != "_"
}
NUMBERS = (torch.nan, -torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_the_functions_of_the_protocol_and_their_arguments(name: str) -> None:
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    module = backend_module(name)
    for function, promised in CONTRACT.items():
        _, *wanted = inspect.signature(promised).parameters.values()
        given = inspect.signature(getattr(module, function)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], function


def test_the_protocol_documents_every_function_of_the_contract() -> None:
    assert len(CONTRACT) == 11
    assert all(function.__doc__ for function in CONTRACT.values())


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_finite_stays_with_its_token_and_its_head(backend: str, number: float) -> None:
    module, query, sub_keys = backend_module(backend), torch.randn(9, 3, 8), torch.randn(3, 2, 12, 4)
    before = module.product_key_topk(query, sub_keys, 5)
    query[4, 1, 2] = number
    scores, slots = module.product_key_topk(query, sub_keys, 5)
    others = torch.ones(9, 3, dtype=torch.bool)
    others[4, 1] = False
    assert torch.equal(scores[others], before[0][others])
    assert torch.equal(slots[others], before[1][others])
    assert len(slots[4, 1].unique()) == 5
    assert 0 <= slots.min() <= slots.max() < 144


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_finite_stays_with_the_tokens_that_read_it(backend: str, number: float) -> None:
    module, values, weights = backend_module(backend), torch.randn(20, 6), torch.randn(7, 4)
    slots = torch.randint(1, 20, (7, 4))
    slots[3, 2] = 0
    x = torch.randn(7, 6)
    sums, products = module.weighted_sum(values, slots, weights), module.row_products(values, slots, x)
    values[0] = number
    readers = torch.arange(7) == 3
    assert torch.equal(module.weighted_sum(values, slots, weights)[~readers], sums[~readers])
    assert not module.weighted_sum(values, slots, weights)[readers].isfinite().any()
    assert torch.equal(module.row_products(values, slots, x)[slots != 0], products[slots != 0])


def test_segments_without_reads_change_nothing(backend: str) -> None:
    """As a backend leaves them that does not wait for its device: at the end, with rows that hold no meaning."""
    module = backend_module(backend)
    slots, weights, grad_output = torch.randint(9, (5, 3)), torch.randn(5, 3), torch.randn(5, 4)
    reads = module.sort_reads([slots], [weights], [grad_output], 9)
    longer = type(reads)(
        torch.cat((reads.rows, torch.full((3,), 7))),
        torch.cat((reads.offsets, reads.offsets[-1:].expand(3))),
        reads.tokens,
        reads.weights,
        reads.grad_output,
    )
    assert torch.equal(longer.without_empty().rows, reads.rows)
    assert torch.equal(longer.without_empty().offsets, reads.offsets)
    from pkmem.ops import reference

    for function in (reference.row_gradient_norm, reference.gradient_is_finite):
        assert torch.equal(function(longer), function(reads))
    assert torch.equal(reference.weighted_sum_grad_values(longer, 9), reference.weighted_sum_grad_values(reads, 9))


def test_without_numba_the_first_cpu_tensor_warns_and_the_import_does_not() -> None:
    script = """
import importlib.util, sys, warnings
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find_spec(name, *rest)
warnings.simplefilter("error")
import pkmem, torch
memory = pkmem.ProductKeyMemory(pkmem.MemoryConfig(dim=4, num_sub_keys=2, knn=1, query_dim=2))
assert pkmem.ops.choose_backend(torch.device("cuda")) == "reference"
warnings.simplefilter("default")
with warnings.catch_warnings(record=True) as caught:
    memory(torch.randn(3, 4))
    memory(torch.randn(3, 4))
assert [str(w.message) for w in caught] == ["numba is not installed, so the slow reference runs: pip install 'pkmem[cpu]'"]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
