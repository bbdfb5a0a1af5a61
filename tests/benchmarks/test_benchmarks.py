"""Every benchmark runs at tiny sizes and leaves its table, its figures and where they were measured."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
LINES = {
    "operators": ["selection, s 16: torch / ours", "bag, width 16: pure read / ours"],
    "packed_rows": ["64 slots x 24: fp32 / int8", "64 slots x 24: int4 / pure read of the same rows"],
    "mapped_tables": [
        "int8, 64 tokens: one fault after another / asked ahead",
        "fp32, 512 tokens: pages of 4096 bytes read for each distinct row, asked ahead",
        "mapped, warm: decode, ms a token",
    ],
    "decode": [
        "the demo's, 1 at once: in place of an MLP / no memory",
        "the demo's, 8 at once: beside an MLP / no memory",
    ],
    "layer_forward": ["width 16, s 16, 32 tokens: ours / floor"],
    "training_step": [
        "width 16, s 16, 32 tokens: SparseAdam / ours",
        "width 16, s 16, 32 tokens: ours / floor",
        "width 16, s 16, 32 tokens: ours with one second moment a row alone / its floor",
    ],
    "halves": [
        "width 16, s 16, 32 tokens: training step, fp32 / autocast",
        "width 16, s 16, 33 tokens: forward, fp32 / a bf16 table",
    ],
    "growth": ["256 slots: ours / floor", "s 32 over s 8: growth of ours / growth of the floor"],
    "peak_memory": ["width 16, s 16: pkmem: peak RSS, GB"],
    "demo_backends": ["demo's memory model, seconds of training: reference / numba kernels"],
    "model_step": [
        "16² slots: update of the values, % of a step without a memory",
        "16² slots: a step, freed memory given back to the system / kept, as `pkmem train` does",
    ],
    "plan_time": ["with a memory, width 16: planned / measured"],
    "billion": ["moments in bf16: loss, last 1 steps", "one second moment a row alone: peak RSS, GB"],
}
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "99999999999", "MALLOC_TOP_PAD_": "67108864"}
STARTS_AGAIN = "operators"  # the one that must set the variables itself
A_MINUTE_EACH = {
    "billion",
    "demo_backends",
    "mapped_tables",
    "model_step",
    "plan_time",
}  # several processes, each of which imports everything


def run(name: str, out: Path) -> subprocess.CompletedProcess:
    environ = {variable: value for variable, value in os.environ.items() if variable not in TUNED_MALLOC}
    if name != STARTS_AGAIN:
        environ |= TUNED_MALLOC
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", "--threads", "1", "--out", str(out)]
    return subprocess.run(command, env=environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in A_MINUTE_EACH else name for name in LINES]
)
def test_a_benchmark_runs_and_leaves_its_figures(name, tmp_path) -> None:
    finished = run(name, tmp_path)
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / f"{name}.md").read_text()
    assert table.strip() == finished.stdout.strip()
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["name"] == name
    assert document["smoke"] is True
    assert document["environment"]["versions"]["torch"]
    assert document["malloc"] == TUNED_MALLOC
    by_name = {line["what"]: line for line in document["lines"]}
    assert set(LINES[name]) <= set(by_name)
    for line in by_name.values():
        assert 0 <= line["low"] <= line["median"] <= line["high"]
    assert document["seconds_not_to_be_quoted"]
    assert (tmp_path / "growth.png").exists() == (name == "growth")


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_every_part_of_the_gpu_benchmark_runs_in_the_interpreter(tmp_path) -> None:
    finished = run("gpu", tmp_path)
    assert finished.returncode == 0, finished.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    ended = dict(note.split(": ", 1) for note in document["notes"] if ": " in note)
    assert {"checks", "bag", "selection", "training_step", "models"} <= set(ended)
    assert [f"{part}: {how}" for part, how in ended.items() if not how.startswith("ran, ")] == []
    figures = {line["what"]: line["median"] for line in document["lines"]}
    assert "bag: gathered rate over copy rate" in figures
    assert figures["checks: passed"] == 6  # two checks, three dtypes


def test_the_tables_of_the_results_are_those_of_their_figures(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import table

    documents = [json.loads(file.read_text()) for file in (FOLDER / "results").glob("*.json")]
    documents = [document for document in documents if "lines" in document]
    assert len(documents) > 6
    for document in documents:
        assert (FOLDER / "results" / f"{document['name']}.md").read_text() == table(document) + "\n"


def test_small_figures_keep_a_digit(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Ratio

    assert str(Ratio(2.0, 1.5, 3.0)) == "2.00 (1.50-3.00)"
    assert str(Ratio(0.004, 0.004, 0.004)) == "4.0e-03"


def test_a_wrong_result_is_not_timed(monkeypatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import check_same

    right = torch.randn(1000, 10)
    check_same("x", right + 1e-6, right)
    with pytest.raises(ArithmeticError, match="not worth timing"):
        check_same("x", right * 1.01, right)
    with pytest.raises(ArithmeticError, match="not worth timing"):
        check_same("x", right * float("nan"), right)


def test_contenders_take_turns_and_one_that_fails_is_named(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness

    monkeypatch.setattr(harness, "SECONDS_PER_SAMPLE", 0)
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("no such thing")

    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fail}
    timings = harness.interleave(contenders, 2)
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a"]  # a warm-up of two calls each, then the turns
    assert timings.failed == {"c": "RuntimeError: no such thing"}


def test_ratios_are_taken_within_a_turn(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Timings

    timings = Timings({"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 100.0]})
    assert (timings.ratio("slow", "fast").low, timings.ratio("slow", "fast").high) == (2, 2)
    assert timings.fastest(["slow", "fast", "absent"]) == "fast"
    total = timings.with_sum("both", {"slow": 2, "fast": 1})
    assert total.seconds["both"] == [5, 50, 500]
