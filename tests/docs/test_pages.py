"""The pages' code runs as written and prints what they say; their commands, messages and figures are real."""

import re
from pathlib import Path

import pytest

from documents import ROOT, blocks_of, check_command, commands_of, prose_of, run

PAGES = sorted((ROOT / "docs").glob("*.md"))
HISTORY = ("log.md", "results.md", "experiments.md")  # tied to result files by test_readme.py, or to their day
GUIDES = [page for page in PAGES if page.name not in HISTORY]


def by_name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=by_name)
def test_code_runs_as_written_and_prints_what_follows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PKMEM_CACHE", str(tmp_path / "cache"))
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page.read_text()):
        if block.language == "python":
            printed = run(block, page, names)
            assert printed == (block.printed or printed), f"{page}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arguments in commands_of(page.read_text()):
        check_command(arguments)


def test_the_pages_show_every_verb_but_the_demo() -> None:
    shown = {arguments[0] for page in PAGES for arguments in commands_of(page.read_text())}
    assert shown >= {"train", "eval", "generate", "inspect", "experiment", "report", "warmup", "bench"}


@pytest.mark.parametrize(
    "command",
    ["pkmem evaluate runs/x", "pkmem train --confg configs/tiny.yaml", "pkmem train memory.kn=8", "pkmem eval --speed"],
)
def test_a_wrong_command_is_found(command: str) -> None:
    for document in (f"```sh\n{command}  # a remark\n```\n", f"Call `{command}` now."):
        (arguments,) = commands_of(document)
        with pytest.raises((SystemExit, KeyError)):
            check_command(arguments)


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {name for block in blocks_of(index) for name in block.code.split("\n\n")[-1].split()}
    assert listed == {page.stem for page in PAGES} - {"index"}


def test_the_messages_that_troubleshooting_quotes_are_pkmems_own() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    blocks = blocks_of(page)
    printed = [block.printed for block in blocks if block.language == "python"]
    quoted = [block.code.strip() for block in blocks if block.language == "text" and block.code not in printed]
    quoted += re.findall(r"^\| (.+?) \|", page.split("## Checkpoints")[1].split("\n## ")[0], re.MULTILINE)[2:]
    assert len(quoted) > 8
    for message in quoted:
        for part in re.split(r" ?\.\.\. ?|, or ", message):
            assert part in source, message


@pytest.mark.parametrize("page", GUIDES, ids=by_name)
def test_measured_figures_are_those_of_the_result_files(page: Path) -> None:
    results = [
        *(ROOT / "benchmarks" / "results").glob("*.md"),
        ROOT / "experiments" / "results" / "report" / "index.md",
    ]
    held = {figure for file in results for figure in _figures(file.read_text())}
    prose = re.sub(r"`[^`]*`|\(http[^)]*\)", "", prose_of(page.read_text()))  # settings and addresses measure nothing
    assert _figures(prose) - held - OTHER.get(page.stem, set()) == set()


OTHER = {  # figures that no run of ours measured
    "choose": {"1.5"},  # million tokens of the laptop experiments
    "how": {"3.1", "3.2"},  # sections of the paper
    "start": {"3.11"},  # Python's version
    "gpu": {"4.8", "16.8"},  # an H200's data sheet, and what follows from it
}


def _figures(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+\.\d+%?(?![\w.]*\d)", text))
