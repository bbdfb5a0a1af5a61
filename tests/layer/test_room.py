"""What cannot fit is refused at once, with the bytes needed and the bytes there, and nothing is drawn."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

from pkmem import MemoryConfig, ProductKeyMemory
from pkmem.layer import room
from pkmem.layer.room import num_weights, require_room
from pkmem.layer.values import ValueTable

KIND = "Gradual surprises"
TINY = MemoryConfig(dim=6, num_sub_keys=4, heads=2, knn=3, query_dim=4)


@pytest.mark.parametrize(
    "options",
    [{}, {"query_hidden_dim": 5}, {"gate": True, "value_dim": 3}, {"keys": "flat"}, {"experts": True, "value_dim": 3}],
)
@pytest.mark.parametrize("share", [False, True])
def test_the_weights_are_counted_but_for_norms_and_biases(options, share) -> None:
    config = dataclasses.replace(TINY, **options)
    memory = ProductKeyMemory(config)
    weights = {name: p.numel() for name, p in memory.named_parameters() if "norm" not in name and "bias" not in name}
    if share:
        del weights["values.weight"]
    assert num_weights(config, shares_values=share) == sum(weights.values())


@pytest.mark.case(
    KIND,
    "A memory that no machine holds, such as num_sub_keys=300000",
    "refused: ValueError with the bytes needed and the bytes there, before anything is drawn",
    "",
)
@pytest.mark.parametrize(
    "options",
    [{"num_sub_keys": 300_000}, {"query_dim": 10**13}, {"num_sub_keys": 10**12}, {"query_hidden_dim": 10**13}],
)
def test_a_memory_that_cannot_fit_is_refused_before_anything_is_drawn(options) -> None:
    state = torch.get_rng_state()
    config = MemoryConfig(dim=1024, **options)
    with pytest.raises(ValueError, match="lower num_sub_keys, value_dim or the number of memories") as error:
        ProductKeyMemory(config)
    numbers = re.search(r"needs ([\d,]+) bytes but cpu has ([\d,]+)", str(error.value))
    needed, there = (int(number.replace(",", "")) for number in numbers.groups())
    assert needed == 4 * num_weights(config) > there
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_alone_is_refused_alike_and_a_shared_one_is_not_counted(monkeypatch) -> None:
    with pytest.raises(
        ValueError, match=r"^a table of 1,000,000,000,000 rows of 64,000,000,000,000 float32 numbers needs"
    ):
        ValueTable(10**12, 64)
    big = MemoryConfig(dim=6, num_sub_keys=64, heads=1, knn=3, query_dim=4)
    table = ValueTable(64**2, 6)
    monkeypatch.setattr(room, "bytes_of", lambda device: 64**2 * 6 * 4)
    ProductKeyMemory(big, values=table)
    with pytest.raises(ValueError, match="has 98,304"):
        ProductKeyMemory(big)


def test_the_dtype_counts_and_what_just_fits_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(room, "bytes_of", lambda device: 200)
    require_room("a table", 50)
    require_room("a table", 100, dtype=torch.bfloat16)
    for num_elements, dtype in ((51, None), (101, torch.float16), (26, torch.float64)):
        with pytest.raises(ValueError, match="but cpu has 200"):
            require_room("a table", num_elements, dtype=dtype)


@pytest.mark.case(KIND, "A memory of any size on the meta device", "works", "")
def test_the_meta_device_holds_what_no_machine_does() -> None:
    with torch.device("meta"):
        memory = ProductKeyMemory(MemoryConfig(dim=1024, num_sub_keys=300_000))
    assert memory.values.weight.shape == (90_000_000_000, 1024)
    with torch.device("meta"), pytest.raises(ValueError, match=f"meta has {sys.maxsize:,}"):
        ProductKeyMemory(MemoryConfig(dim=1024, num_sub_keys=10**11))


def groups(root: Path, text: str, limits: dict[str, str]) -> list[int]:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)
    for place, limit in limits.items():
        (root / "sys/fs/cgroup" / place).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / place).write_text(limit)
    return sorted(room._limits_of_container(root))


def test_a_containers_limit_counts_in_both_versions_of_control_groups(tmp_path) -> None:
    second = {"memory.max": "max\n", "a/memory.max": "4096\n", "a/b/memory.max": "8192\n"}
    assert groups(tmp_path / "2", "0::/a/b\n", second) == [4096, 8192]
    assert groups(tmp_path / "inside", "0::/\n", {"memory.max": "4096\n"}) == [4096]
    first = {"memory/memory.limit_in_bytes": "4096", "memory/docker/x/memory.limit_in_bytes": "512"}
    text = "5:cpu,memory:/docker/x\n4:cpu:/y\n0::/\n"
    assert groups(tmp_path / "1", text, first) == [512, 4096]
    assert groups(tmp_path / "none", "0::/\n", {}) == []
    assert list(room._limits_of_container(tmp_path / "no such system")) == []


def test_a_system_that_does_not_say_its_memory_is_asked_by_the_allocator(monkeypatch) -> None:
    monkeypatch.delattr("os.sysconf")
    monkeypatch.setattr(room, "_limits_of_container", lambda: iter(()))
    assert room.bytes_of(torch.device("cpu")) == sys.maxsize
