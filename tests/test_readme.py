"""The README's code runs as written, and what it calls equivalent is."""

import json
import re
from pathlib import Path

import pytest
import torch

import pkmem
from documents import ROOT, Block, blocks_of, check_command, commands_of, run
from pkmem.cli import VERBS
from pkmem.experiments.demo import FIGURES, labels

README = (ROOT / "README.md").read_text()
BLOCKS = [block for block in blocks_of(README) if block.language == "python"]


def test_the_lines_it_calls_equivalent_give_the_same_output() -> None:
    x = torch.randn(10, 64)
    one_line, many_lines = (block.code for block in BLOCKS[:2])
    found = {}
    exec(one_line.replace("pkmem.ProductKeyMemory", "build"), {"pkmem": pkmem, "x": x, "build": _keeping(found)})
    memory = found["memory"].eval()
    names = {
        "torch": torch,
        "x": x,
        "query_network": lambda x: memory.query(x).flatten(1),
        "heads": memory.config.heads,
        "knn": memory.config.knn,
        "sub_keys": memory.keys.sub_keys,
        "values": memory.values.weight,
    }
    exec(many_lines, names)
    torch.testing.assert_close(names["y"], memory(x))


def _keeping(found: dict):
    def build(config):
        found["memory"] = pkmem.ProductKeyMemory(config)
        return found["memory"]

    return build


@pytest.mark.parametrize("block", BLOCKS[2:], ids=lambda block: f"line {block.line}")
def test_a_block_runs_as_written(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(block, ROOT / "README.md", {})


def test_it_shows_every_verb_in_commands_that_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = commands_of(README)
    assert {arguments[0] for arguments in commands} == set(VERBS)
    for arguments in commands:
        check_command(arguments)


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"\b((?:configs|docs|benchmarks|experiments)/[\w./-]+\.(?:yaml|md|py|json|png))", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_pictures_that_documents_show_are_there() -> None:
    root = ROOT
    shown = {
        document.parent / name
        for document in [root / "README.md", *(root / "docs").glob("*.md")]
        for name in re.findall(r"!\[.*?\]\((.*?)\)", document.read_text())
        if "://" not in name
    }
    assert len(shown) > 3
    assert [picture for picture in shown if not picture.exists()] == []


def test_its_table_has_the_figures_of_the_results_file() -> None:
    models = json.loads((ROOT / "experiments" / "results" / "demo" / "summary.json").read_text())["models"]
    for key, title, form in FIGURES:
        cells = ["-" if models[name][key] is None else form.format(models[name][key]) for name in labels()]
        assert f"| {title} | {' | '.join(cells)} |" in README


def test_its_lines_of_benchmarks_are_those_of_the_results() -> None:
    section = README.split("## On two CPU cores")[1].split("\n## ")[0]
    tables = re.findall(r"\(`pkmem bench (\w+)`\) \|.*\n\|[-|]+\n((?:\|.*\n)+)", section)
    assert len(tables) > 2
    for name, rows in tables:
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        measured = {f"| {line['what']} | {_spread(line)} |" for line in document["lines"]}
        assert [row for row in rows.splitlines() if row not in measured] == []


def _spread(line: dict) -> str:
    median, low, high = (f"{line[key]:.2f}" for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low}-{high})"


def test_its_billion_parameters_are_those_of_the_results() -> None:
    folder = ROOT / "benchmarks" / "results"
    document = json.loads((folder / "billion.json").read_text())
    measured = {line["what"]: line["median"] for line in document["lines"]}
    one, two = (
        (
            measured[f"{name}: parameters of the table, billions"],
            measured[f"{name}: peak RSS, GB"],
            next(note.split(": ")[2] for note in document["notes"] if note.startswith(f"{name}: seconds per step")),
        )
        for name in ("moments in bf16", "one second moment a row alone")
    )
    assert (
        f"A table of {one[0]:.2f} billion bf16 parameters trains in {one[1]:.1f} GB at {one[2]} s for 2,048 tokens, and "
        f"one of {two[0]:.2f} billion with one second moment a row in {two[1]:.1f} GB at {two[2]} s"
    ) in " ".join(README.split())


def test_the_results_quote_only_what_the_report_holds() -> None:
    root = ROOT
    results = (root / "docs" / "results.md").read_text()
    held = (root / "experiments" / "results" / "report" / "index.md").read_text()
    quoted = re.findall(r"\d+\.\d{4}|\d+\.\d%|\d+,\d{3}(?= \|)", results)
    assert len(quoted) > 30
    assert [figure for figure in quoted if figure not in held] == []
