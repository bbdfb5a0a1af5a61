"""The house of docs: a file imports from lower floors only, and each heavy library comes in by named doors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pkmem

PACKAGE = Path(pkmem.__file__).parent
FLOOR = {
    "pkmem.autoload": 0,
    "pkmem.config": 0,
    "pkmem.environment": 0,
    "pkmem.facts": 0,
    "pkmem.pages": 0,
    "pkmem.plots": 0,
    "pkmem.recipe": 1,
    "pkmem.state": 1,
    "pkmem.document": 1.1,
    "pkmem.text.files": 1,
    "pkmem.text.tokenizer": 1,
    "pkmem.text.documents": 1.1,
    "pkmem.text.tokens": 1.2,
    "pkmem.text.blocks": 1.3,
    "pkmem.text": 1.4,
    "pkmem.ops.reading_log": 1.1,
    "pkmem.ops.backends": 1.2,
    "pkmem.ops.reference": 1.2,
    "pkmem.ops.cpu.threads": 1.3,
    "pkmem.ops.cpu.vectors": 1.3,
    "pkmem.ops.cpu.bag": 1.4,
    "pkmem.ops.cpu.rows": 1.4,
    "pkmem.ops.cpu.selection": 1.4,
    "pkmem.ops.cpu.decoding": 1.5,
    "pkmem.ops.cpu.selection_backward": 1.5,
    "pkmem.ops.cpu.compiling": 1.6,
    "pkmem.ops.cpu": 1.7,
    "pkmem.ops.triton.arithmetic": 1.3,
    "pkmem.ops.triton.launch": 1.3,
    "pkmem.ops.triton.bag": 1.4,
    "pkmem.ops.triton.rows": 1.5,
    "pkmem.ops.triton.selection": 1.5,
    "pkmem.ops.triton": 1.7,
    "pkmem.ops.registered": 1.8,
    "pkmem.ops": 1.9,
    "pkmem.checkpoint": 2,
    "pkmem.family": 2,
    "pkmem.memory": 2,
    "pkmem.results": 3,
    "pkmem.usage": 3,
    "pkmem.optim": 3,
    "pkmem.huggingface": 4,
    "pkmem.evaluation": 4,
    "pkmem.journal": 4.5,
    "pkmem.inspection": 5,
    "pkmem.saved": 5,
    "pkmem.trainer": 4.9,
    "pkmem.training": 5,
    "pkmem.costs": 5,
    "pkmem.recall": 6,
    "pkmem.demo": 6,
    "pkmem.experiment": 6,
    "pkmem.claims": 5,
    "pkmem.report": 6,
    "pkmem.cli": 7,
    "pkmem": 8,
}
GATES = {  # the only files that may import a library, anywhere in them
    "transformers": {
        "pkmem.huggingface",
        "pkmem.inspection",
        "pkmem.journal",
        "pkmem.saved",
        "pkmem.trainer",
        "pkmem.training",
        "pkmem.costs",
        "pkmem.demo",
        "pkmem.cli",
        "pkmem.recall",
        "pkmem.text.*",
    },
    "numba": {"pkmem.ops.cpu", "pkmem.ops.cpu.*"},
    "triton": {"pkmem.ops.triton", "pkmem.ops.triton.*"},
    "jsonargparse": {"pkmem.cli"},
    "matplotlib": {"pkmem.plots"},
}
BY_NAME = {"pkmem", "pkmem.autoload", "pkmem.ops.backends"}  # may import modules whose names are computed


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module a syntax tree imports, those inside functions too; `from pkmem import ops` is pkmem.ops."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor they lead to"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in FILES else str(node.module)


def imports(module: str) -> set[str]:
    return set(imports_of(ast.parse(FILES[module].read_text())))


def top_imports(module: str) -> set[str]:
    """What importing the module imports at once."""
    body = ast.parse(FILES[module].read_text()).body
    return {name for node in body if isinstance(node, ast.Import | ast.ImportFrom) for name in imports_of(node)}


def gate_holds(module: str, doors: set[str]) -> bool:
    return module in doors or any(door.endswith(".*") and module.startswith(door[:-1]) for door in doors)


def test_every_file_has_a_floor() -> None:
    assert set(FILES) - set(FLOOR) == set()


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_from_lower_floors_only(module) -> None:
    # The package itself is a table of contents: nobody inside reads it, so it stands on top.
    own = {name for name in imports(module) if name.split(".")[0] == "pkmem"}
    assert own <= set(FILES)
    assert {name for name in own if FLOOR[name] >= FLOOR[module]} == set()


@pytest.mark.parametrize("library", GATES)
def test_a_heavy_library_comes_in_by_its_gates_only(library) -> None:
    users = {module for module in FILES if library in {name.split(".")[0] for name in imports(module)}}
    assert {module for module in users if not gate_holds(module, GATES[library])} == set()


def test_modules_imported_by_computed_name_are_in_three_files() -> None:
    assert {name for name, file in FILES.items() if "import_module" in file.read_text()} == BY_NAME


def test_the_command_line_is_light_to_import() -> None:
    heavy = top_imports("pkmem.cli") - {"pkmem.recipe", "jsonargparse"}
    assert heavy <= {"__future__", "difflib", "os", "pathlib", "re", "sys", "typing"}


def test_the_layers_below_the_command_line_stay_light() -> None:
    outside = {name for module in ("pkmem.config", "pkmem.recipe", "pkmem.autoload") for name in imports(module)}
    assert not {"torch", "numpy", "transformers"} & {name.split(".")[0] for name in outside}


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from pkmem import ops", "pkmem.ops"),
        ("from pkmem import RowAdam", "pkmem"),
        ("def f():\n    from pkmem.memory import tables_in", "pkmem.memory"),
        ("import pkmem.cli as c", "pkmem.cli"),
        ("if True:\n    from pkmem.ops.reference import best_first", "pkmem.ops.reference"),
    ],
)
def test_the_reader_of_imports_sees_every_form(line, module) -> None:
    assert set(imports_of(ast.parse(line))) == {module}
