"""The doctor's text, exit code and verdicts. The GPUs, and most of the findings, are made up."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pkmem.cli import main
from pkmem.doctor import examination, report, surroundings
from pkmem.doctor.findings import Finding
from pkmem.doctor.report import passed_in, visit
from pkmem.ops import backends, reference, verdict
from pkmem.ops.verdict import DTYPES, SHAPES, stored

GPU = {"gpu": "Made-up 100", "capability": "9.0", "driver": "535.1", "torch": "2.13.0", "triton": "3.7.1"}
ALL = frozenset((dtype, shapes) for dtype in DTYPES.values() for shapes in SHAPES)
USUAL = frozenset((dtype, "usual") for dtype in DTYPES.values())


def finding(outcome: str = "passed", dtype: str = "bf16", shapes: str = "usual", point: int = 1) -> Finding:
    return Finding(point, "a check", dtype, shapes, outcome, "a note")  # type: ignore[arg-type]


EVERYTHING = [finding("passed", dtype, shapes) for dtype, shapes in sorted(ALL)]


# What passed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("findings", "passed"),
    [
        ([], frozenset()),  # what was not checked has not passed
        ([finding()], {("bf16", "usual")}),
        (EVERYTHING, ALL),
        ([*EVERYTHING, finding("does not apply", "")], ALL),
        ([*EVERYTHING, finding("failed")], ALL - {("bf16", "usual"), ("bf16", "huge")}),
        ([*EVERYTHING, finding("not checked")], ALL - {("bf16", "usual"), ("bf16", "huge")}),
        ([*EVERYTHING, finding("failed", "bf16", "huge")], ALL - {("bf16", "huge")}),
        ([*EVERYTHING, finding("not checked", "", "huge")], USUAL),
        ([*EVERYTHING, finding("failed", "")], frozenset()),
        ([finding("passed", "fp32", "huge")], frozenset()),
    ],
)
def test_a_dtype_passes_if_all_that_is_about_it_is_good(findings: list[Finding], passed: verdict.Passed) -> None:
    assert passed_in(findings) == passed


# A made-up machine ---------------------------------------------------------------------------------------------


Machine = Callable[..., list[tuple[str, str, bool]]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes up GPUs, by name, and the findings of each backend and device; returns the list of what is examined."""

    def make(*gpus: str, findings: dict[str, list[Finding]] | None = None) -> list[tuple[str, str, bool]]:
        examined: list[tuple[str, str, bool]] = []

        def examine(backend: str, device: torch.device, full: bool) -> Iterator[Finding]:
            examined.append((backend, str(device), full))
            by_name = findings or {}
            yield from by_name.get(f"{backend} {device}", by_name.get(backend, EVERYTHING))

        monkeypatch.setattr(report, "examine", examine)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpus[0])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(verdict, "subject_of", lambda device: {**GPU, "gpu": gpus[device.index]})
        return examined

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    monkeypatch.setattr(surroundings, "why_not", lambda backend, device: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return make


def test_every_backend_is_examined_where_it_runs(machine: Machine) -> None:
    examined = machine("A", "B")
    assert visit(full=True)
    where = [("reference", "cpu"), ("cpu", "cpu")]
    where += [(backend, f"cuda:{index}") for index in (0, 1) for backend in ("reference", "triton")]
    assert examined == [(backend, device, True) for backend, device in where]


@pytest.mark.parametrize(("device", "examined"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_one_device_may_be_asked_for(device: str, examined: str, machine: Machine) -> None:
    seen = machine("A", "B")
    assert visit(device=device)
    assert {where for _, where, _ in seen} == {examined}


@pytest.mark.parametrize("device", ["cuda:2", "tpu", "", "meta", "cpu:0"])
def test_a_device_that_is_not_there_is_the_users_error(
    device: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("A")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", device])
    assert stop.value.code == 2
    assert f"device is {device!r} but must be one of cpu, cuda:0" in capsys.readouterr().err


def test_what_passed_is_kept_for_each_kind_of_gpu(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [finding("failed", "fp16"), finding("not checked", "bf16", "huge", 8)]
    machine("A", "B", "A", findings={"triton cuda:2": bad})
    assert not visit()
    assert stored({**GPU, "gpu": "B"}) == ALL
    assert stored({**GPU, "gpu": "A"}) == {("fp32", "usual"), ("fp32", "huge"), ("bf16", "usual")}
    printed = capsys.readouterr().out
    assert (
        "Verdict on cuda:0, cuda:2 (A): the Triton kernels are right for bf16, fp32 (past 2^31 elements: fp32). "
        'From the next process on backend=None takes "triton" for it (' in printed
    )
    assert "cuda:0        A, capability 9.0, 70.0 of 80.0 GiB free, driver 535.1" in printed
    assert 'cuda:1        "reference": no verdict on the Triton kernels is stored' in printed
    assert visit(device="cuda:1")
    printed = capsys.readouterr().out
    assert 'cuda:1        "triton" for bf16, fp16, fp32 (past 2^31 elements: bf16, fp16, fp32), else' in printed


def test_kernels_that_fail_everywhere_leave_a_verdict_that_says_so(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine("A", findings={"triton": [finding("failed", "")]})
    assert not visit(device="cuda:0")
    assert stored({**GPU, "gpu": "A"}) == frozenset()
    assert "no dtype passed. The reference stays the default" in capsys.readouterr().out
    (file,) = (tmp_path / "pkmem" / "verdicts").iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["findings"][0]["note"] == "a note"


def test_a_verdict_that_cannot_be_kept_is_no_failure(
    machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "pkmem").write_text("a file stands in its place", encoding="utf-8")
    machine("A")
    assert visit(device="cuda:0")
    printed = capsys.readouterr().out
    assert "It could not be kept, so the reference stays the default: Not a directory" in printed
    assert "verdicts: CANNOT be written" in printed


@pytest.mark.parametrize("gpus", [(), ("A",)])
def test_the_interpreter_gets_no_verdict(
    gpus: tuple[str, ...], machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    examined = machine(*gpus)
    assert visit()
    assert "triton" not in {backend for backend, _, _ in examined}
    assert "is not checked: TRITON_INTERPRET is set, and what Triton's interpreter computes" in capsys.readouterr().out
    assert stored({**GPU, "gpu": "A"}) is None


def test_without_a_gpu_it_says_why_triton_is_not_checked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0", hip=None))
    assert visit()
    assert "The backend triton is not checked: torch sees no CUDA or ROCm device here" in capsys.readouterr().out


# The text ------------------------------------------------------------------------------------------------------


def test_a_point_has_a_line_and_what_is_not_well_is_below_it(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [
        finding("does not apply", point=9),
        finding("passed", point=2),
        finding("not checked", point=2),
        finding("failed", "fp32"),
        finding("failed", "fp16"),
        finding("passed"),
        finding("does not apply", "fp32"),
        Finding(11, "a race", "bf16", "usual", "passed", "half the time"),
        Finding(3, "much text", "", "usual", "failed", "x" * 1000 + "\n"),
    ]
    machine(findings={"reference": findings})
    assert not visit()
    lines = capsys.readouterr().out.splitlines()
    begin, end = (lines.index(f"The backend {name} on cpu") for name in ("reference", "cpu"))
    assert [line.split(":")[0] for line in lines[begin + 1 : end - 1] if line[:8].strip()] == [
        "   1  FAILED         integers with ties",
        "   2  not checked    random numbers",
        "   3  FAILED         ties beyond all room, crowded tokens, zeros of either sign, NaN, infinity",
        "   9  does not apply nothing waits for the device; capture and replay; torch.compile; every read is logged",
        "  11  passed         no slower than the reference (1 checks)",
    ]
    assert [line.strip() for line in lines[begin + 1 : end - 1] if not line[:8].strip()] == [
        "failed: a check in fp32, fp16: a note",
        "not checked: a check in bf16: a note",
        f"failed: much text: {'x' * 300} ...",
        "a note",
        "passed: a race in bf16: half the time",
    ]
    assert "bit for bit (1 of 3 checks passed)" in lines[begin + 1]


@pytest.mark.parametrize(
    ("backend", "what_to_do"),
    [("reference", "install torch anew"), ("cpu", "Install numba anew"), ("triton", "the reference goes on serving")],
)
def test_what_failed_has_a_remedy(
    backend: str, what_to_do: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("A", findings={f"{backend} {'cuda:0' if backend == 'triton' else 'cpu'}": [finding("failed")]})
    assert not visit()
    printed = capsys.readouterr().out
    assert f"Something failed: {backend}." in printed
    assert what_to_do in printed
    assert "Please report it, with all of this text." in printed


def test_a_slow_backend_is_told_of_but_not_wrong(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("A", findings={"triton": [*EVERYTHING, finding("failed", point=11)]})
    assert visit()
    printed = capsys.readouterr().out
    assert "Slower than the reference on some examples: triton" in printed
    assert "  11  SLOW           no slower than the reference (0 of 1 checks passed)" in printed
    assert stored({**GPU, "gpu": "A"}) == ALL - {("bf16", "usual"), ("bf16", "huge")}  # nor is it the default


@pytest.mark.parametrize(
    ("lost", "said"), [("/proc/meminfo", "free memory not known"), ("/proc/self/maps", "not known")]
)
def test_it_works_where_the_system_says_less(
    lost: str, said: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = Path.read_text
    machine()

    def without(path: Path, **options: str) -> str:
        if str(path) == lost:
            raise FileNotFoundError(lost)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", without)
    assert visit()
    assert said in capsys.readouterr().out


def test_no_path_names_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert surroundings.short(tmp_path / "a" / "b") == "~/a/b"
    assert surroundings.short(Path("/elsewhere")) == str(Path("/elsewhere"))


# The real thing ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a minute: tests/doctor/test_examination.py makes the same checks
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the Triton kernels are checked")
def test_the_doctor_finds_this_machine_well() -> None:
    said = subprocess.run([sys.executable, "-m", "pkmem", "doctor"], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
    assert "Traceback" not in said.stderr
    assert "The backend triton is not checked: " in said.stdout
    assert "All that could be checked here is right." in said.stdout
    for backend in ("reference", "cpu"):
        table = said.stdout.split(f"\nThe backend {backend} on cpu\n")[1].split("\n\n")[0]
        assert [point for point in range(1, 8) if f"\n   {point}  passed " not in f"\n{table}"] == []


@pytest.fixture
def only_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of one point alone, which take a second."""
    monkeypatch.setattr(examination, "CHECKS", tuple(check for check in examination.CHECKS if check.point == 2))


def _exit_code() -> object:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cpu"])
    return stop.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the Triton kernels are checked")
def test_a_sound_machine_without_a_gpu_ends_with_0(
    only_random_numbers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code() == 0
    printed = capsys.readouterr().out
    assert "The backend triton is not checked: " in printed
    assert printed.count("   2  passed         random numbers") == 2
    assert printed.endswith("All that could be checked here is right.\n")


def test_a_broken_kernel_is_named_and_ends_with_1(
    only_random_numbers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    product_key_topk = reference.product_key_topk

    def broken(query: torch.Tensor, sub_keys: torch.Tensor, knn: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, slots = product_key_topk(query, sub_keys, knn)
        return scores, slots.roll(1, 0)

    monkeypatch.setattr(reference, "product_key_topk", broken)
    assert _exit_code() == 1
    printed = capsys.readouterr().out
    assert "   2  FAILED         random numbers" in printed
    assert "Something failed: reference." in printed
