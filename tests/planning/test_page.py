"""Plans as people and programs read them, with what to change."""

import json
import re
from pathlib import Path

import pytest

from pkmem.cli import main
from pkmem.planning.page import planned
from pkmem.training.reading import read_recipe

LARGE = {  # a table of 128 billion parameters
    "model": {
        "num_layers": 3,
        "width": 1024,
        "num_heads": 16,
        "context_tokens": 512,
        "memory_layers": [2],
        "vocab_size": 60000,
    },
    "memory": {"num_sub_keys": 11_180, "query_dim": 512},
    "training": {"batch_tokens": 131_072, "precision": "bf16"},
}


def plan_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def small(*changes: str) -> list[str]:
    return ["model.num_layers=2", "model.width=64", "model.memory_layers=[1]", "memory.num_sub_keys=64", *changes]


def figures(text: str, title: str) -> list[float]:
    """The numbers below a title, the sum last."""
    lines = text.split(title)[1].splitlines()[1:]
    numbers = []
    for line in lines:
        numbers.append(float(line.split()[-1].replace(",", "")))
        if line.strip().startswith("sum"):
            return numbers
    raise AssertionError(text)


def test_the_tables_add_up(capsys) -> None:
    out = plan_of(capsys, *small(), "--processes", "16", "--device", "H100")
    titles = re.findall(r"^(\S.*?)  +(?:GB|MB|KB|ms)$", out, re.MULTILINE)
    assert len(titles) == 4
    for title in titles:
        *parts, total = figures(out, title)
        assert sum(parts) == pytest.approx(total, abs=0.01 * len(parts)), title
    assert out.startswith("16 processes on H100 in 2 hosts: 8 columns x 2 replicas, ddp.")
    assert "Bottleneck: " in out
    assert "To change: " in out


def test_json_has_the_same_in_bytes_and_seconds(capsys) -> None:
    document = json.loads(plan_of(capsys, *small(), "--device", "A100", "--json"))
    assert document["device"] == "A100"
    assert document["memory_bytes"]["values"] == 64 * 64**2 * 4
    assert document["device_bytes"] == 80e9
    assert document["fits"] is True
    assert document["recipe"]["memory"]["num_sub_keys"] == 64


def test_a_table_of_128_billion_parameters_on_64_gpus() -> None:
    plan, advice = planned(read_recipe(LARGE), 64, None, "H200")
    assert plan.table_params == 11_180**2 * 1024
    assert (plan.layout.hosts, plan.layout.columns, plan.layout.replicas) == (8, 8, 8)
    assert not plan.fits
    assert plan.memory["values"] == 11_180**2 * 1024 // 8 * 4
    found = re.match(r"training\.columns=(\d+) instead of 8 makes it fit", advice)
    assert found
    changed, _ = planned(read_recipe(LARGE, {"training.columns": int(found[1])}), 64, None, "H200")
    assert changed.fits


@pytest.mark.parametrize(
    ("changes", "processes", "device", "advice"),
    [
        (
            {"training.precision": "fp32", "memory.num_sub_keys": 512},
            8,
            "H100",
            r"training\.precision=bf16 instead of fp32",
        ),
        (
            {"memory.num_sub_keys": 4000, "training.batch_tokens": 8192},
            1,
            "H200",
            r"Values and moments in bf16 would halve those two and fit",
        ),
        ({"memory.num_sub_keys": 512}, 1, "H100", r"training\.micro_batches=\d+ instead of 1 makes it fit"),
    ],
)
def test_what_to_change(changes: dict, processes: int, device: str, advice: str) -> None:
    assert re.search(advice, planned(read_recipe(LARGE, changes), processes, None, device)[1])


def test_the_number_of_sub_keys_advised_fits() -> None:
    _, advice = planned(read_recipe(LARGE), 1, None, "H200")
    found = re.search(r"memory\.num_sub_keys=(\d+) fits", advice)
    assert found
    assert planned(read_recipe(LARGE, {"memory.num_sub_keys": int(found[1])}), 1, None, "H200")[0].fits


def test_a_device_of_ones_own(capsys, tmp_path: Path) -> None:
    figures = "memory_gb: 1e-3, memory_gb_per_s: 1, row_share: 1, tflops: {fp32: 1, bf16: 1}, link_gb_per_s: 1, network_gb_per_s: 1"
    (tmp_path / "mine.yaml").write_text(f"toy: {{{figures}}}")
    out = plan_of(capsys, *small(), "--device", "toy", "--devices", str(tmp_path / "mine.yaml"))
    assert "toy, does not fit" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "H20"], "no device 'H20': did you mean 'H200'?"),
        (
            ["--processes", "3", "--device", "H200"],
            "must be a multiple of context_tokens * micro_batches * 3 processes",
        ),
        (["--processes", "4", "--per_host", "3", "--device", "H200"], "processes of a host is 3 but must be a divisor"),
        (["--processes", "2", "training.columns=3", "--device", "H200"], "training.columns is 3 but must"),
        (["memory.kn=3"], "unknown option"),
    ],
)
def test_what_cannot_be_planned_says_why(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        plan_of(capsys, *small(), *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
