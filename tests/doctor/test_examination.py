"""Every backend that runs on this machine passes its examination; and what an examination says of those that do not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from pkmem.doctor import examination
from pkmem.doctor.checks import Case, Check, DoesNotApply, NotChecked
from pkmem.doctor.examination import CHECKS, examine, findings_of
from pkmem.doctor.findings import POINTS, Finding
from pkmem.doctor.sizes import INTERPRETED, ON_A_CPU, ON_A_GPU, sizes_for

CPU = torch.device("cpu")
SPEED = 11  # is no matter of right or wrong, and other tests run beside this one


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """A kernel that leaves some of its output unwritten cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_sound_backend_passes(backend) -> None:
    checks = tuple(check for check in CHECKS if check.point != SPEED)
    findings = list(findings_of(checks, backend, CPU, ON_A_CPU, full=True))
    assert [finding for finding in findings if finding.outcome not in ("passed", "does not apply")] == []
    assert {finding.point for finding in findings if finding.outcome == "passed"} >= {1, 2, 3, 4, 5, 6, 7, 8}


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_interpreted_kernels_pass_and_a_wait_in_them_is_found(tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    sound, waiting = json.loads(finished.stdout.splitlines()[-1])
    assert [finding for finding in sound if finding["outcome"] not in ("passed", "does not apply")] == []
    assert {finding["point"] for finding in sound if finding["outcome"] == "passed"} == set(range(1, 10))
    assert len(sound) == sum(len(check.dtypes) for check in for_the_interpreter())
    (found,) = waiting
    assert found["outcome"] == "failed"
    assert "_local_scalar_dense" in found["note"]


def for_the_interpreter() -> tuple[Check, ...]:
    """Every check: of every dtype where a kernel narrows sums, of two where it rounds by key; else of one, in turns."""
    in_turns, checks = 0, []
    for check in CHECKS:
        if check.point == 7:
            check = replace(check, dtypes=tuple(dtype for dtype in check.dtypes if dtype != "fp16"))
        elif check.point != 6:
            check, in_turns = replace(check, dtypes=(check.dtypes[in_turns % len(check.dtypes)],)), in_turns + 1
        checks.append(check)
    return tuple(checks)


def examine_interpreted() -> tuple[list[Finding], list[Finding]]:
    """Of the kernels in Triton's interpreter: what all checks find, and what is found where one of them waits."""
    from pkmem.doctor import waiting
    from pkmem.ops import triton as backend

    torch.use_deterministic_algorithms(True)
    sound = list(findings_of(for_the_interpreter(), "triton", CPU, INTERPRETED, full=True))
    weighted_sum = backend.weighted_sum
    backend.weighted_sum = lambda values, slots, weights: weighted_sum(values, slots + 0 * slots.max().item(), weights)
    check = replace(waiting.waits, dtypes=("fp32",))
    return sound, list(findings_of((check,), "triton", CPU, INTERPRETED, full=True))


def test_every_point_has_checks_and_every_check_its_name() -> None:
    assert {check.point for check in CHECKS} == set(POINTS)
    assert len({(check.point, check.what) for check in CHECKS}) == len(CHECKS)
    assert {check.shapes for check in CHECKS if check.point == 8} == {"huge"}


def test_a_device_has_the_sizes_that_it_can_do() -> None:
    assert sizes_for("triton", torch.device("cuda")) is sizes_for("reference", torch.device("cuda", 1)) is ON_A_GPU
    assert sizes_for("reference", CPU) is sizes_for("cpu", CPU) is ON_A_CPU
    assert sizes_for("triton", CPU) is INTERPRETED


def raising(error: BaseException, dtypes: tuple[str, ...] = ("",)) -> Check:
    def examine_it(case: Case) -> None:
        raise error

    return Check(examine_it, 3, "a check", dtypes)


@pytest.mark.parametrize(
    ("error", "outcome", "note"),
    [
        (AssertionError("a slot is wrong:\n  17,\n not 18"), "failed", "a slot is wrong: 17, not 18"),
        (AssertionError(), "failed", "AssertionError: "),
        (RuntimeError("an illegal memory\naccess"), "failed", "RuntimeError: an illegal memory access"),
        (ImportError("no driver"), "failed", "ImportError: no driver"),
        (NotChecked("no room"), "not checked", "no room"),
        (DoesNotApply("one GPU alone"), "does not apply", "one GPU alone"),
        (torch.OutOfMemoryError("of 80 GB"), "not checked", "too little memory is free: OutOfMemoryError: of 80 GB"),
    ],
)
def test_whatever_a_check_raises_is_a_finding(error, outcome, note) -> None:
    checks = (raising(error, ("fp32", "bf16")), Check(lambda case: "seen", 4, "another", ("",)))
    first, second, third = findings_of(checks, "reference", CPU, ON_A_CPU, full=False)
    assert first == Finding(3, "a check", "fp32", "usual", outcome, note)
    assert second == replace(first, dtype="bf16")
    assert third == Finding(4, "another", "", "usual", "passed", "seen")


def test_whoever_stops_an_examination_is_obeyed() -> None:
    with pytest.raises(KeyboardInterrupt):
        list(findings_of((raising(KeyboardInterrupt()),), "reference", CPU, ON_A_CPU, full=False))


def test_a_finding_comes_as_soon_as_it_is_known(monkeypatch) -> None:
    seen: list[torch.dtype] = []
    check = Check(lambda case: seen.append(case.dtype), 1, "a check", ("fp16", "bf16"))
    monkeypatch.setattr(examination, "CHECKS", (check,))
    findings = examine("reference", CPU)
    assert (next(findings).dtype, seen) == ("fp16", [torch.float16])
    assert (next(findings).dtype, seen) == ("bf16", [torch.float16, torch.bfloat16])


def test_huge_tables_are_not_checked_unless_asked_for(monkeypatch) -> None:
    check = Check(lambda case: None, 8, "a check", ("bf16",), "huge")
    monkeypatch.setattr(examination, "CHECKS", (check,))
    (finding,) = examine("reference", CPU)
    assert (finding.outcome, finding.shapes) == ("not checked", "huge")
    (finding,) = examine("reference", CPU, full=True)
    assert (finding.outcome, finding.shapes) == ("passed", "huge")


def test_the_same_numbers_are_drawn_every_time_and_nobody_elses_change() -> None:
    drawn: list[torch.Tensor] = []
    check = Check(lambda case: drawn.append(torch.cat((case.normal(5), torch.rand(5)))), 1, "a check", ("fp32",))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for _ in range(2):
        list(findings_of((check,), "reference", CPU, ON_A_CPU, full=False))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3), expected)


if __name__ == "__main__":
    print(json.dumps([[finding.__dict__ for finding in part] for part in examine_interpreted()]))
