"""The house of docs: imports go down, from folder to folder and inside one, and heavy libraries come in by named doors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pkmem

PACKAGE = Path(pkmem.__file__).parent
ORDER = {  # folders from the ground up, each with its files in order: a file imports from those before it
    "files": "durable documents tensor_file",
    "text": "cache synthetic files facts tokenizer examples documents encoder tokens blocks",
    "ops": "user_cache verdict arguments packing precision rounding",
    "ops.reference": "chunks selection bag rows decoding",
    "ops.cpu": "threads cache kernels halves vectors bag packed ahead rows selection selection_backward decoding compiling",
    "ops.triton": "installed device code arithmetic launch bag packed rows selection selection_backward kernels",
    "ops ": "backends reads reading_log registered mapped_rows flops transformed",
    "layer": "config huge_pages drawing room padding untouched recomputation crossing linear query keys journey values quantised counting gate decoding memory usage "
    "replicas sharding moments trainable optim combined",
    "lm": "config evaluation speed padding signature placement stored offloading mapping huggingface modeling_pkmem build smollm2 recall inspection autoload",
    "training": "device freed_memory recipe reading together state shards checkpoint named_state saver "
    "screening export tables_apart saved conversion reading_ahead start journal trainer processes prepare parallel run",
    "editing": "fingerprint rounding edit directory listing near_misses questions surroundings kept_answers progress reads sensitivity rehearsal others elsewhere choosing holding averaging course learning lesson retrofit verbs",
    "inspecting": "sums reads lens packing content page saved",
    "experiments": "benchmarks environment plots page hashed_table hashed_run family results costs claims grid report demo",
    "experiments.learning": "kinds quiz asking examination teaching trial results unfinished cells grid",
    "experiments ": "verb",
    "planning": "wire trace devices link machine plan advice page verb",
    "doctor": "findings truth sizes checks selection tables rows step repeats waiting code speed examination surroundings report",
    "": "cli __main__",
}
GATES = {  # the only files that may import a library, anywhere in them
    "transformers": {
        "pkmem.lm.*",
        "pkmem.text.encoder",
        "pkmem.text.tokenizer",
        "pkmem.text.tokens",
        "pkmem.training.*",
        "pkmem.inspecting.*",
        "pkmem.editing.*",
        "pkmem.experiments.costs",
        "pkmem.experiments.demo",
        "pkmem.experiments.hashed_table",
        "pkmem.experiments.learning.*",
        "pkmem.cli",
    },
    "numba": {"pkmem.ops.cpu.*"},
    "triton": {"pkmem.ops.triton", "pkmem.ops.triton.*"},
    "jsonargparse": {
        "pkmem.cli",
        "pkmem.experiments.verb",
        "pkmem.planning.verb",
        "pkmem.training.reading",
        "pkmem.editing.verbs",
    },
    "matplotlib": {"pkmem.experiments.plots"},
}
VERBS = (
    "pkmem.planning.verb",
    "pkmem.experiments.verb",
    "pkmem.editing.verbs",
)  # imported by the command line whatever it is asked
BY_NAME = {"pkmem", "pkmem.lm.autoload"}  # may import modules whose names are computed


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


def _in_order() -> list[str]:
    """All modules from the ground up; a package stands on its files, and the package itself is a table of contents."""
    modules = []
    for folder, files in ORDER.items():
        package = ".".join(part for part in ("pkmem", folder.strip()) if part)
        modules += [f"{package}.{file}" for file in files.split()]
        modules += [package] if package != "pkmem.ops" or folder == "ops " else []
    return modules


PLACE = {module: place for place, module in enumerate(_in_order())}


def test_every_file_has_its_place() -> None:
    assert set(FILES) == set(PLACE)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_from_those_below_it_only(module) -> None:
    own = {name for name in imports(module) if name.split(".")[0] == "pkmem"}
    assert own <= set(FILES)
    assert {name for name in own if PLACE[name] >= PLACE[module]} == set()


def test_text_and_operators_stand_beside_each_other() -> None:
    floors = {folder: [m for m in FILES if m.startswith(f"pkmem.{folder}")] for folder in ("text", "ops")}
    assert not {name for module in floors["text"] for name in imports(module)} & set(floors["ops"])


@pytest.mark.parametrize("library", GATES)
def test_a_heavy_library_comes_in_by_its_gates_only(library) -> None:
    users = {module for module in FILES if library in {name.split(".")[0] for name in imports(module)}}
    assert {module for module in users if not gate_holds(module, GATES[library])} == set()


def test_modules_imported_by_computed_name_are_in_two_files() -> None:
    assert {name for name, file in FILES.items() if "import_module" in file.read_text()} == BY_NAME


def test_the_command_line_is_light_to_import() -> None:
    known = {
        *VERBS,
        "pkmem.layer.config",
        "pkmem.lm.config",
        "pkmem.training.reading",
        "pkmem.training.recipe",
        "pkmem.training.freed_memory",
        "jsonargparse",
    }
    modules = ("pkmem.cli", "pkmem.training.freed_memory", *VERBS)
    heavy = {name for module in modules for name in top_imports(module)} - known
    light = {"__future__", "collections.abc", "ctypes", "dataclasses", "os", "pathlib", "re", "select", "sys", "typing"}
    assert heavy <= light


def opens_text(call: ast.AST) -> bool:
    """Whether a call opens a file as text, in the platform's encoding unless it names one."""
    match call:
        case ast.Call(ast.Attribute(_, "read_text" | "write_text")):
            return True
        case ast.Call(ast.Attribute(_, "open"), [ast.Constant(str(mode)), *_]) if len(mode) <= 3:
            return "b" not in mode
        case ast.Call(ast.Name("open"), [_, ast.Constant(str(mode)), *_]):
            return "b" not in mode
        case ast.Call(ast.Name("open"), [_]):
            return True
    return False


@pytest.mark.case(
    "Environments", "a system whose own encoding is not UTF-8 (Windows)", "works: every text file is UTF-8", ""
)
def test_every_text_file_names_its_encoding() -> None:
    calls = [
        (name, node)
        for name, file in FILES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert len(calls) > 10
    assert not [
        f"{name}:{call.lineno}" for name, call in calls if "encoding" not in {word.arg for word in call.keywords}
    ]


def test_no_import_asks_for_a_certain_system() -> None:
    of_unix = {"fcntl", "pwd", "resource", "termios"}
    assert {module for module in FILES if top_imports(module) & of_unix} == set()


def test_the_layers_below_the_command_line_stay_light() -> None:
    outside = {
        name
        for module in ("pkmem.layer.config", "pkmem.training.reading", "pkmem.training.recipe", "pkmem.lm.autoload")
        for name in imports(module)
    }
    assert not {"torch", "numpy", "transformers"} & {name.split(".")[0] for name in outside}


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from pkmem import ops", "pkmem.ops"),
        ("from pkmem import RowAdam", "pkmem"),
        ("def f():\n    from pkmem.layer.values import tables_in", "pkmem.layer.values"),
        ("import pkmem.cli as c", "pkmem.cli"),
        ("if True:\n    from pkmem.ops.reference import best_first", "pkmem.ops.reference"),
    ],
)
def test_the_reader_of_imports_sees_every_form(line, module) -> None:
    assert set(imports_of(ast.parse(line))) == {module}
