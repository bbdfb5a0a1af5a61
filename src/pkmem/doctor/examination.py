"""The examination of a backend on a device: every check, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pkmem.doctor import code, repeats, rows, selection, speed, tables, waiting
from pkmem.doctor.checks import DTYPES, Case, Check, DoesNotApply, NotChecked
from pkmem.doctor.findings import Finding, Outcome
from pkmem.doctor.sizes import Sizes, sizes_for

CHECKS: tuple[Check, ...] = tuple(
    check
    for part in (selection, tables, rows, repeats, waiting, code, speed)  # code looks at what all before it compiled
    for check in part.CHECKS
)


def examine(backend: str, device: torch.device, full: bool = False) -> Iterator[Finding]:
    """Whether a backend is right on a device, and no slower than the reference: the points of `findings.POINTS`.

    Args:
        backend: one of `pkmem.ops.BACKENDS`.
        device: where its tensors are; some checks use other devices of its kind too.
        full: also tables past 2 ** 31 elements, which take 13 GB of memory, in fp32 26.

    Yields:
        A finding per check and dtype, as soon as it is known. A check that raises is a finding too, whatever it raises.
    """
    yield from findings_of(CHECKS, backend, device, sizes_for(backend, device), full)


def findings_of(
    checks: tuple[Check, ...], backend: str, device: torch.device, sizes: Sizes, full: bool
) -> Iterator[Finding]:
    """The findings of some checks, with examples of these sizes."""
    for check in checks:
        for dtype in check.dtypes:
            outcome: Outcome
            if check.shapes == "huge" and not full:
                outcome, note = (
                    "not checked",
                    "takes 13 GB of memory, in fp32 26: asked for by a full examination alone",
                )
            else:
                outcome, note = _outcome(check, Case(backend, device, DTYPES.get(dtype, torch.float32), sizes))
            yield Finding(check.point, check.what, dtype, check.shapes, outcome, note)


def _outcome(check: Check, case: Case) -> tuple[Outcome, str]:
    try:
        with _seeded(case.device):
            return "passed", check.examine(case) or ""
    except NotChecked as reason:
        return "not checked", str(reason)
    except DoesNotApply as reason:
        return "does not apply", str(reason)
    except torch.OutOfMemoryError as error:
        return "not checked", f"too little memory is free: {_one_line(error)}"
    except Exception as error:  # a kernel that does not compile, a driver that is lost: whatever it is
        return "failed", _one_line(error)


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """What modules draw for their weights is the same in every examination, and is not missing to anybody else."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(0)
        yield


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if type(error) is AssertionError and text else f"{type(error).__name__}: {text}"
