"""The one reader of recipes: YAML files, flags and the cells of experiments all pass through jsonargparse."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader

from pkmem.layer.config import MemoryConfig, require
from pkmem.lm.config import ModelConfig
from pkmem.training.recipe import Recipe, TrainingConfig

_PARTS = {"model": ModelConfig, "memory": MemoryConfig, "training": TrainingConfig}
_ASSIGNMENT = re.compile(r"[a-z]\w*(\.\w+)*=")
# jsonargparse tells most of its errors as text alone: which option, what was expected and what was given.
_MISTYPED = re.compile(
    r'Parser key "([\w.]+)": (.+?)(?:\. Got value:| Errors: .* Given value:|load config(?= \'))(.*?)(?: - Parser key.*)?$'
)
_UNKNOWN = re.compile(
    r"[Uu]nrecognized arguments: --([^= ]+)|does not accept option '([\w.]+)'"
    r"|Parser key \"([\w.]+)\".* NestedArg\(key='(\w+)'"
)


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the fix.

    Raises:
        ValueError: where jsonargparse would print its usage and exit.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # or memory.kn would be memory.knn

    def add_recipe(self) -> None:
        """Takes a recipe: --config FILE, and its fields by dotted name."""
        text = "a recipe, such as configs/tiny.yaml; options after it override it"
        self.add_argument("--config", action="config", help=text)
        self.add_class_arguments(Recipe, as_group=False)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Namespace:
        # jsonargparse's own reads a recipe in the platform's encoding.
        return self.parse_string(Path(path).read_text(encoding="utf-8-sig"), Path(path).name, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # The parser of all verbs may be the one to find a mistake of one.
        verb = getattr(ex, "subcommand_parser", None) or self
        raise ValueError(verb.explained(message)) from ex

    def explained(self, message: str) -> str:
        """An error of jsonargparse in one line; an unknown option comes with the nearest one there is."""
        line = " ".join(message.split())
        if unknown := _UNKNOWN.search(line):
            options = [action.dest for action in self._actions]
            return _unknown(".".join(filter(None, unknown.groups())), options, self.prog.replace(" [options]", ""))
        if mistyped := _MISTYPED.match(line):
            key, expected, given = mistyped.groups()
            choices = re.search(r"Literal\[(.+)\]", expected)
            types = sorted(re.findall(r"<class '(\w+)'>", expected), key="NoneType".__eq__)
            typed = f"of type {' or '.join(types)}".replace("NoneType", "null") if types else "a mapping of options"
            return f"{key} is {given.strip() or 'empty'} but must be {f'one of {choices[1]}' if choices else typed}"
        return line


def as_flags(arguments: Iterable[str]) -> list[str]:
    """A command line in which options of a recipe may be written without dashes, such as memory.knn=16."""
    return [f"--{text}" if _ASSIGNMENT.match(text) else text for text in arguments]


def _unknown(name: str, options: Iterable[str], command: str) -> str:
    near = difflib.get_close_matches(name, options, 1, 0.5)
    return f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else f"; `{command} --help` lists them")


def read_yaml(file: Path) -> Any:
    """What a YAML file holds, as the command line reads it: 4e-4 is a number.

    Raises:
        ValueError: the file is not YAML.
    """
    try:
        return get_loader("yaml")(file.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error


def read_recipe(document: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a nested document, such as a YAML file holds or `Recipe.to_dict` gives.

    Args:
        document: what is left out has its default.
        overrides: fields that differ from the document's, nested as there or by dotted name, such as `memory.knn`.

    Raises:
        ValueError: an unknown field, one of the wrong type, or one outside its range.
    """
    given = by_dotted_name(document) | by_dotted_name(overrides or {})
    nested: dict[str, dict[str, Any]] = {part: {} for part in ("", *_PARTS)}
    for name, setting in given.items():
        if name not in _defaults():
            raise ValueError(_unknown(str(name), [*_defaults(), *_PARTS], "pkmem train"))
        default = _defaults()[name]
        require(setting is not None or default is None, name, None, f"of type {type(default).__name__}")
        part, _, option = name.rpartition(".")
        nested[part][option] = setting
    parsed = {part: _parsed(part, json.dumps(options, default=str)) for part, options in nested.items()}
    return Recipe(**parsed[""], **{part: made(**parsed[part]) for part, made in _PARTS.items()})


def given_recipe(options: Namespace) -> Recipe:
    """The recipe among the options of a parser that takes one: see `Parser.add_recipe`."""
    given = options.as_dict()
    return read_recipe({field.name: given[field.name] for field in fields(Recipe)})


def by_dotted_name(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe's nested document, such as `memory.knn`.

    Raises:
        ValueError: the document or one of its parts is not a mapping.
    """
    require(isinstance(document, Mapping), "a recipe", document, "a mapping of options")
    flat: dict[str, Any] = {}
    for name, part in document.items():
        require(isinstance(part, Mapping) or name not in _PARTS, name, part, "a mapping of options")
        flat |= {f"{name}.{option}": x for option, x in part.items()} if name in _PARTS else {name: part}
    return flat


@functools.cache
def _defaults() -> dict[str, Any]:
    return by_dotted_name(Recipe().to_dict())


@functools.lru_cache(maxsize=1 << 12)
def _parsed(part: str, document: str) -> dict[str, Any]:
    """The fields of one part of a recipe, or of "" those beside the parts, from their JSON.

    jsonargparse takes milliseconds for it, and recipes share most parts.
    """
    given = json.loads(document)
    fields_read: dict[str, Any] = _parser(part).parse_object({part: given} if part else given).as_dict()
    return fields_read[part] if part else fields_read


@functools.cache
def _parser(part: str) -> Parser:
    """The parser of one part of a recipe, or of the fields beside them."""
    parser = Parser()
    if part:
        parser.add_class_arguments(_PARTS[part], part)
    else:
        parser.add_class_arguments(Recipe, as_group=False, skip=set(_PARTS))
    return parser


def recorded_recipe(out: Path, given: Mapping[str, Any] | Namespace) -> Recipe:
    """The recipe a run was started with: a resumed run is the same run.

    Args:
        out: the run directory.
        given: options by dotted name; those that are fields of the recipe must not differ from it.

    Raises:
        ValueError: the run has no recipe, or one of those given differs.
    """
    recorded = out / "config.yaml"
    if not recorded.exists():
        raise ValueError(f"{out} has no config.yaml to resume from: start the run without --resume")
    recipe = read_recipe(read_yaml(recorded), {"out": str(out)})
    own = {field.name for field in fields(Recipe)}
    for name, setting in given.items():
        if name.split(".")[0] not in own:
            continue
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
