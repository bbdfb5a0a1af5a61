"""The Triton kernels compiled for GPUs that are made up, and what the compiled code is checked for."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from packaging.version import Version

import targets
from pkmem import MemoryConfig
from pkmem.ops import packing
from pkmem.ops.arguments import AdamStep

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
TRITON_3_7 = Version(triton.__version__) >= Version("3.7")
KERNELS = {"_best_sub_keys", "_candidates", "_sort", "_best_pairs", "_sum_queries", "_sum_rows", "_dot_rows"}
KERNELS |= {"_sum_packed_rows", "_sum_pieces", "_write_gradients", "_sum_squares", "_adam"}
KERNELS |= {"_mean_squares", "_second_of_rows"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    )  # nothing runs that could read it


def select(dtype: torch.dtype, n: int, heads: int = 4, s: int = 1024, half: int = 256, knn: int = 32) -> None:
    from pkmem.ops import triton as backend

    query, sub_keys = torch.empty(n, heads, 2 * half, dtype=dtype), torch.empty(heads, 2, s, half, dtype=dtype)
    backend.product_key_topk(query, sub_keys, knn)


def read(dtype: torch.dtype, n: int, num_reads: int = 128, width: int = 1024) -> None:
    from pkmem.ops import triton as backend

    slots, weights = torch.zeros(n, num_reads, dtype=torch.int64), torch.empty(n, num_reads)
    backend.weighted_sum(torch.empty(9, width, dtype=dtype), slots, weights)
    for bits in packing.BITS:
        rows = torch.zeros(9, packing.row_bytes(width, bits), dtype=torch.uint8)
        backend.packed_sum(rows, slots, weights, width, bits)


def learn(
    dtype: torch.dtype, n: int, heads: int = 4, s: int = 1024, half: int = 256, knn: int = 32, width: int = 1024
) -> None:
    """What follows in a step of training."""
    from pkmem.ops import triton as backend

    query, sub_keys = torch.empty(n, heads, 2 * half, dtype=dtype), torch.empty(heads, 2, s, half, dtype=dtype)
    slots, scores = torch.zeros(n, heads, knn, dtype=torch.int64), torch.empty(n, heads, knn)
    backend.product_key_topk_backward(scores, query, sub_keys, slots)
    values, grad_output = torch.empty(9, width, dtype=dtype), torch.empty(n, width, dtype=dtype)
    backend.row_products(values, slots.flatten(1), grad_output)
    reads = backend.sort_reads([slots.flatten(1)], [scores.flatten(1)], [grad_output], 9)
    backend.weighted_sum_grad_values(reads, 9)
    backend.row_gradient_norm(reads)
    step = AdamStep(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, step=1, scale=1.0)
    backend.adam_rows(values, torch.empty(9, width), torch.empty(9, width), reads, step)
    for first in (None, torch.empty(9, width)):
        backend.adam_rows(values, first, torch.empty(9), reads, step)


def compiled_for(gpu: targets.GPU) -> set[str]:
    """Names of the kernels that were compiled, of which none may break a promise."""
    from pkmem.ops.triton import compiled_kernels
    from pkmem.ops.triton.code import complaints, facts_of

    facts = {title: facts_of(compiled) for title, compiled in compiled_kernels().items()}
    found = {title: complaints(fact, gpu.shared_bytes) for title, fact in facts.items()}
    if not TRITON_3_7:  # compilers before it spill a few bytes
        found = {title: [text for text in texts if not text.startswith("spills")] for title, texts in found.items()}
    assert not {title: texts for title, texts in found.items() if texts}
    return {fact.name for fact in facts.values()}


@pytest.mark.parametrize(
    "name",
    [name if name in ("sm_80", "sm_90") else pytest.param(name, marks=pytest.mark.slow) for name in targets.GPUS],
)
def test_the_kernels_of_a_bf16_training_step_break_no_promise(name) -> None:
    with targets.made_up(name) as gpu:
        select(BF16, 4096)
        read(BF16, 4096)
        learn(BF16, 4096)
        assert compiled_for(gpu) == KERNELS  # and so the fast selection is there


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.GPUS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_kernels_of_other_sizes_break_no_promise(name, dtype) -> None:
    for n, half, s, knn, width in ((4099, 64, 512, 8, 512), (1, 128, 1024, 32, 768), (20, 256, 1000, 32, 2048)):
        with targets.made_up(name) as gpu:
            select(dtype, n, 4, s, half, knn)
            read(dtype, n, 4 * knn, width)
            learn(dtype, n, 4, s, half, knn, width)
            compiled_for(gpu)


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.GPUS)
def test_sizes_that_nobody_has_compile(name) -> None:
    """Odd ones and, last, all ones, which Triton turns into constants."""
    for dtype, knn, n, width, s, half in (
        (BF16, 2, 300, 768, 200, 16),
        (FP16, 32, 9000, 16, 300, 200),
        (BF16, 9, 9000, 16, 300, 48),
        (FP32, 5, 3, 37, 70, 5),
        (FP16, 1, 1, 1, 1, 1),
    ):
        with targets.made_up(name):
            select(dtype, n, 1, s, half, knn)
            read(dtype, n, 9, width)
            learn(dtype, n, 1, s, half, knn, width)


def test_a_device_without_room_has_no_fast_selection() -> None:
    from pkmem.ops.triton import compiled_kernels, selection

    with targets.made_up("sm_80", shared_bytes=1024):
        assert selection._shape_of_bounding(torch.device("cpu"), BF16, 256, 16, 2, 16) is None
        assert not compiled_kernels()  # what did not fit is taken for no kernel of ours


def test_few_variants_are_compiled_for_all_numbers_of_tokens() -> None:
    """At the sizes of the default memory; launches are only looked at."""
    from pkmem.ops.triton import selection, selection_backward

    memory = MemoryConfig(dim=512)
    sizes = {"s": memory.num_sub_keys, "half": memory.query_dim // 2, "knn": memory.knn}
    some = (
        *range(1, 4),
        *(n + near for n in (16, 32, 64, 128, 512, 1024, 4096) for near in (-1, 0, 1)),
        100,
        3000,
        4099,
    )
    for dtype in (BF16, FP32):
        seen: dict[str, set[str]] = {}

        def see(*, key: str, fn: object, seen: dict[str, set[str]] = seen, **_: object) -> bool:
            seen.setdefault(fn.name, set()).add(key)
            return True  # compiles nothing, launches nothing

        of_selection, of_backward = (
            mock.patch.object(module, "first_that_fits", lambda *given: given[-1][0])
            for module in (selection, selection_backward)
        )
        hook = mock.patch.object(triton.knobs.runtime, "jit_cache_hook", see)
        with targets.made_up("sm_90"), of_selection, of_backward, hook:
            for n in (*range(1, 1100), *range(1100, 4096, 7), *range(4096, 4100)):
                select(dtype, n, **sizes)
                if n % 16 < 2 or n < 256:
                    read(dtype, n, width=memory.dim)
            for n in some:
                learn(dtype, n, **sizes, width=memory.dim)
        assert set(seen) == KERNELS - ({"_candidates"} if dtype == FP32 else set())
        assert {name: len(keys) for name, keys in seen.items() if len(keys) > 6} == {}


@triton.jit
def rounds_and_races(numbers, sums):  # type: ignore[no-untyped-def]
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    block = tl.load(numbers + places)
    tl.atomic_add(sums + places, tl.dot(block, block, input_precision="tf32"))


def test_what_breaks_a_promise_is_complained_about() -> None:
    from pkmem.ops.triton import kernels, selection
    from pkmem.ops.triton.code import complaints, facts_of

    for name in ("sm_80", "gfx942"):
        with targets.made_up(name) as gpu:
            found = complaints(facts_of(rounds_and_races.warmup(FP32, FP32, grid=(1,))), gpu.shared_bytes)
            assert [text.split()[0] for text in found] == ["rounds", "uses"]
    with targets.made_up("sm_80") as gpu:
        shape = {"KNN": 32, "PLACES": 64, "BLOCK": 4, "num_warps": 1, "maxnreg": 24}
        crowded = selection._sort.warmup(torch.int64, torch.int64, 8, 64, grid=(1,), **shape)
        facts = facts_of(crowded)
        assert facts.registers == 24
        assert complaints(facts, gpu.shared_bytes) == [f"spills {facts.spills} registers"]
        title = kernels.title(crowded)
        assert title == "_sort (KNN 32, PLACES 64, BLOCK 4; *i64:16, *i64:16, i32, i32:16; 1 warps, 3 stages)"
        assert list(kernels.compiled_kernels()) == [f"{title} on sm_80"]
    assert complaints(replace(facts, spills=None, shared_bytes=9), 8)[0].startswith("takes 9 bytes")
    assert complaints(replace(facts, spills=None, shared_bytes=8), 8) == []
