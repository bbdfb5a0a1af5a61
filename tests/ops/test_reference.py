"""The reference where it runs on a GPU: few operators, little memory, full precision; counted on CPU tensors."""

import contextlib
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import meter
from pkmem import MemoryConfig
from pkmem.ops import precision, reference
from pkmem.ops.arguments import AdamStep
from pkmem.ops.backends import backend_module
from pkmem.ops.reference import bag, chunks, selection

A_PART = 64  # of the tokens, the chunks and the slots of a full size, so that the counts are those of it
SIZE = MemoryConfig(dim=1024, num_sub_keys=1024 // 8, heads=4, knn=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_takes_few_operators_and_little_memory(dtype: torch.dtype) -> None:
    figures = meter.of_a_training_step(SIZE, 16384 // A_PART, dtype, chunks.GPU_BYTES // A_PART)
    for part, most in (("forward", 300), ("backward", 500), ("RowAdam step", 2000)):
        assert 50 < figures[part].operators < most, part
        assert figures[part].peak_bytes * A_PART < 1 << 30, part
    assert figures["forward"].waits == figures["backward"].waits == 0


def test_chunks_change_no_slot_and_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randint(-2, 3, (23, 2, 8)).float()
    sub_keys, keys = torch.randint(-2, 3, (2, 2, 7, 4)).float(), torch.randint(-2, 3, (2, 30, 8)).float()
    values, slots = torch.randint(-2, 3, (49, 5)).bfloat16(), torch.randint(49, (23, 6))
    grad_scores = torch.randint(-2, 3, (23, 2, 3)).float()

    def everything() -> list[torch.Tensor]:
        scores, best = reference.product_key_topk(query, sub_keys, 3)
        grads = reference.product_key_topk_backward(grad_scores, query, sub_keys, best)
        sums = reference.weighted_sum(values, slots, slots.float())
        products = reference.row_products(values, slots, torch.ones(23, 5))
        return [scores, best, *grads, reference.flat_topk(query, keys, 4), sums, products]

    whole = everything()
    monkeypatch.setattr(chunks, "chunk_size", lambda *_: 5)
    assert all(torch.equal(*pair) for pair in zip(whole, everything(), strict=True))


def test_a_chunk_takes_a_share_of_the_devices_memory() -> None:
    properties = mock.Mock(total_memory=8 << 30)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        assert chunks.chunk_size(1 << 20, torch.device("cuda"), 1) == 256
        properties.total_memory = 80 << 30
        assert chunks.chunk_size(1 << 20, torch.device("cuda"), 1) == 768
    assert chunks.chunk_size(1 << 20, torch.device("xpu"), 1) == 192
    assert chunks.chunk_size(10, torch.device("cpu"), 1000) == 100
    assert chunks.chunk_size(1 << 40, torch.device("cpu"), 1000) == 1


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_run_in_full_precision_whatever_torch_allows(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen: list[tuple[str, bool]] = []

    def looking(product: Any) -> Any:
        def look(*args: Any, **kwargs: Any) -> Any:
            seen.append((settings[1].fp32_precision, torch.is_autocast_enabled("cpu")))
            return product(*args, **kwargs)

        return look

    for owner, name in ((torch, "bmm"), (torch.Tensor, "baddbmm_")):
        monkeypatch.setattr(owner, name, looking(getattr(owner, name)))
    query, sub_keys, table = torch.randn(9, 2, 8), torch.randn(2, 2, 7, 4), torch.randn(49, 5).bfloat16()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        outside = [setting.fp32_precision for setting in settings]
        assert outside[1] in ("tf32", "bf16")
        with torch.autocast("cpu", torch.bfloat16):
            scores, slots = reference.product_key_topk(query, sub_keys, 3)
            reference.product_key_topk_backward(scores, query, sub_keys, slots)
            reference.weighted_sum(table, slots[:, 0], scores[:, 0])
            reference.row_products(table, slots[:, 0], torch.randn(9, 5))
        assert len(seen) == 5
        assert set(seen) == {("ieee", False)}
        if find_spec("numba"):
            backend_module("cpu").product_key_topk(query, sub_keys, 3)
            backend_module("cpu").flat_topk(query, torch.randn(2, 30, 8), 3)
            assert [setting for setting, _ in seen[5:]] == ["ieee", "ieee"]
        with precision.full_precision(torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert [setting.fp32_precision for setting in settings] == outside
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_empty_segments_are_left_out_and_the_host_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sorted on a GPU, where the host does not know how many rows were read."""
    slots, weights, back = torch.randint(9, (5, 3)), torch.randn(5, 3), torch.randn(5, 4)
    trimmed = reference.sort_reads([slots], [weights], [back], 9)
    padded = type(trimmed)(
        torch.cat((trimmed.rows, torch.full((4,), 7))),
        torch.cat((trimmed.offsets, trimmed.offsets[-1:].expand(4))),
        *(getattr(trimmed, name) for name in ("tokens", "weights", "grad_output")),
    )
    update = AdamStep(lr=0.1, betas=(0.9, 0.98), eps=1e-8, step=1, scale=1.0)
    results = []
    looks = mock.Mock(side_effect=torch.Tensor.cpu)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: looks(tensor))
    for reads in (trimmed, padded):
        tables = [torch.ones(9, 4, dtype=torch.bfloat16), torch.zeros(9, 4), torch.zeros(9, 4)]
        reference.row_gradient_norm(reads)
        reference.adam_rows(*tables, reads, update)
        results.append(tables)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert looks.call_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_everything_is_made_where_the_tensors_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without numbers, whose operators refuse tensors of the CPU; the host's look is made up."""
    for part in (selection, bag):  # the device is unknown to autocast
        monkeypatch.setattr(part, "full_precision", lambda device: contextlib.nullcontext())

    def there(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, sub_keys, table = there(33, 2, 8), there(2, 2, 7, 4), there(49, 5)
    scores, slots = reference.product_key_topk(query, sub_keys, 3)
    grads = reference.product_key_topk_backward(scores, query, sub_keys, slots)
    flat, weights = slots.flatten(1), scores.softmax(-1).flatten(1)
    sums = reference.weighted_sum(table, flat, weights)
    found = [*grads, reference.flat_topk(query, there(2, 30, 8), 4), reference.row_products(table, flat, sums)]
    reads = reference.sort_reads([flat, flat], [weights, weights], [sums, sums], 49)
    reads.__dict__["host_offsets"] = np.arange(49)
    found += [reference.row_gradient_norm(reads), reference.weighted_sum_grad_values(reads, 49)]
    for scalar in (1.0, torch.ones((), dtype=torch.float64, device="meta")):
        update = AdamStep(lr=scalar, betas=(0.9, 0.98), eps=1e-8, step=scalar, scale=scalar, seed=3)
        reference.adam_rows(table, torch.empty_like(table), torch.empty_like(table), reads, update)
    assert {tensor.device.type for tensor in (scores, slots, sums, *found, reads.rows, reads.offsets)} == {"meta"}
