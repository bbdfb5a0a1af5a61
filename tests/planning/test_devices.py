"""The table of devices, and mistakes in another one."""

from pathlib import Path

import pytest
import torch

from pkmem.planning.devices import read_devices
from pkmem.planning.trace import Operation
from pkmem.planning.wire import Wire

MINE = """
H100: {memory_gb: 96, memory_gb_per_s: 4000, row_share: 0.5, tflops: {fp32: 1, bf16: 2}, link_gb_per_s: 3, network_gb_per_s: 4}
box: {memory_gb: 8, memory_gb_per_s: 100, row_share: 1, tflops: {fp32: 1, bf16: 2}, link_gb_per_s: 3, network_gb_per_s: 4}
"""


def test_the_devices_of_the_package() -> None:
    devices = read_devices()
    assert list(devices) == ["H100", "H200", "B200", "A100", "L40S", "RTX4090", "MI300X"]
    for device in devices.values():
        assert device.tflops["fp32"] < device.tflops["bf16"]
        assert device.network_gb_per_s <= device.link_gb_per_s < device.memory_gb_per_s


def test_a_file_adds_devices_and_replaces_some(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    devices = read_devices(tmp_path / "mine.yaml")
    assert devices["box"].memory_bytes == 8e9
    assert devices["H100"].memory_gb == 96
    assert devices["H200"] == read_devices()["H200"]


def test_an_operator_takes_what_its_products_and_its_bytes_take(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    h100 = read_devices(tmp_path / "mine.yaml")["H100"]
    whole = Operation("x", flops=2 * 10**12, num_bytes=4 * 10**12, row_bytes=4 * 10**12)
    half = Operation("x", 2 * 10**12, 0, 0, torch.bfloat16)
    assert h100.compute_seconds(whole) == 2 * h100.compute_seconds(half) == 2
    assert h100.memory_seconds(whole) == 1 + 2  # rows at half of the bandwidth
    assert h100.wire_seconds(Wire(3e9, 8e9)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (MINE.replace("memory_gb: 8", "memory: 8"), r"no figure of box 'memory': did you mean 'memory_gb'"),
        (MINE.replace("row_share: 1, ", ""), r"box.row_share is None but must be there"),
        (MINE.replace("row_share: 1,", "row_share: 2,"), r"row_share is 2 but must be in \(0, 1\]"),
        (MINE.replace("memory_gb: 8", "memory_gb: 0"), r"box.memory_gb is 0 but must be a number > 0"),
        (MINE.replace("memory_gb: 8", "memory_gb: much"), r"box.memory_gb is 'much' but must be a number > 0"),
        (MINE.replace("fp32: 1", "fp64: 1"), r"tflops is .* but must be numbers > 0 for fp32 and bf16"),
        ("box: 8", r"box is 8 but must be a mapping of memory_gb"),
        ("[1]", r"must be a mapping of names to devices"),
        ("a: b: c", r"is not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, wrong: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(wrong)
    with pytest.raises(ValueError, match=message):
        read_devices(tmp_path / "mine.yaml")
