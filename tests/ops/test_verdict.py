"""Stored verdicts: what they hold for, what is no verdict, and which backend a GPU gets by them. The GPUs are made up."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pkmem.ops import backends, choose_backend, product_key_topk, verdict, weighted_sum
from pkmem.ops.user_cache import user_cache
from pkmem.ops.verdict import HUGE_ELEMENTS, keep, stored, subject_of

GPU = {
    "gpu": "NVIDIA Made-up 100",
    "capability": "9.0",
    "driver": "535.1",
    "torch": "2.13.0+cu130",
    "triton": "3.7.1",
    "pkmem": "0.1.0",
    "sources": "0123456789abcdef",
}
BF16 = frozenset({("bf16", "usual")})
ALL = frozenset((dtype, shapes) for dtype in verdict.DTYPES.values() for shapes in verdict.SHAPES)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pkmem" / "verdicts"


# The file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", [frozenset(), BF16, ALL])
def test_a_verdict_that_was_kept_is_found(passed: verdict.Passed, folder: Path) -> None:
    assert stored(GPU) is None
    file = keep(GPU, passed, {"date": "today", "findings": [{"note": "\u00fc"}]})
    assert stored(GPU) == passed
    assert list(folder.iterdir()) == [file]
    assert json.loads(file.read_text(encoding="utf-8"))["date"] == "today"


def test_the_last_verdict_counts() -> None:
    keep(GPU, ALL, {})
    keep(GPU, BF16, {})
    assert stored(GPU) == BF16


@pytest.mark.parametrize("what", GPU)
def test_with_anything_else_about_the_device_there_is_no_verdict(what: str) -> None:
    keep(GPU, ALL, {})
    assert stored({**GPU, what: "another"}) is None


@pytest.mark.parametrize("what", GPU)
def test_a_verdict_renamed_to_another_subject_is_none(what: str, folder: Path) -> None:
    file, other = keep(GPU, ALL, {}), {**GPU, what: "another"}
    file.rename(keep(other, ALL, {}))
    assert stored(other) is None


def _changed(**changes: Any) -> bytes:
    return json.dumps({"subject": GPU, "passed": [["bf16", "usual"]], **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7" * 5000,
        b"[" * 100_000,
        _changed()[:-1],
        _changed(passed=None),
        _changed(passed={"bf16": "usual"}),
        _changed(passed=["bf16"]),
        _changed(passed=[["bf16", "usual"], ["bf16"]]),
        _changed(passed=[["bf16", 1]]),
        _changed(passed=[["bf16", "all"]]),
        _changed(passed=[["fp64", "usual"]]),
        _changed(passed=[["bf16", ["usual"]]]),
        _changed(subject=None),
        _changed(subject={}),
        _changed(about="x" * (1 << 20)),
    ],
)
def test_what_is_not_whole_or_of_other_types_or_too_large_is_no_verdict(content: bytes) -> None:
    file = keep(GPU, ALL, {})
    file.write_bytes(_changed())
    assert stored(GPU) == BF16
    file.write_bytes(content)
    assert stored(GPU) is None


@pytest.mark.linux
def test_a_link_a_folder_and_a_pipe_are_no_verdict(tmp_path: Path) -> None:
    file = keep(GPU, ALL, {})
    elsewhere = file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(elsewhere)
    assert stored(GPU) is None
    file.unlink()
    file.mkdir()
    assert stored(GPU) is None
    file.rmdir()
    os.mkfifo(file)  # whoever opens it for reading would wait for a writer
    assert stored(GPU) is None


def test_a_text_too_long_to_be_read_again_is_left_out() -> None:
    keep(GPU, BF16, {"findings": "x" * (1 << 20)})
    assert stored(GPU) == BF16


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system_and_no_verdict(folder: Path) -> None:
    folder.parent.write_text("a file stands in its place", encoding="utf-8")
    with pytest.raises(NotADirectoryError):
        keep(GPU, ALL, {})
    assert stored(GPU) is None


def test_a_disk_that_fills_leaves_the_last_verdict_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = keep(GPU, BF16, {})

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        keep(GPU, ALL, {})
    assert stored(GPU) == BF16
    assert list(folder.iterdir()) == [file]


def test_without_a_home_nothing_is_kept_and_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache("verdicts") is None
    with pytest.raises(FileNotFoundError, match="set XDG_CACHE_HOME"):
        keep(GPU, ALL, {})
    assert stored(GPU) is None


WRITER = """
import json, sys
from pkmem.ops.verdict import keep, stored
subject, passed = json.loads(sys.argv[1]), [tuple(pair) for pair in json.loads(sys.argv[2])]
seen = set()
for _ in range(50):
    keep(subject, passed, {"findings": ["x" * 5000]})
    seen.add(stored(subject) is None)
print(*seen)
"""


def test_two_processes_that_write_at_once_leave_a_whole_verdict_at_any_time(folder: Path) -> None:
    commands = [[sys.executable, "-c", WRITER, json.dumps(GPU), json.dumps(sorted(passed))] for passed in (BF16, ALL)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [writer.communicate()[0].strip() for writer in writers] == ["False", "False"]
    assert stored(GPU) in (BF16, ALL)
    assert len(list(folder.iterdir())) == 1


# Its subject ---------------------------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of the GPU, to be changed."""
    properties = SimpleNamespace(name="NVIDIA Made-up 100", major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_the_subject_is_of_words_and_names_the_device(described: SimpleNamespace) -> None:
    subject = subject_of(torch.device("cuda", 0))
    assert set(subject) == set(GPU)
    assert all(isinstance(text, str) and text for text in subject.values())
    assert (subject["gpu"], subject["capability"]) == ("NVIDIA Made-up 100", "8.6")
    assert subject["torch"] == torch.__version__


def test_on_rocm_the_architecture_counts(described: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    described.gcnArchName = "gfx942:sramecc+:xnack-"
    assert subject_of(torch.device("cuda", 0))["capability"] == "gfx942:sramecc+:xnack-"


def test_the_driver_is_read_as_text(
    described: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tmp_path / "nvidia", tmp_path / "amdgpu"
    monkeypatch.setattr(verdict, "_DRIVERS", files)
    assert subject_of(torch.device("cuda", 0))["driver"] == "unknown"
    files[0].write_bytes(b"")
    files[1].write_text("6.12.12\n", encoding="utf-8")
    assert subject_of(torch.device("cuda", 0))["driver"] == "6.12.12"
    files[0].write_text("NVRM version:  NVIDIA  535.1\nGCC version: 12\n", encoding="utf-8")
    assert subject_of(torch.device("cuda", 0))["driver"] == "NVRM version: NVIDIA 535.1"


@pytest.mark.parametrize("edited", ["reading_log.py", "reference/bag.py", "triton/bag.py"])
def test_an_edited_source_is_another_subject(edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reading_log.py", "reference/bag.py", "triton/bag.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one = 1", encoding="utf-8")
    monkeypatch.setattr(verdict, "_OPS", tmp_path)
    digest = verdict._digest_of_sources.__wrapped__
    before = digest()
    assert digest() == before
    (tmp_path / edited).write_text("one = 2", encoding="utf-8")
    assert digest() != before


# The choice ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A made-up GPU on which the kernels could run."""
    subject = dict(GPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(verdict, "subject_of", lambda device: subject)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "why_not", lambda backend, device: None)
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    _next_process()
    yield subject
    monkeypatch.undo()
    _next_process()


def _next_process() -> None:
    verdict._passed_on.cache_clear()
    backends._fastest_on_gpu.cache_clear()
    backends._ADVISED.clear()


def _on_gpu(dtype: torch.dtype = torch.bfloat16, num_rows: int = 10, kind: str = "cuda") -> Any:
    """What a choice reads of a tensor there, of which this machine can make none."""
    return SimpleNamespace(is_cpu=False, device=torch.device(kind, 0), dtype=dtype, numel=lambda: num_rows)


def _chosen() -> dict[tuple[str, str], str]:
    return {
        (name, shapes): choose_backend(_on_gpu(dtype, HUGE_ELEMENTS + (shapes == "huge")))
        for dtype, name in verdict.DTYPES.items()
        for shapes in verdict.SHAPES
    }


@pytest.mark.parametrize("passed", [frozenset(), BF16, ALL, frozenset({("fp16", "usual"), ("fp16", "huge")})])
def test_triton_serves_exactly_what_passed(passed: verdict.Passed, gpu: dict[str, str]) -> None:
    keep(gpu, passed, {})
    assert {pair for pair, backend in _chosen().items() if backend == "triton"} == passed
    assert choose_backend(_on_gpu(torch.float64)) == "reference"
    assert choose_backend(_on_gpu(torch.int64)) == "reference"


@pytest.mark.parametrize(
    ("sub_keys", "query", "backend"),
    [
        (torch.bfloat16, torch.bfloat16, "triton"),
        (torch.float32, torch.bfloat16, "reference"),
        (torch.bfloat16, torch.float32, "reference"),
        (torch.bfloat16, torch.float64, "reference"),
    ],
)
def test_a_selection_is_of_the_dtype_that_both_promote_to(
    sub_keys: torch.dtype, query: torch.dtype, backend: str, gpu: dict[str, str]
) -> None:
    keep(gpu, BF16, {})
    assert choose_backend(_on_gpu(sub_keys), query=_on_gpu(query)) == backend


@pytest.mark.parametrize("what", GPU)
def test_what_changes_on_the_machine_puts_the_reference_back(what: str, gpu: dict[str, str]) -> None:
    keep(gpu, ALL, {})
    assert choose_backend(_on_gpu()) == "triton"
    gpu[what] = "another"
    _next_process()
    assert choose_backend(_on_gpu()) == "reference"


def test_a_verdict_counts_from_the_next_process_on(gpu: dict[str, str]) -> None:
    assert choose_backend(_on_gpu()) == "reference"
    keep(gpu, ALL, {})
    assert choose_backend(_on_gpu()) == "reference"
    _next_process()
    assert choose_backend(_on_gpu()) == "triton"


@pytest.mark.filterwarnings("error")
def test_without_a_verdict_one_line_a_process_names_the_doctor(
    gpu: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert set(_chosen().values()) == {"reference"}
    assert [(record.name, record.levelno) for record in caplog.records] == [("pkmem", logging.WARNING)]
    assert caplog.messages == [
        "the slow reference runs on cuda:0, since `pkmem doctor` has not checked the Triton kernels there: "
        "it does, and switches them on"
    ]


def test_a_verdict_that_is_bad_for_a_dtype_is_told_of(gpu: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    keep(gpu, BF16, {})
    assert choose_backend(_on_gpu()) == "triton"
    assert choose_backend(_on_gpu(torch.float32)) == "reference"
    assert choose_backend(_on_gpu(num_rows=HUGE_ELEMENTS + 1)) == "reference"
    assert [message.split(":")[:2] for message in caplog.messages] == [
        ["the slow reference runs for fp32 on cuda", "0"]
    ]
    assert "`pkmem doctor` has not found the Triton kernels right for it" in caplog.text


def test_a_triton_that_cannot_be_imported_is_told_of(
    gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(gpu, ALL, {})
    monkeypatch.setattr(backends, "why_not", lambda backend, device: "it is broken")
    assert choose_backend(_on_gpu()) == "reference"
    assert caplog.messages == ["the slow reference runs on cuda:0, since Triton cannot be used: it is broken"]


@pytest.mark.parametrize("lacking", ["triton", "capability", "interpreter", "xpu", "fp64"])
def test_where_the_doctor_could_change_nothing_it_is_not_named(
    lacking: str, gpu: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table = _on_gpu()
    keep(gpu, ALL, {})
    match lacking:
        case "triton":
            monkeypatch.setattr(backends, "find_spec", lambda name: None)
        case "capability":
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        case "interpreter":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        case "xpu":
            table = _on_gpu(kind="xpu")
        case "fp64":
            table = _on_gpu(torch.float64)
    assert choose_backend(table) == "reference"
    assert caplog.messages == []


def test_what_is_asked_for_is_given_without_a_verdict(gpu: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert choose_backend(_on_gpu(), "triton") == "triton"
    assert caplog.messages == []


QUIET = """
import sys, torch, pkmem
from pkmem.ops import choose_backend, verdict, weighted_sum
def never(*_): raise AssertionError("a verdict was looked for")
verdict.stored = verdict.subject_of = never
weighted_sum(torch.ones(2, 2), torch.zeros(1, 1).long(), torch.ones(1, 1))
assert choose_backend(torch.ones(1, 1)) in ("cpu", "reference")
assert choose_backend(torch.ones(1, 1, device="meta")) == "reference"
assert "pkmem.ops.triton" not in sys.modules
"""


def test_for_tensors_on_the_cpu_nothing_is_looked_for_and_triton_is_not_imported() -> None:
    subprocess.run([sys.executable, "-c", QUIET], check=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_code_has_the_choice_as_a_constant(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(*of: object) -> str:
        asked.append(of)
        return backend

    choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
    monkeypatch.setattr(backends, "_fastest_on", choose)
    found = []

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(query: torch.Tensor, sub_keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores, slots = product_key_topk(query, sub_keys, 2)
        found.append(choose_backend(sub_keys))
        return weighted_sum(values, slots.flatten(1), scores.flatten(1))

    with torch.device("meta"):
        query, sub_keys = torch.empty(3, 1, 4, dtype=torch.bfloat16), torch.empty(1, 2, 4, 2)
        values = torch.empty(1 << 16, (1 << 15) + 1, dtype=torch.bfloat16)
        assert compiled(query, sub_keys, values).shape == (3, (1 << 15) + 1)
    assert found[:1] == [backend]
    assert {("meta", None, "fp32", "usual"), ("meta", None, "bf16", "huge")} == set(asked)


# Where Triton cannot be used -------------------------------------------------------------------------------------


WITHOUT_TRITON = """
import pathlib, sys
from pkmem.ops import backend_module
folder = pathlib.Path(sys.argv[1])
if sys.argv[2]:
    (folder / "triton.py").write_text(f"__version__ = '{sys.argv[2]}'", encoding="utf-8")
    sys.path.insert(0, str(folder))
else:
    sys.modules["triton"] = None
try:
    backend_module("triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("", "Triton is not installed: pip install triton"),
        ("2.0.0", "Triton 3.5 or newer is needed but 2.0.0 is installed: a newer torch brings it"),
    ],
)
def test_who_asks_for_triton_where_it_is_missing_or_old_is_told_what_to_install(
    version: str, why: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_TRITON, str(tmp_path), version]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == f"backend 'triton' cannot run: {why}\n"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_why_a_backend_cannot_run_on_a_device_is_said() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert backends.why_not("reference", gpu) is None
    assert backends.why_not("cpu", gpu) == "its kernels run on the CPU, not on cuda"
    assert "TRITON_INTERPRET" in str(backends.why_not("triton", cpu))
