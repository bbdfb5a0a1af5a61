"""The README's code runs as written, and what it calls equivalent is."""

import json
import re
from pathlib import Path

import pytest
import torch

import pkmem
from pkmem.cli import build_parser
from pkmem.experiments.demo import FIGURES, labels

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^pkmem (\w+)(.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_the_lines_it_calls_equivalent_give_the_same_output() -> None:
    x = torch.randn(10, 64)
    one_line, many_lines = BLOCKS[:2]
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


@pytest.mark.parametrize("block", BLOCKS[2:], ids=lambda block: block.split("\n")[0][:30])
def test_a_block_runs_as_written(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block, {})


def test_every_command_it_shows_exists() -> None:
    verbs = build_parser()._subcommands_action.choices
    assert {verb for verb, _ in COMMANDS} == set(verbs)


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"\b((?:configs|docs|benchmarks|experiments)/[\w./-]+\.(?:yaml|md|py|json|png))", README)
    assert named
    for name in named:
        assert (Path(__file__).parents[1] / name).exists(), name


def test_the_pictures_that_documents_show_are_there() -> None:
    root = Path(__file__).parents[1]
    shown = {
        document.parent / name
        for document in [root / "README.md", *(root / "docs").glob("*.md")]
        for name in re.findall(r"!\[.*?\]\((.*?)\)", document.read_text())
        if "://" not in name
    }
    assert len(shown) > 3
    assert [picture for picture in shown if not picture.exists()] == []


def test_its_table_has_the_figures_of_the_results_file() -> None:
    models = json.loads((Path(__file__).parents[1] / "experiments" / "results" / "demo" / "summary.json").read_text())[
        "models"
    ]
    for key, title, form in FIGURES:
        cells = ["-" if models[name][key] is None else form.format(models[name][key]) for name in labels()]
        assert f"| {title} | {' | '.join(cells)} |" in README


def test_its_lines_of_benchmarks_are_those_of_the_results() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results"
    measured = {line for file in results.glob("*.md") for line in file.read_text().splitlines()}
    section = README.split("## On two CPU cores")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| .* \|$", section, re.MULTILINE)
    assert len(quoted) > 10
    assert [line for line in quoted if line not in measured] == []


def test_its_billion_parameters_are_those_of_the_results() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    document = json.loads((folder / "billion.json").read_text())
    measured = {line["what"]: line["median"] for line in document["lines"]}
    parameters, peak = measured["parameters of the table, billions"], measured["peak RSS, GB"]
    seconds = next(float(note.split(": ")[1]) for note in document["notes"] if note.startswith("seconds per step"))
    assert (
        f"A table of {parameters:.2f} billion bf16 parameters trains in {peak:.1f} GB at {seconds:.2f} s for 2,048 tokens"
        in README
    )


def test_the_results_quote_only_what_the_report_holds() -> None:
    root = Path(__file__).parents[1]
    results = (root / "docs" / "results.md").read_text()
    held = (root / "experiments" / "results" / "report" / "index.md").read_text()
    quoted = re.findall(r"\d+\.\d{4}|\d+\.\d%|\d+,\d{3}(?= \|)", results)
    assert len(quoted) > 30
    assert [figure for figure in quoted if figure not in held] == []
