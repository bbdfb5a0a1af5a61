"""The doctor's visit: describe the surroundings, examine every backend that can run here, say what to do, keep verdicts."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from pkmem.doctor import surroundings
from pkmem.doctor.examination import examine
from pkmem.doctor.findings import POINTS, Finding, Outcome
from pkmem.experiments.environment import environment
from pkmem.ops import verdict
from pkmem.ops.backends import why_no_verdict, why_not

_WORST_FIRST: tuple[Outcome, ...] = ("failed", "not checked", "passed", "does not apply")
_MEASURED = (10, 11)  # points whose notes say more than that a check passed
_SPEED = 11
_LONGEST_NOTE = 300
_REMEDIES = {
    "reference": "The reference is plain torch: install torch anew, and try the version before.",
    "cpu": "Install numba anew (pip install --force-reinstall numba) and remove the folders of kernels named above. Until "
    'the doctor finds nothing, set backend="reference", as in memory.backend = "reference".',
    "triton": "Nothing to do on your side: the reference goes on serving what failed. A newer driver, torch or Triton may "
    "mend it; run the doctor again after it.",
}


def visit(full: bool = False, device: str | None = None) -> bool:
    """Prints what pkmem runs on here and whether its backends are right, and keeps a verdict on each kind of GPU.

    A verdict counts from the next process on.

    Args:
        full: also tables past 2 ** 31 elements.
        device: the one to examine, such as "cpu" or "cuda:0"; None for all.

    Returns:
        Whether nothing is wrong. A backend that is slow is told of but not wrong: a race may be lost to another program.

    Raises:
        ValueError: torch does not see the device.
    """
    chosen = _chosen(device)
    print("pkmem doctor\n")
    print(*surroundings.describe(), sep="\n", flush=True)
    found: list[tuple[str, torch.device, list[Finding]]] = []
    for where in chosen:
        for backend in ("reference", "cpu" if where.type == "cpu" else "triton"):
            if why := surroundings.why_no_kernels_of_triton(where) if backend == "triton" else why_not(backend, where):
                print(f"\nThe backend {backend} on {where} is not checked: {why}")
                continue
            findings = _watched(backend, where, full)
            print(f"\nThe backend {backend} on {where}", *_table(findings), sep="\n", flush=True)
            found.append((backend, where, findings))
    if not torch.cuda.is_available():
        print(f"\nThe backend triton is not checked: {why_no_verdict() or _why_no_gpu()}")
    print(*_verdicts([(where, findings) for backend, where, findings in found if backend == "triton"]), sep="", end="")
    wrong, slow = (
        [backend for backend, _, findings in found if any(_failed(finding, is_slow) for finding in findings)]
        for is_slow in (False, True)
    )
    print("", *_summary(wrong, slow), sep="\n")
    return not wrong


def passed_in(findings: Iterable[Finding]) -> verdict.Passed:
    """The dtypes and classes of shapes that a backend was found right for.

    At least one check of just that dtype and class has to have passed, and none of them, or of those of no dtype, may have
    failed or be open. Huge tables are read by what the usual ones are read by.
    """
    found = {(finding.dtype, finding.shapes, finding.outcome) for finding in findings}
    passed = {
        (dtype, shapes)
        for dtype in verdict.DTYPES.values()
        for shapes in verdict.SHAPES
        if (dtype, shapes, "passed") in found
        and found.isdisjoint((of, shapes, bad) for of in (dtype, "") for bad in ("failed", "not checked"))
    }
    return frozenset((dtype, shapes) for dtype, shapes in passed if (dtype, "usual") in passed)


def _chosen(device: str | None) -> list[torch.device]:
    there = surroundings.devices()
    if device is None:
        return there
    try:
        asked = torch.device(device)
    except RuntimeError:
        asked = None
    if asked is not None and asked.type == "cuda" and asked.index is None:
        asked = torch.device("cuda", 0)
    if asked not in there:
        raise ValueError(f"device is {device!r} but must be one of {', '.join(map(str, there))}")
    return [asked]


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA and ROCm, and Triton's kernels are compiled for a GPU"
    return "torch sees no CUDA or ROCm device here, and Triton's kernels are compiled for a GPU"


def _watched(backend: str, device: torch.device, full: bool) -> list[Finding]:
    """All findings, with a count on a terminal while they come in."""
    checks = examine(backend, device, full)
    findings = list(tqdm(checks, f"{backend} on {device}", leave=False, unit=" checks", disable=None))
    return [replace(finding, note=_shortened(finding.note)) for finding in findings]


def _shortened(note: str) -> str:
    note = " ".join(note.split())
    return note if len(note) <= _LONGEST_NOTE else f"{note[:_LONGEST_NOTE]} ..."


def _table(findings: list[Finding]) -> Iterator[str]:
    """A line a point, with its worst outcome; below it what is not well, and what was measured."""
    for point, group in groupby(sorted(findings, key=_point_of), key=_point_of):
        some = list(group)
        worst = min((finding.outcome for finding in some), key=_WORST_FIRST.index)
        outcome = worst if worst != "failed" else "SLOW" if point == _SPEED else "FAILED"
        yield f"  {point:>2}  {outcome:<14} {POINTS[point]}{_count(some)}"
        told = ("failed", "not checked") if worst != "does not apply" else ("does not apply",)
        notes = [finding for finding in some if finding.outcome in told or (finding.note and point in _MEASURED)]
        yield from dict.fromkeys(_told(finding, notes) for finding in notes)


def _point_of(finding: Finding) -> int:
    return finding.point


def _count(findings: list[Finding]) -> str:
    apply = [finding.outcome for finding in findings if finding.outcome != "does not apply"]
    num_passed = apply.count("passed")
    if num_passed == len(apply):
        return f" ({num_passed} checks)" if apply else ""
    return f" ({num_passed} of {len(apply)} checks passed)"


def _told(finding: Finding, others: list[Finding]) -> str:
    """What was found, for all dtypes at once of which the same was found."""
    if finding.outcome == "does not apply":
        return f"        {finding.note}"
    dtypes = [other.dtype for other in others if other.dtype and replace(other, dtype=finding.dtype) == finding]
    return f"        {finding.outcome}: {finding.check}{' in ' if dtypes else ''}{', '.join(dtypes)}: {finding.note}"


def _verdicts(found: list[tuple[torch.device, list[Finding]]]) -> Iterator[str]:
    """Keeps a verdict on each kind of GPU: what passed on all that are alike."""
    subjects: list[tuple[dict[str, str], list[Finding], list[str]]] = []
    for device, findings in found:
        subject = verdict.subject_of(device)
        same = next((entry for entry in subjects if entry[0] == subject), None)
        if same is None:
            subjects.append((subject, list(findings), [str(device)]))
        else:
            same[1].extend(findings)
            same[2].append(str(device))
    for subject, findings, names in subjects:
        yield f"\nVerdict on {', '.join(names)} ({subject['gpu']}): {_kept(subject, findings)}\n"


def _kept(subject: dict[str, str], findings: list[Finding]) -> str:
    passed = passed_in(findings)
    text = f"the Triton kernels are right for {surroundings.in_words(passed)}." if passed else "no dtype passed."
    try:
        file = verdict.keep(subject, passed, _about(findings))
    except OSError as error:
        return f"{text} It could not be kept, so the reference stays the default: {error.strerror or error}"
    if not passed:
        return f"{text} The reference stays the default ({surroundings.short(file)})."
    return f'{text} From the next process on backend=None takes "triton" for it ({surroundings.short(file)}).'


def _about(findings: list[Finding]) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": environment()["commit"],
        "findings": [asdict(finding) for finding in findings],
    }


def _failed(finding: Finding, at_speed: bool) -> bool:
    return finding.outcome == "failed" and (finding.point == _SPEED) is at_speed


def _summary(wrong: list[str], slow: list[str]) -> Iterator[str]:
    if slow:
        yield f"Slower than the reference on some examples: {', '.join(dict.fromkeys(slow))}. That makes nothing wrong."
        yield "Run the doctor again while nothing else runs; if that does not help, report it with all of this text."
    if not wrong:
        yield "All that could be checked here is right."
        return
    yield f"Something failed: {', '.join(dict.fromkeys(wrong))}."
    yield from (_REMEDIES[backend] for backend in dict.fromkeys(wrong))
    yield "Please report it, with all of this text."
