"""The one reader of recipes: YAML files, flags and the cells of experiments all pass through jsonargparse."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, get_loader

from pkmem.layer.config import MemoryConfig, require
from pkmem.lm.config import ModelConfig
from pkmem.training.recipe import Recipe, TrainingConfig

_PARTS = {"model": ModelConfig, "memory": MemoryConfig, "training": TrainingConfig}


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the fix.

    Raises:
        ValueError: where jsonargparse would print its usage and exit.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # or memory.kn would be memory.knn

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self.explained(message)) from ex

    def explained(self, message: str) -> str:
        """An error of jsonargparse in one line; an unknown option comes with the nearest one there is."""
        line = " ".join(message.split())
        mistyped = re.match(r'Parser key "([\w.]+)": (.+?)(?:\. Got| Errors: .* Given) value: (.*)', line)
        if mistyped:
            key, expected, given = mistyped.groups()
            choices, types = re.search(r"Literal\[(.+)\]", expected), re.findall(r"<class '(\w+)'>", expected)
            allowed = f"one of {choices[1]}" if choices else f"of type {' or '.join(types)}".replace("NoneType", "null")
            return f"{key} is {given} but must be {allowed}"
        unknown = re.search(r"[Uu]nrecognized arguments: --([^= ]+)|does not accept option '([\w.]+)'", line)
        if unknown is None:
            return line
        name = unknown[1] or unknown[2]
        near = difflib.get_close_matches(name, self.known_options(), 1, 0.5)
        return f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else "; see --help")

    def known_options(self) -> list[str]:
        """The options there are, by dotted name."""
        return [action.dest for action in self._actions]


def read_yaml(file: Path) -> Any:
    """What a YAML file holds, as the command line reads it: 4e-4 is a number."""
    return get_loader("yaml")(file.read_text(encoding="utf-8"))


def read_recipe(document: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a nested document, such as a YAML file holds or `Recipe.to_dict` gives.

    Args:
        document: what is left out has its default.
        overrides: fields that differ from the document's, by dotted name, such as `memory.knn`.

    Raises:
        ValueError: an unknown field, one of the wrong type, or one outside its range.
    """
    given: dict[str, Any] = {"model": {}, "memory": {}, "training": {}}
    for name, part in document.items():
        check_known(name, [field.name for field in fields(Recipe)], "option")
        require(isinstance(part, dict) or name not in _PARTS, name, part, "a mapping of options")
        given[name] = dict(part) if name in _PARTS else part
    for name, setting in (overrides or {}).items():
        part, _, key = name.rpartition(".")
        if part:
            check_known(part, list(_PARTS), "part of a recipe")
        (given[part] if part else given)[key] = setting
    parts = {name: _part(name, json.dumps(given.pop(name))) for name in _PARTS}
    return Recipe(**vars(_parser("").parse_object(given)), **parts)


@functools.lru_cache(maxsize=1 << 12)  # the runs of an experiment share most of their parts
def _part(name: str, document: str) -> Any:
    """One part of a recipe from its JSON."""
    options = json.loads(document)
    for option in options:
        check_known(f"{name}.{option}", [f"{name}.{field.name}" for field in fields(_PARTS[name])], "option")
    parser = _parser(name)
    return parser.instantiate(parser.parse_object({name: options}))[name]


@functools.cache
def _parser(part: str) -> Parser:
    """The parser of one part of a recipe, or of the fields beside them."""
    parser = Parser()
    if part:
        parser.add_class_arguments(_PARTS[part], part)
    else:
        parser.add_class_arguments(Recipe, as_group=False, skip=set(_PARTS))
    return parser


def recorded_recipe(out: Path, given: Mapping[str, Any]) -> Recipe:
    """The recipe a run was started with: a resumed run is the same run.

    Args:
        out: the run directory.
        given: fields of the recipe by dotted name that must not differ from it.

    Raises:
        ValueError: the run has no recipe, or one of those given differs.
    """
    recorded = out / "config.yaml"
    if not recorded.exists():
        raise ValueError(f"{out} has no config.yaml to resume from: start the run without --resume")
    recipe = read_recipe(read_yaml(recorded), {"out": str(out)})
    for name, setting in given.items():
        kept = attrgetter(name)(recipe)
        if kept != setting:
            raise ValueError(
                f"{name} is {kept} in {recorded} and cannot become {setting}: leave it out, or start a new --out"
            )
    return recipe


def check_known(name: str, names: Iterable[str], what: str) -> None:
    """Refuses a name that is not there, naming the nearest one.

    Raises:
        ValueError: `name` is not among `names`.
    """
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no {what} {name!r}: {hint}they are {', '.join(names)}")
