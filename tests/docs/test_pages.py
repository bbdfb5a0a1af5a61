"""The pages' code runs as written and prints what they say; their commands, messages and figures are real."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from documents import ROOT, blocks_of, check_command, commands_of, prose_of, run

PAGES = sorted((ROOT / "docs").glob("*.md"))
HISTORY = (
    "log.md",
    "results.md",
    "experiments.md",
    "compatibility.md",
)  # tied to files or tests elsewhere, or to a day
GUIDES = [page for page in PAGES if page.name not in HISTORY]


def by_name(page: Path) -> str:
    return page.stem


RUN = [
    page for page in PAGES if "```python" in page.read_text() and page.stem != "teach"
]  # which test_teach.py follows


@pytest.mark.parametrize("page", RUN, ids=by_name)
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
        with pytest.raises((ValueError, KeyError)):
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
    for title in ("## Checkpoints", "## Several processes"):
        rows = re.findall(r"^\| (.+?) \|", page.split(title)[1].split("\n## ")[0], re.MULTILINE)
        quoted += [row for row in rows if not row.startswith(("message", "It "))]  # "It hangs": no message
    assert len(quoted) > 8
    for message in quoted:
        for part in re.split(r" ?\.\.\. ?|, or ", message):
            assert part in source, message


@pytest.mark.parametrize("page", GUIDES, ids=by_name)
def test_figures_in_the_text_are_those_of_the_result_files(page: Path) -> None:
    text = " ".join(re.sub(r"\(http[^)]*\)", "", prose_of(page.read_text())).split())
    quoted = measured().get(page.stem, [])
    assert [sentence for sentence in quoted if sentence not in text] == []
    told = _figures(re.sub(r"`[^`]*`", "", text))  # what stands as code is a setting
    assert told - _figures(" ".join(quoted)) - NOT_MEASURED.get(page.stem, set()) == set()


NOT_MEASURED = {
    "choose": {"1.5"},  # million tokens of the laptop experiments
    "gpu": {"4.8", "16.8", "8.0"},  # an H200's data sheet, the operations of an MLP, a compute capability
    "how": {"3.1", "3.2"},  # sections of the paper
    "start": {"3.11"},  # Python's version
}


def measured() -> dict[str, list[str]]:
    """What the guides quote, page by page, as the result files have it."""
    report = (ROOT / "experiments" / "results" / "report" / "index.md").read_text()
    faster = re.search(r"^- 4 layers \+ memory against 8 layers: .*; (.+)x as fast in prefill, (.+)x in", report, re.M)
    saved = {
        tokens: float(bits)
        for tokens, bits in re.findall(
            r"^- 512² slots, (.+) million .* against no memory, \d.*: \+(\S+) ", report, re.M
        )
    }
    billion, peak = _medians("billion"), _medians("peak_memory")
    names = {"one": "moments in bf16", "two": "one second moment a row alone"}
    seconds = {
        name: note.split(": ")[2]
        for name, begins in names.items()
        for note in _results("billion")["notes"]
        if note.startswith(f"{begins}: seconds per step")
    }
    billion = {
        name: {what.removeprefix(f"{begins}: "): found for what, found in billion.items() if what.startswith(begins)}
        for name, begins in names.items()
    }
    step = max(gigabytes for what, gigabytes in peak.items() if "pkmem: peak less" in what)
    return {
        "choose": [
            f"with 1024² slots only {_usage('scaling/laptop/1024_sub_keys')} were read",
            f"at 512² slots {_usage('size/laptop/512_none')} of them were used "
            f"instead of {_usage('size/laptop/512_batch')}",
        ],
        "costs": [
            f"at {faster[1]} times the speed in prefill and {faster[2]} times in decode",
            f"a memory saved {saved['1.5']:.2f} bits per byte on 1.5 million tokens and {saved['45']:.2f} on 45 million",
            f"a training step of pkmem takes {_medians('growth')['s 2,048 over s 512: ours']:.2f} times as long",
            f"the floor takes {_medians('growth')['s 2,048 over s 512: floor']:.2f} times as long",
            f"the step itself takes {step:.2f} GB at most",
            f"a table of {billion['one']['parameters of the table, billions']:.2f} billion parameters trained in a process "
            f"of {billion['one']['peak RSS, GB']:.2f} GB, at {seconds['one']} seconds",
            f"one of {billion['two']['parameters of the table, billions']:.2f} billion in "
            f"{billion['two']['peak RSS, GB']:.2f} GB, at {seconds['two']} seconds",
        ],
    }


def _results(benchmark: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text())


def _medians(benchmark: str) -> dict[str, float]:
    return {line["what"]: line["median"] for line in _results(benchmark)["lines"]}


def _usage(cell: str) -> str:
    """Share of slots read on held-out text, the mean over seeds."""
    runs = (ROOT / "experiments" / "results").glob(f"{cell}__*.json")
    return f"{statistics.mean(json.loads(run.read_text())['summary']['memory_0/usage'] for run in runs):.1%}"


def _figures(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+\.\d+%?(?![\w.]*\d)", text))
