"""What is inside the Triton backend, without a GPU: what it makes of devices, and of a Triton that is not there."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


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
