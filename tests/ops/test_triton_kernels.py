"""What is inside the Triton backend, without a GPU: kernels that are handed what should never be, and made-up devices.

The checks run in the interpreter, in a process of its own: `python tests/ops/test_triton_kernels.py` prints a JSON
object of what failed.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from interpreter import assert_none, failures_in, failures_of
from pkmem.ops import packing, reference
from pkmem.ops.arguments import AdamStep

CHECKS: dict[str, Callable[[Any], None]] = {}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check in the interpreter; takes the backend's module."""
    CHECKS[function.__name__] = function
    return function


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


# --- in the interpreter -----------------------------------------------------------------------------------


class MadeUpCandidates:
    """Stands for `_candidates`: launches it, then writes other candidates and counts over its own."""

    def __init__(self, kernel: Any, rewrite: Callable[[Tensor, Tensor], None]) -> None:
        self.kernel, self.rewrite = kernel, rewrite

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.kernel[grid](*arguments, **constants)
            counts = arguments[3]
            assert ((counts >= constants["KNN"]) & (counts <= constants["ROOM"])).all()  # or all is looked for again
            self.rewrite(arguments[2], arguments[3])

        return launch


def selected(backend: Any, rewrite: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and slots of the best 2 of 257 ** 2, from candidates as rewritten, and the true ones."""
    from pkmem.ops.triton import selection

    query, sub_keys = torch.randn(3, 1, 4).bfloat16(), torch.randn(1, 2, 257, 2).bfloat16()
    made_up = MadeUpCandidates(selection._candidates, rewrite)
    with mock.patch.multiple(selection, _FEWEST_PROGRAMS=1, _TOKENS=16, _candidates=made_up):
        found = backend.product_key_topk(query, sub_keys, 2)
    return *found, *reference.product_key_topk(query.float(), sub_keys.float(), 2)


@check
def candidates_too_few_or_too_many_are_looked_for_again(backend: Any) -> None:
    lowest = -(1 << 63)
    for count in (0, 1, 5):  # of 2 that are kept, with room for 4

        def rewrite(found: Tensor, counts: Tensor, count: int = count) -> None:
            counts[1, 1] = count
            found[1, 1] = lowest

        scores, slots, true_scores, true_slots = selected(backend, rewrite)
        assert torch.equal(slots, true_slots), count
        assert torch.equal(scores, true_scores), count


@check
def what_is_no_candidate_is_no_slot_outside_the_table(backend: Any) -> None:
    for left in (0, 1):  # whatever the count says

        def rewrite(found: Tensor, counts: Tensor, left: int = left) -> None:
            counts[2] = 2
            found[2, :, left:] = -(1 << 63)

        _, slots, _, true_slots = selected(backend, rewrite)
        assert ((slots >= 0) & (slots < 257**2)).all()
        assert torch.equal(slots[:2], true_slots[:2])


@check
def ranks_are_those_of_every_pair_that_can_win(backend: Any) -> None:
    import triton
    import triton.language as tl

    from pkmem.ops.triton import selection

    @triton.jit
    def write_ranks(
        first, second, real, ranks: tl.constexpr, knn: tl.constexpr, HOOKS: tl.constexpr, LANES: tl.constexpr
    ):  # type: ignore[no-untyped-def]
        lanes = tl.arange(0, LANES)
        rank1, rank2, is_pair = ranks(lanes, knn, HOOKS)
        tl.store(first + lanes, rank1)
        tl.store(second + lanes, rank2)
        tl.store(real + lanes, is_pair.to(tl.int32))

    for knn in range(1, 65):
        truth = {(i, j) for i in range(knn) for j in range(knn // (i + 1))}
        lanes = triton.next_power_of_2(len(truth) + 1)
        first, second, real = (torch.zeros(lanes, dtype=torch.int32) for _ in range(3))
        write_ranks[(1,)](first, second, real, selection._ranks, knn=knn, HOOKS=int(knn**0.5), LANES=lanes)
        pairs = list(zip(first[real == 1].tolist(), second[real == 1].tolist(), strict=True))
        assert len(pairs) == len(truth), knn
        assert set(pairs) == truth, knn


@check
def a_slot_outside_the_table_is_nan_where_it_was_read(backend: Any) -> None:
    values, weights, x = torch.randn(9, 5), torch.randn(4, 3), torch.randn(4, 5)
    slots = torch.randint(9, (4, 3))
    slots[1, 2], slots[2, 0], slots[2, 1] = 9, -1, 1 << 40
    outside = (slots < 0) | (slots >= 9)
    within = slots.masked_fill(outside, 0)
    sums, products = backend.weighted_sum(values, slots, weights), backend.row_products(values, slots, x)
    assert torch.equal(products.isnan(), outside)
    assert torch.equal(sums.isnan(), outside.any(1)[:, None].expand(4, 5))
    assert torch.equal(sums[[0, 3]], backend.weighted_sum(values, within, weights)[[0, 3]])
    assert torch.equal(products[~outside], backend.row_products(values, within, x)[~outside])
    assert backend.weighted_sum(values[:0], slots, weights).isnan().all()
    for bits in packing.BITS:
        rows = packing.pack_rows(values, bits)
        sums = backend.packed_sum(rows, slots, weights, 5, bits)
        assert torch.equal(sums.isnan(), outside.any(1)[:, None].expand(4, 5))
        assert torch.equal(sums[[0, 3]], backend.packed_sum(rows, within, weights, 5, bits)[[0, 3]])


@check
def a_row_outside_the_table_is_not_written(backend: Any) -> None:
    slots, weights, grad_output = torch.tensor([[2, 11, 4, -1]]), torch.ones(1, 4), torch.ones(1, 5)
    reads = backend.sort_reads([slots], [weights], [grad_output], 9)
    room = torch.zeros(3, 20, 5)  # rows beside the table, which begins at row 5
    tables = [part[5:14] for part in room]
    step = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "step": 1, "scale": 1.0}
    backend.adam_rows(*tables, reads, AdamStep(**step))
    assert all(part.any(1).nonzero().flatten().tolist() == [7, 9] for part in room)
    dense = backend.weighted_sum_grad_values(reads, 9)
    assert dense.any(1).nonzero().flatten().tolist() == [2, 4]


@check
def norms_of_the_largest_and_the_smallest_gradients_are_exact(backend: Any) -> None:
    for width in (1, 16, 37, 300):
        for scale in (1e30, 1.0, 1e-30, 1e-42):
            grad_output = torch.randn(40, width) * torch.logspace(-6, 6, width) * scale
            reads = backend.sort_reads([torch.arange(40)[:, None]], [torch.ones(40, 1)], [grad_output], 40)
            norm = backend.row_gradient_norm(reads).item()
            truth = grad_output.double().norm().item()
            assert abs(norm - truth) <= 2e-7 * truth, (width, scale, norm / truth)


@check
def no_tensor_is_kept_from_call_to_call(backend: Any) -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    before = alive()
    scores, slots = backend.product_key_topk(query := integers(3, 1, 4), keys := integers(1, 2, 9, 2), 6)
    backend.product_key_topk_backward(scores, query, keys, slots)
    values = integers(81, 3)
    backend.row_products(values, slots[:, 0], backend.weighted_sum(values, slots[:, 0], scores[:, 0]))
    backend.row_gradient_norm(backend.sort_reads([slots[:, 0]], [scores[:, 0]], [integers(3, 3)], 81))
    del scores, slots, query, keys, values
    assert alive() == before


# --- here -------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


@needs_triton
def test_kernels_interpreted_pass_every_check(tmp_path: Path) -> None:
    assert_none(failures_in(__file__, tmp_path))


@pytest.mark.parametrize(
    ("source", "found"), [("__version__ = '2.6.0'", "2.6.0"), ("raise ImportError('no such thing')", "no such thing")]
)
def test_a_triton_that_is_missing_or_too_old_is_named_with_the_least(source, found, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pkmem.ops import triton"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("ImportError: Triton 3.5 or newer is needed")
    assert found in last


def gpus(capability: tuple[int, int], hip: str | None = None) -> mock._patch:
    """A process that sees GPUs of this compute capability, or AMD's."""
    device = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda _: capability,
        "get_device_name": lambda _: "GPU of old",
    }
    return mock.patch.multiple(torch, cuda=SimpleNamespace(**device), version=SimpleNamespace(hip=hip))


@needs_triton
@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 5), None, "GPU of old has compute capability 7.5, below 8.0"),
        ((8, 0), None, None),
        ((12, 0), None, None),
        ((7, 5), "6.2", None),
    ],
)
def test_a_gpu_before_8_0_is_refused_with_a_reason(capability, hip, reason) -> None:
    from pkmem.ops.triton import device, why_not

    device._why_too_old.cache_clear()
    with gpus(capability, hip):
        found = [why_not(torch.device(name)) for name in ("cuda", "cuda:1")]
    device._why_too_old.cache_clear()
    assert all(why is None if reason is None else why.startswith(reason) for why in found)


@needs_triton
def test_devices_that_triton_does_not_know_are_refused() -> None:
    from pkmem.ops.triton import why_not

    assert "mps" in why_not(torch.device("mps"))
    assert "TRITON_INTERPRET" in why_not(torch.device("cpu"))


@needs_triton
@pytest.mark.parametrize(
    ("kind", "properties", "of_triton", "shared_bytes", "processors"),
    [
        (
            "cuda",
            {"shared_memory_per_block": 48, "shared_memory_per_block_optin": 227, "multi_processor_count": 132},
            {},
            227,
            132,
        ),
        ("cuda", {"shared_memory_per_block": 64, "multi_processor_count": 304}, {}, 64, 304),  # ROCm, by some torches
        ("xpu", {"gpu_subslice_count": 56}, {"max_shared_mem": 128}, 128, 56),
        ("xpu", {"max_compute_units": 448}, {}, 48 << 10, 448),
        ("xpu", {}, {"max_shared_mem": 128, "multiprocessor_count": 56}, 128, 56),
        ("xpu", {}, None, 48 << 10, 64),  # Triton's driver says nothing
    ],
)
def test_what_a_program_may_take_is_found_on_every_kind_of_gpu(
    kind, properties, of_triton, shared_bytes, processors
) -> None:
    from triton.runtime import driver

    from pkmem.ops.triton import device

    for cached in (device.shared_bytes, device.num_processors):
        cached.cache_clear()
    known = {} if of_triton is None else {"get_device_properties": lambda number: {**of_triton, "number": number}}
    driver.set_active(SimpleNamespace(utils=SimpleNamespace(**known)))
    try:
        gpu = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(**properties))
        with mock.patch.object(torch, kind, gpu):
            assert device.shared_bytes(torch.device(kind, 1)) == shared_bytes
            assert device.num_processors(torch.device(kind, 1)) == processors
    finally:
        driver.set_active(None)
        for cached in (device.shared_bytes, device.num_processors):
            cached.cache_clear()


@needs_triton
def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    from pkmem.ops.triton import device

    with mock.patch.object(torch, "xpu", mock.Mock()) as xpu, mock.patch.object(torch, "cuda", mock.Mock()) as cuda:
        for kind, module in (("xpu", xpu), ("cuda", cuda)):
            tensor = SimpleNamespace(device=torch.device(kind, 1))
            assert device.on(tensor) is module.device_of.return_value
            module.device_of.assert_called_once_with(tensor)


if __name__ == "__main__":
    print(json.dumps(failures_of(CHECKS)))
