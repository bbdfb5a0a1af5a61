"""The hint for huge pages changes no number, and reaches the kernel where there is one to take it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer import huge_pages
from pkmem.layer.huge_pages import prefer_huge_pages
from pkmem.layer.values import ValueTable

_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping around an address."""
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    return flags


@pytest.mark.skipif(sys.platform != "linux" or not _MODES.exists(), reason="no transparent huge pages")
def test_tables_and_moments_ask_for_huge_pages() -> None:
    memory = ProductKeyMemory(MemoryConfig(dim=64, num_sub_keys=256, knn=8, query_dim=16))  # 8 MB in bf16
    optimizer = RowAdam(memory)
    memory(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    moments = optimizer.state[memory.values.weight]
    for tensor in (memory.values.weight, moments["exp_avg"], moments["exp_avg_sq"]):
        assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes // 2)
    memory.to(torch.bfloat16)
    assert "hg" in flags_at(memory.values.weight.data_ptr() + memory.values.weight.nbytes // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_a_table_is_converted_as_torch_does_part_by_part(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_PART", 3000)  # 11 rows of fp32, and a rest
    table = ValueTable(10_007, 64)
    before = table.weight.detach().clone()
    table.weight.grad = torch.ones_like(before)
    assert table.to(dtype) is table
    assert isinstance(table.weight, torch.nn.Parameter)
    assert table.weight.requires_grad
    assert table.weight.grad.dtype is dtype
    assert table.weight.equal(before.to(dtype))


def test_what_makes_no_new_numbers_keeps_the_tables_memory() -> None:
    table = ValueTable(10_007, 64)
    address = table.weight.data_ptr()
    assert table.to(torch.float32).weight.data_ptr() == address
    shared = table.share_memory()
    assert shared.weight.is_shared()
    assert table.to("meta").weight.is_meta
    assert table.to_empty(device="cpu").weight.shape == (10_007, 64)


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 20) + 3])
def test_returns_the_tensor_as_it_was(size: int) -> None:
    tensor = torch.arange(size)
    assert prefer_huge_pages(tensor) is tensor
    assert tensor.equal(torch.arange(size))


def test_leaves_tensors_without_memory_alone() -> None:
    prefer_huge_pages(torch.empty(1 << 20, device="meta"))
    with FakeTensorMode():
        prefer_huge_pages(torch.empty(1 << 20))
