"""The results of experiments, beside the paper's, as a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from pkmem.experiments.claims import Spread, claims, speeds_of
from pkmem.experiments.document import Block, Heading, Items, Paragraph, Picture, Table, is_page, write_page
from pkmem.experiments.family import Cell, Family, config_folder, load_family
from pkmem.experiments.plots import plot_learning_curves, plot_lines, plot_speeds, plot_usage
from pkmem.experiments.results import (
    NotYetError,
    Result,
    Speeds,
    at_edge,
    best_of_sweep,
    find_results,
    of_best_rate,
    standing,
)
from pkmem.training.recipe import Recipe

_NONE = "-"


def write_report(folders: Iterable[Path], out: Path) -> Path:
    """Writes the page of all results in some directories.

    Args:
        folders: with results, possibly from several machines; of two results of one run the first counts.
        out: the page's directory: index.html with all pictures inside, index.md beside its PNGs.

    Returns:
        the HTML file.

    Raises:
        ValueError: there is no result, or `out` holds something that is not such a page.
    """
    folders = list(folders)
    results, speeds, damaged = _collected(folders)
    if not results and not speeds:
        where = ", ".join(str(folder) for folder in folders)
        raise ValueError(
            f"no result in {where}: make one with `pkmem experiment table1 --out {folders[0]}`"
            + "".join(f"; {message}" for message in damaged)
        )
    if out.exists() and any(out.iterdir()) and not is_page(out):
        raise ValueError(f"{out} is there and holds no page of `pkmem report`: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [Heading("Files that could not be read"), Items(damaged)] if damaged else []
    found = {(r.family, r.scale) for r in results} | {(s.family, s.scale) for s in speeds}
    for name, scale in sorted(found, key=lambda pair: (pair[1], pair[0] != "table1", pair[0])):
        try:
            family = load_family(name, scale)
        except ValueError as error:
            blocks += [Heading(f"{name}, {scale}"), Items([f"unused: there is no such family any more ({error})"])]
            continue
        blocks += _Section(family, results, speeds).blocks(out)
    return write_page(out, "Product-key memories: the experiments", blocks)


def _collected(folders: list[Path]) -> tuple[list[Result], list[Speeds], list[str]]:
    results: list[Result] = []
    speeds: list[Speeds] = []
    damaged: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a directory: give the --out of an experiment")
        some_results, some_speeds, some_damaged = find_results(folder)
        results += some_results
        speeds += some_speeds
        damaged += some_damaged
    return results, speeds, damaged


class _Section:
    """What the page says of one family at one scale."""

    def __init__(self, family: Family, results: list[Result], speeds: list[Speeds]) -> None:
        self.family = family
        own = _first_of_each(r for r in results if (r.family, r.scale) == (family.name, family.scale))
        self.own = own
        self.seeds = 1 + max((result.seed for result in own), default=0)
        self.data = next((result.recipe.data for result in own), None)
        self.standing = standing(family, own, self.seeds, self.data)
        self.results = self.standing.valid
        self.best = {cell.name: of_best_rate(cell, self.results) for cell in family.cells.values()}
        at_scale = [s for s in speeds if s.scale == family.scale]
        self.speeds = [s for s in at_scale if s.family == family.name and self._is_current(s)]
        self.stale_speeds = [s for s in at_scale if s.family == family.name and not self._is_current(s)]
        # table1 is the family whose models `speed` measures: either serves the other
        twin = {"speed": "table1", "table1": "speed"}.get(family.name)
        self.speeds = self.speeds or [s for s in at_scale if s.family == twin and self._is_current(s)]
        self.environments = [r.environment for r in self.results] + [s.environment for s in self.speeds]
        if family.name == "speed":
            self.trained = _Section(load_family("table1", family.scale), results, []).best

    def _is_current(self, speeds: Speeds) -> bool:
        """Whether some of the models measured are the family's, and those as they are now."""
        known = [self.family.cells[name] for name in speeds.recipes if name in self.family.cells]
        wanted = {cell.name: self.family.run(cell, cell.rates[0]).recipe for cell in known}
        return bool(wanted) and all(_model_of(speeds.recipes[name]) == _model_of(wanted[name]) for name in wanted)

    def blocks(self, out: Path) -> list[Block]:
        """The section, its pictures written to `out`."""
        family = self.family
        blocks: list[Block] = [
            Heading(f"{family.title} ({family.paper}), {family.scale}"),
            Paragraph(f"{family.name}: {family.about}. {self._places()}"),
        ]
        for texts in (claims(family, self.best, self.speeds), self._problems()):
            blocks += [Items(texts)] if texts else []
        blocks += [self._table(), *_papers_table(family.name), *self._pictures(out)]
        blocks += [self._sweeps(), self._commands()] if self.results else []
        return blocks

    # What is missing, mixed or old

    def _places(self) -> str:
        """The machine, when there is one alone."""
        places = {_place(environment) for environment in self.environments}
        return f"Measured on {places.pop()}." if len(places) == 1 else ""

    def _problems(self) -> list[str]:
        now = self.standing
        leftover = {r.file for r in self.own} - {r.file for r in now.valid}
        reasons = dict.fromkeys(sorted(leftover), "is of no run of the family as it is, or of a sweep not complete")
        problems = [f"unused: {file} {why}" for file, why in (reasons | now.unused).items()]
        problems += [f"unused: {s.file} measured other models than the family's" for s in self.stale_speeds]
        if now.missing and self.family.trains:
            problems.append(f"missing: {', '.join(run.name for run in now.missing)}")
        if self.family.trains:
            problems += [f"missing: {text}" for text in now.waiting]
        if self.family.measures_speed and not self.speeds:
            problems.append(f"missing: the speeds (pkmem experiment {self.family.name} --scale {self.family.scale})")
        for what, kinds in (
            ("commits", {str(environment.get("commit")) for environment in self.environments}),
            ("machines", {_place(environment) for environment in self.environments}),
        ):
            if len(kinds) > 1:
                problems.append(f"mixed: {len(kinds)} {what}: {'; '.join(sorted(kinds))}")
        return problems

    # The family's table

    def _table(self) -> Table:
        columns = ["model", "dense", "in memory", "perplexity", "bits per byte", "usage", "KL", "training tokens/s"]
        columns += ["prefill tokens/s", "decode tokens/s", "words/s", "learning rate", "seeds"]
        caption = "Ours: mean, and over several seeds ± standard deviation (lowest to highest)"
        return Table(caption, columns, [self._row(cell) for cell in self.family.cells.values()])

    def _row(self, cell: Cell) -> list[str]:
        results = self._trained(cell)
        row = [cell.label]
        for name, form in (
            ("dense_params", ","),
            ("memory_params", ","),
            ("perplexity", ".2f"),
            ("bits_per_byte", ".4f"),
        ):
            row.append(_over_seeds(results, name, form))
        row += [_of_memories(results, "usage", ".1%"), _of_memories(results, "kl", ".3f")]
        row.append(_over_seeds(results, "train_tokens_per_s", ",.0f"))
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_words_per_s"):
            measured = speeds_of(self.speeds, cell, name)
            row.append(Spread(measured).text(",.0f") if measured else _NONE)
        return [*row, results[0].rate if results else _NONE, str(len(results))]

    def _trained(self, cell: Cell) -> list[Result]:
        return self.trained[cell.name] if self.family.name == "speed" else self.best[cell.name]

    # Pictures

    def _pictures(self, out: Path) -> list[Block]:
        stem, family = f"{self.family.scale}_{self.family.name}", self.family
        made: list[Block] = []
        curves = {family.cells[name].label: _mean_curve(results) for name, results in self.best.items() if results}
        if curves:
            plot_learning_curves(curves, out / f"{stem}_curves.png")
            made.append(Picture(f"{stem}_curves.png", "Held-out bits per byte, mean over seeds, on part of the text"))
        if any("memory_0/usage" in record for records in curves.values() for record in records):
            plot_usage(curves, out / f"{stem}_usage.png")
            made.append(Picture(f"{stem}_usage.png", "Use of the first memory on that text"))
        series, levels = self._lines()
        if series:
            plot_lines(series, levels, out / f"{stem}_lines.png", family.plot["x"], "held-out bits per byte")
            made.append(
                Picture(f"{stem}_lines.png", f"Bits per byte by {family.plot['x']} and {family.plot['series']}")
            )
        points = self._points()
        if points and family.name == "speed":
            plot_speeds(points, out / f"{stem}_speeds.png")
            made.append(Picture(f"{stem}_speeds.png", "Perplexity against inference speed: low and right is good"))
        return made

    def _lines(self) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
        """Points by the family's x field, a series per value of another; models without a memory are levels."""
        series: dict[str, list[tuple[float, float]]] = {}
        levels = {}
        for name, results in self.best.items():
            if not results or not self.family.plot or self.family.cells[name].like is not None:
                continue  # what was trained for another time is no point of a line
            recipe, bits = results[0].recipe, statistics.mean(result.bits_per_byte for result in results)
            if not recipe.model.memory_layers:
                levels[self.family.cells[name].label] = bits
                continue
            x = attrgetter(self.family.plot["x"])(recipe)
            label = f"{self.family.plot['series'].split('.')[-1]} {attrgetter(self.family.plot['series'])(recipe)}"
            series.setdefault(label, []).append((x[0] if isinstance(x, list) else x, bits))
        return series, levels

    def _points(self) -> dict[str, tuple[float, float]]:
        points = {}
        for cell in self.family.cells.values():
            words, results = speeds_of(self.speeds, cell, "prefill_words_per_s"), self._trained(cell)
            if words and results and cell.like is None:
                perplexity = statistics.mean(result.summary["perplexity"] for result in results)
                points[cell.label] = statistics.mean(words), perplexity
        return points

    # Where every figure is from

    def _sweeps(self) -> Table:
        rows = []
        for cell in self.family.cells.values():
            tried = sorted(
                (r for r in self.results if r.cell == cell.name and r.seed == 0), key=lambda r: r.bits_per_byte
            )
            remark = ""
            try:
                best = best_of_sweep(self.family, cell, self.results)
                if at_edge(self.family, cell, best):
                    remark = "at the edge of those tried: a better one may lie beyond"
            except NotYetError as error:
                remark = f"not complete: {error}"
            rows.append([cell.label, "; ".join(f"{r.rate}: {r.bits_per_byte:.4f}" for r in tried) or _NONE, remark])
        return Table("Learning rates tried at seed 0, best first, in bits per byte", ["model", "rates", ""], rows)

    def _commands(self) -> Table:
        rows = [
            [r.file.name, _place(r.environment), str(r.environment.get("commit")), str(r.environment.get("command"))]
            for r in self.results
        ]
        return Table("Every run", ["result", "machine", "commit", "command"], rows)


def _first_of_each(results: Iterable[Result]) -> list[Result]:
    """Of several results of one run the first."""
    first: dict[str, Result] = {}
    for result in results:
        first.setdefault(f"{result.cell}__{result.rate}__seed{result.seed}", result)
    return list(first.values())


def _model_of(recipe: Recipe) -> tuple[Any, Any]:
    return recipe.model, recipe.memory if recipe.model.memory_layers else None


def _place(environment: dict[str, Any]) -> str:
    """Machine and torch in a few words."""
    cores = (
        f"{environment.get('cores')} cores of {environment.get('processor')} ({environment.get('torch_threads')} used)"
    )
    return f"{environment.get('gpu') or cores}, torch {environment.get('versions', {}).get('torch')}"


def _over_seeds(results: Sequence[Result], name: str, form: str) -> str:
    figures = tuple(result.summary[name] for result in results if name in result.summary)
    if not figures:
        return _NONE
    return format(figures[0], form) if len(set(figures)) == 1 else Spread(figures).text(form)


def _of_memories(results: Sequence[Result], name: str, form: str) -> str:
    """A figure of each memory of a model, in order of the blocks."""
    texts: list[str] = []
    while any(f"memory_{len(texts)}/{name}" in result.summary for result in results):
        texts.append(_over_seeds(results, f"memory_{len(texts)}/{name}", form))
    return ", ".join(texts) or _NONE


def _mean_curve(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The held-out records of several seeds, evaluation by evaluation, as far as all have come."""
    curve = []
    for records in zip(*(result.held_out for result in results), strict=False):
        names = [name for name, figure in records[0].items() if isinstance(figure, int | float)]
        means = {name: statistics.mean(record[name] for record in records) for name in names}
        curve.append(means | {"kind": "held_out"})
    return curve


def _papers_table(family: str) -> list[Block]:
    """What the paper reports, where it does."""
    document = yaml.safe_load((config_folder() / "paper_results.yaml").read_text())
    if family not in document["families"]:
        return []
    table = document["families"][family]
    rows = [[_NONE if figure is None else str(figure) for figure in row] for row in table["rows"]]
    return [Table(f"The paper's. {table['caption']} ({document['source']})", [str(c) for c in table["columns"]], rows)]
