"""Writes docs/compatibility.md from the tests: every row is a test that `pytest.mark.case` marks.

    python docs/compatibility.py

The tests are read, not run: tests/docs/test_compatibility.py holds the page to them, and the suite runs them.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
KINDS = {
    "Life of the reading log": "`RowAdam` keeps a table's gradient as a log of its reads. These cases ask whose that log "
    "is, and when it is forgotten.",
    "Optimizer protocol": "`RowAdam` and `CombinedOptimizer` are torch optimizers. These cases do with them what is done "
    "with torch's own.",
    "Modules that others rewrite": "Other libraries replace the parts of a module, their weights or their `forward`, or "
    "trace and transform what they compute. These cases compare the output with that of the module left alone.",
    "Hugging Face protocol": "A model with memories is a causal language model of transformers. These cases do with it "
    "what the guides of transformers show.",
    "Padding and recomputation": "Padded tokens are not data, and a recomputed forward pass is not a second one. These "
    "cases compare with the run without padding, or without recomputation.",
    "Several devices": "Several processes share a table by its columns. These cases compare with one process that has the "
    "whole table and the batches of all.",
    "Environments": "These cases change what surrounds the library: compilers, caches, file systems, processes, threads.",
    "Gradual surprises": "These mistakes could go unnoticed for a while. The library names them at once.",
}
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numba", "numpy")
_TEXT = (  # what text is made of
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.BinOp,
    ast.Add,
    ast.JoinedStr,
    ast.FormattedValue,
    ast.Dict,
    ast.Subscript,
)
HEAD = """# Compatibility

<!-- Written by docs/compatibility.py from the tests; do not edit. -->

What people do to a module, an optimizer or a model every day, and what happens when they do it to pkmem. Each row was
tried, and a test holds it: search `tests/` for the sentence of its first column. "Works" means that
outputs, gradients or weights equal an independent truth, usually the same model in double precision without the change.
"Refused" means an error that says what to do. Where other libraries had a report of the same case, it is linked.

Tried with Python 3.11 and {versions}.
"""


class Case(NamedTuple):
    """A row: its mark's four strings, and the test."""

    kind: str
    tried: str
    outcome: str
    source: str
    file: str
    test: str


def cases() -> list[Case]:
    """Every marked case, in the order of files and lines."""
    return [case for file in sorted((ROOT / "tests").rglob("test_*.py")) for case in _cases_of(file)]


def _cases_of(file: Path) -> Iterator[Case]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}  # of strings, of which a mark's arguments may be made up
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _is_text(node.value):
            with contextlib.suppress(Exception):  # of other names: no text for a mark
                names[node.targets[0].id] = _value(node.value, names)
    for test in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (node for part in test.decorator_list for node in ast.walk(part) if _marks_a_case(node)):
            yield Case(
                *(_value(argument, names) for argument in call.args), file.relative_to(ROOT).as_posix(), test.name
            )


def _marks_a_case(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Attribute(_, "case") | ast.Name("case")):
            return True
    return False


def _is_text(node: ast.expr) -> bool:
    return all(isinstance(part, _TEXT) for part in ast.walk(node))


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    return eval(compile(ast.Expression(node), "mark", "eval"), {"__builtins__": {}}, names)


def page() -> str:
    """The whole page."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    versions = [f"{library} {pins[library]}" for library in LIBRARIES if library in pins]
    text = HEAD.format(versions=", ".join(versions[:-1]) + " and " + versions[-1])
    rows = sorted(cases(), key=lambda case: list(KINDS).index(case.kind))
    for kind, meaning in KINDS.items():
        text += f"\n## {kind}\n\n{meaning}\n\n| what was tried | what happens | where |\n|---|---|---|\n"
        text += "".join(_row(case) for case in rows if case.kind == kind)
    return text


def _row(case: Case) -> str:
    tried, outcome = (part.replace("|", "\\|") for part in (case.tried[:1].upper() + case.tried[1:], case.outcome))
    reported = f"[reported]({case.source}), " if case.source else ""
    file = case.file.removeprefix("tests/")
    return f"| {tried} | {outcome[:1].upper() + outcome[1:]} | {reported}`{file}` |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
