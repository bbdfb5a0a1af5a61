"""What runs of a family left: one file per run, so that grids are split and merged by copying files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkmem.experiments.environment import machine_of
from pkmem.experiments.family import Cell, Family, Run
from pkmem.files.documents import save_json
from pkmem.training.reading import by_dotted_name, read_recipe
from pkmem.training.recipe import Recipe


@dataclass(frozen=True)
class Result:
    """A trained model's figures.

    Args:
        file: where this was read.
        family, scale, cell, rate, seed: which run of which family.
        recipe: what was trained.
        summary: held-out figures of the trained model, its parameters and its training speed.
        held_out: the evaluations during training: tokens, seconds, bits_per_byte, use of the memories.
        environment: machine, versions, commit, command.
        hashed: of which blocks the memory is a table read by a hash.
    """

    file: Path
    family: str
    scale: str
    cell: str
    rate: str
    seed: int
    recipe: Recipe
    summary: dict[str, Any]
    held_out: list[dict[str, Any]]
    environment: dict[str, Any]
    hashed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Speeds:
    """Inference speeds of a family's models, measured in turns.

    Args:
        file: where this was read.
        family, scale: whose models.
        models: per cell prefill_tokens_per_s, decode_tokens_per_s, prefill_words_per_s.
        recipes: per cell what was built.
        environment: machine, versions, commit, command.
    """

    file: Path
    family: str
    scale: str
    models: dict[str, dict[str, float]]
    recipes: dict[str, Recipe]
    environment: dict[str, Any]


class NotYetError(ValueError):
    """A run cannot be planned: it needs the result of another."""


def save_result(file: Path, family: Family, run: Run, found: dict[str, Any]) -> None:
    """Writes a run's result at once.

    Args:
        file: OUT/FAMILY/SCALE/RUN.json.
        family, run: which run of which family.
        found: summary, held_out and environment of a `Result`.
    """
    head = {"family": family.name, "scale": family.scale, "cell": run.cell, "rate": run.rate, "seed": run.seed}
    head |= {"hashed": run.hashed} if run.hashed else {}
    save_json(file, head | {"recipe": _plain(run.recipe)} | found)


def save_speeds(file: Path, family: Family, models: dict[str, dict[str, float]], environment: dict[str, Any]) -> None:
    """Writes one measurement of a family's speeds at once."""
    recipes = {name: _plain(family.run(family.cells[name], family.cells[name].rates[0]).recipe) for name in models}
    head = {"family": family.name, "scale": family.scale}
    save_json(file, head | {"models": models, "recipes": recipes, "environment": environment})


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {key: part for key, part in recipe.to_dict().items() if key != "out"}


def load_result(file: Path) -> Result | Speeds:
    """Reads what `save_result` or `save_speeds` wrote.

    Raises:
        ValueError: the file is damaged or of something else.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if "models" in document:
            recipes = {cell: read_recipe(recipe) for cell, recipe in document["recipes"].items()}
            for speeds in document["models"].values():
                _require_numbers(speeds, "prefill_tokens_per_s", "decode_tokens_per_s")
            _require_numbers(dict.fromkeys(document["models"], 0) | dict.fromkeys(recipes, 0), *document["models"])
            return Speeds(file, **document | {"recipes": recipes})
        _require_numbers(document["summary"], "bits_per_byte", "perplexity", "train_seconds", "train_tokens_per_s")
        for record in document["held_out"]:
            _require_numbers(record, "tokens", "seconds", "bits_per_byte")
        if not isinstance(document["environment"], dict):
            raise TypeError("environment")
        return Result(file, **document | {"recipe": read_recipe(document["recipe"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a result of an experiment, or damaged ({error})") from error


def _require_numbers(figures: dict[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(figures[name], int | float):
            raise TypeError(f"{name} is {figures[name]!r}")


def find_results(folder: Path) -> tuple[list[Result], list[Speeds], list[str]]:
    """All results under a folder, what lies in runs/ left out, and what is wrong with the files that cannot be read."""
    results: list[Result] = []
    speeds: list[Speeds] = []
    damaged: list[str] = []
    for file in sorted(folder.rglob("*.json")):
        is_result = re.fullmatch(r".+__.+__seed\d+\.json|speed__\d+\.json", file.name)
        if is_result is None or "runs" in file.relative_to(folder).parts[:-1]:
            continue
        try:
            found = load_result(file)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if isinstance(found, Result):
            results.append(found)
        else:
            speeds.append(found)
    return results, speeds, damaged


def difference(found: Recipe, wanted: Recipe) -> str | None:
    """How two recipes differ, as `name found -> wanted, ...`; None where they train the same."""
    pairs = zip(_flat(found).items(), _flat(wanted).values(), strict=True)
    changes = [f"{name} {old} -> {new}" for (name, old), new in pairs if old != new]
    return ", ".join(changes) or None


def _flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields by dotted name; those of the memory and its values are None where there is none."""
    flat = by_dotted_name(_plain(recipe))
    if recipe.model.memory_layers:
        return flat
    return {name: None if name.startswith(("memory.", "training.value_")) else x for name, x in flat.items()}


def runs_of(family: Family, cell: Cell, seed: int, results: Iterable[Result], data: str | None = None) -> list[Run]:
    """The runs of a cell and seed: all its rates at seed 0, at other seeds the best of those.

    Args:
        family: at one scale.
        cell: of it.
        seed: of the runs.
        results: of this family and scale, those that are valid.
        data: what to learn instead of the base recipe's.

    Raises:
        NotYetError: what seed 0 has to tell first is not known yet.
    """
    results = list(results)
    more = {} if cell.like is None else {"num_tokens": _matched_tokens(family, cell, results)}
    runs = [family.run(cell, rate, seed, data, **more) for rate in cell.rates]
    if seed == 0 or len(runs) == 1:
        return runs
    best = best_of_sweep(family, cell, results)
    return [run for run in runs if run.rate == best.rate]


def best_of_sweep(family: Family, cell: Cell, results: Iterable[Result]) -> Result:
    """The best result at seed 0 by the family's metric, once all rates of the cell were tried.

    Raises:
        NotYetError: a rate has no result yet.
    """
    tried = {result.rate: result for result in results if result.cell == cell.name and result.seed == 0}
    wanted = [family.run(cell, rate).rate for rate in cell.rates]
    missing = [rate for rate in wanted if rate not in tried]
    if missing:
        raise NotYetError(f"{cell.name} has no result at seed 0 for {', '.join(missing)}")
    return min((tried[rate] for rate in wanted), key=lambda result: family.metric.loss(result.summary))


def of_best_rate(family: Family, cell: Cell, results: Iterable[Result]) -> list[Result]:
    """A cell's results, by seed, at its best rate; of those tried, if its sweep is not complete.

    Args:
        family: at one scale.
        cell: of it.
        results: of this family and scale, those that are valid.
    """
    tried = [result for result in results if result.cell == cell.name]
    first = [result for result in tried if result.seed == 0]
    if not first:
        return []
    rate = min(first, key=lambda result: family.metric.loss(result.summary)).rate
    return [result for result in tried if result.rate == rate]


def at_edge(family: Family, cell: Cell, best: Result) -> bool:
    """Whether the best rate of a sweep is the lowest or highest that was tried."""
    (chosen,) = (rate for rate in cell.rates if family.run(cell, rate).rate == best.rate)
    for name, value in chosen.items():
        tried = {rate.get(name, value) for rate in cell.rates}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            return True
    return False


def _matched_tokens(family: Family, cell: Cell, results: list[Result]) -> int:
    """Tokens that fit in another cell's training seconds at this one's speed, both of seed 0 and of one machine.

    They are those of the best rates. If those ran on two machines, a run at another rate stands in for one of them.

    Raises:
        NotYetError: a sweep is not complete, or the two cells have no runs of one machine.
    """
    assert cell.like is not None
    assert cell.match_seconds_of is not None
    same = best_of_sweep(family, family.cells[cell.like], results)
    other = best_of_sweep(family, family.cells[cell.match_seconds_of], results)
    first = [result for result in results if result.seed == 0]
    pairs = [
        (same, other),
        *((result, other) for result in first if result.cell == cell.like),
        *((same, result) for result in first if result.cell == cell.match_seconds_of),
    ]
    for one, two in pairs:
        if machine_of(one.environment) == machine_of(two.environment):
            batch = same.recipe.training.batch_tokens
            return max(1, int(two.summary["train_seconds"] * one.summary["train_tokens_per_s"] // batch)) * batch
    raise NotYetError(
        f"{same.file.name} and {other.file.name} are of two machines ({machine_of(same.environment)}; "
        f"{machine_of(other.environment)}): move one of them away and run it again where the other ran"
    )


@dataclass(frozen=True)
class Standing:
    """How far a family is.

    Args:
        valid: results of the family's runs.
        missing: runs without a result.
        waiting: why further runs cannot be planned yet.
        unused: files of results that do not serve the family, and why.
    """

    valid: list[Result]
    missing: list[Run]
    waiting: list[str]
    unused: dict[Path, str]


def standing(family: Family, results: Iterable[Result], seeds: int, data: str | None = None) -> Standing:
    """Sorts results by what the family wants of them.

    Args:
        family: at one scale.
        results: of any family and scale; of two of one run the first counts.
        seeds: seeds 0 .. seeds - 1 are wanted.
        data: what to learn instead of the base recipe's.
    """
    there: dict[tuple[str, str, int], Result] = {}
    for result in results:
        if (result.family, result.scale) == (family.name, family.scale):
            there.setdefault((result.cell, result.rate, result.seed), result)
    now = Standing([], [], [], {})
    for seed in range(seeds):
        for cell in family.cells.values():
            try:
                runs = runs_of(family, cell, seed, now.valid, data)
            except NotYetError as error:
                now.waiting.append(f"{cell.name}, seed {seed}: {error}")
                continue
            for run in runs:
                found = there.get((run.cell, run.rate, run.seed))
                if found is None:
                    now.missing.append(run)
                elif change := difference(found.recipe, run.recipe):
                    now.unused[found.file] = f"is of another recipe ({change})"
                elif found.hashed != run.hashed:
                    now.unused[found.file] = f"has hashed tables {found.hashed}, not {run.hashed}"
                elif family.metric.name not in found.summary:  # such as bits per fact of a text that has none
                    now.unused[found.file] = f"has no {family.metric.name}"
                else:
                    now.valid.append(found)
    return now
