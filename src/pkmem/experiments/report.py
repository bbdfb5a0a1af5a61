"""The results of experiments, beside the paper's, as a page."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from pkmem.experiments.claims import Spread, claims, gained_over, speeds_of
from pkmem.experiments.environment import machine_of
from pkmem.experiments.family import Cell, Family, config_folder, load_family
from pkmem.experiments.page import Block, Heading, Items, Paragraph, Picture, Table, is_page, write_page
from pkmem.experiments.plots import plot_by_text, plot_learning_curves, plot_lines, plot_speeds, plot_usage
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
_TOKENS = "training.num_tokens"
_REPEATED = "nats per repeated token"
_FIGURES = (  # of a trained model, in the order of the table: key, title, format
    ("dense_params", "dense", ","),
    ("memory_params", "in memory", ","),
    ("perplexity", "perplexity", ".2f"),
    ("bits_per_byte", "bits per byte", ".4f"),
    ("repeated_loss", _REPEATED, ".3f"),
    ("new_loss", "nats per new token", ".3f"),
    ("recall", "recall", ".1%"),
    ("bits_per_fact", "bits per fact", ".2f"),
    ("bits_per_param", "stored bits per parameter", ".3f"),
    ("bits_per_dense_param", "per dense parameter", ".3f"),
    ("bits_per_active_param", "per active parameter", ".3f"),
    ("memory_*/usage", "usage", ".1%"),
    ("memory_*/kl", "KL", ".3f"),
    ("train_tokens_per_s", "training tokens/s", ",.0f"),
)
_SPEEDS = (
    ("prefill_tokens_per_s", "prefill tokens/s"),
    ("decode_tokens_per_s", "decode tokens/s"),
    ("prefill_words_per_s", "words/s"),
)


def write_report(folders: Iterable[Path], out: Path) -> Path:
    """Writes the page of all results in some directories.

    Args:
        folders: with results, possibly from several machines; of two results of one run the first counts.
        out: the page's directory: index.html with all pictures inside, index.md without them, the PNGs.

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
            f"no result in {where}: make one with `pkmem experiment NAME --out {folders[0]}`"
            + "".join(f"; {message}" for message in damaged)
        )
    if out.exists() and any(out.iterdir()) and not is_page(out):
        raise ValueError(f"{out} is there and holds no page of `pkmem report`: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [Heading("Files that could not be read"), Items(damaged)] if damaged else []
    papers = yaml.safe_load((config_folder() / "paper_results.yaml").read_text(encoding="utf-8"))
    order = list(papers["families"])  # the paper's, then what is beyond it
    found = {(r.family, r.scale) for r in results} | {(s.family, s.scale) for s in speeds}
    for name, scale in sorted(found, key=lambda pair: (pair[1], [*order, pair[0]].index(pair[0]), pair[0])):
        try:
            family = load_family(name, scale)
        except ValueError as error:
            blocks += [Heading(f"{name}, {scale}"), Items([f"unused: there is no such family any more ({error})"])]
            continue
        blocks += _Section(family, results, speeds).blocks(out, papers)
    return write_page(out, "Product-key memories: the experiments", blocks)


def _collected(folders: list[Path]) -> tuple[list[Result], list[Speeds], list[str]]:
    """All results, of several of one run the first; the speeds; and what is wrong with files."""
    first: dict[tuple[str, str, str, str, int], Result] = {}
    speeds: list[Speeds] = []
    damaged: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a directory: give the --out of an experiment")
        some_results, some_speeds, some_damaged = find_results(folder)
        for r in some_results:
            first.setdefault((r.family, r.scale, r.cell, r.rate, r.seed), r)
        speeds += some_speeds
        damaged += some_damaged
    return list(first.values()), speeds, damaged


class _Section:
    """What the page says of one family at one scale."""

    def __init__(self, family: Family, results: list[Result], speeds: list[Speeds]) -> None:
        self.family = family
        self.own = own = [r for r in results if (r.family, r.scale) == (family.name, family.scale)]
        seeds = 1 + max((result.seed for result in own), default=0)
        data = next((result.recipe.data for result in own), None)
        self.standing = standing(family, own, seeds, data)
        self.results = self.standing.valid
        self.best = {cell.name: of_best_rate(family, cell, self.results) for cell in family.cells.values()}
        current = [s for s in speeds if s.scale == family.scale and self._is_current(s)]
        # those that another family measured of the same models serve where there are none of its own
        self.speeds = [s for s in current if s.family == family.name] or current
        measured = [s for s in speeds if (s.family, s.scale) == (family.name, family.scale)]
        self.stale_speeds = [s for s in measured if s not in current]
        self.environments = [r.environment for r in self.results] + [s.environment for s in self.speeds]
        self.trained = self.best
        if family.cells_of:
            self.trained = _Section(load_family(family.cells_of, family.scale), results, []).best

    def _is_current(self, speeds: Speeds) -> bool:
        """Whether some of the models measured are the family's, and those as they are now."""
        known = [self.family.cells[name] for name in speeds.recipes if name in self.family.cells]
        wanted = {cell.name: self.family.run(cell, cell.rates[0]).recipe for cell in known}
        return bool(wanted) and all(_model_of(speeds.recipes[name]) == _model_of(wanted[name]) for name in wanted)

    def blocks(self, out: Path, papers: dict[str, Any]) -> list[Block]:
        """The section, its pictures written to `out`, beside what the paper reports."""
        family = self.family
        blocks: list[Block] = [
            Heading(f"{family.title} ({family.paper}), {family.scale}"),
            Paragraph(f"{family.name}: {family.about}. {self._places()}"),
        ]
        for texts in (claims(family, self.best, self.speeds), self._problems()):
            blocks += [Items(texts)] if texts else []
        blocks += [self._table(), *_papers_table(family.name, papers), *self._pictures(out)]
        blocks += [self._sweeps(), self._commands()] if self.results else []
        return blocks

    # What is missing, mixed or old

    def _places(self) -> str:
        """The machine, when there is one alone."""
        places = {machine_of(environment) for environment in self.environments}
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
            ("machines", {machine_of(environment) for environment in self.environments}),
        ):
            if len(kinds) > 1:
                problems.append(f"mixed: {len(kinds)} {what}: {'; '.join(sorted(kinds))}")
        return problems

    # The family's table

    def _table(self) -> Table:
        rows = [self._row(cell) for cell in self.family.cells.values()]
        columns = [title for title in rows[0] if any(row[title] != _NONE for row in rows)]
        caption = "Ours: mean, and over several seeds ± standard deviation (lowest to highest)"
        if _REPEATED in columns:
            caption += "; a repeated token ends a pair of tokens that stood before in its context, a new one does not"
        return Table(caption, columns, [[row[title] for title in columns] for row in rows])

    def _row(self, cell: Cell) -> dict[str, str]:
        """A model's figures by the titles of their columns."""
        results = self.trained[cell.name]
        row = {"model": cell.label} | {title: _over_seeds(results, name, form) for name, title, form in _FIGURES}
        for name, title in _SPEEDS:
            measured = speeds_of(self.speeds, cell, name)
            row[title] = Spread(measured).text(",.0f") if measured else _NONE
        return row | {"learning rate": results[0].rate if results else _NONE, "seeds": str(len(results))}

    # Pictures

    def _pictures(self, out: Path) -> list[Block]:
        stem, family = f"{self.family.scale}_{self.family.name}", self.family
        made: list[Block] = []
        curves = {family.cells[name].label: _mean_curve(results) for name, results in self.best.items() if results}
        if any(curves.values()):
            plot_learning_curves(curves, out / f"{stem}_curves.png")
            made.append(Picture(f"{stem}_curves.png", "Held-out bits per byte, mean over seeds, on part of the text"))
        if any("memory_0/usage" in record for records in curves.values() for record in records):
            plot_usage(curves, out / f"{stem}_usage.png")
            made.append(Picture(f"{stem}_usage.png", "Use of the first memory on that text"))
        bits, saved = self._by_text()
        if saved:
            plot_by_text(bits, saved, out / f"{stem}_text.png")
            made.append(Picture(f"{stem}_text.png", "Bits per byte, and those that a memory saves, by training tokens"))
        series, levels = self._lines()
        if series:
            x, by, title = family.plot["x"], family.plot["series"], family.metric.title
            plot_lines(series, levels, out / f"{stem}_lines.png", x, f"held-out {title}")
            made.append(Picture(f"{stem}_lines.png", f"{title.capitalize()} by {x} and {by}"))
        points = self._points()
        if points and family.cells_of:
            plot_speeds(points, out / f"{stem}_speeds.png")
            made.append(Picture(f"{stem}_speeds.png", "Perplexity against inference speed: low and right is good"))
        return made

    def _lines(self) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
        """Points by the family's x field, a series per value of another; models without a memory are levels."""
        series: dict[str, list[tuple[float, float]]] = {}
        levels = {}
        for name, results in self.best.items():
            if not results or self.family.plot.get("x", _TOKENS) == _TOKENS or self.family.cells[name].like is not None:
                continue  # what was trained for another time is no point of a line
            recipe, figure = results[0].recipe, statistics.mean(r.summary[self.family.metric.name] for r in results)
            if not recipe.model.memory_layers:
                levels[self.family.cells[name].label] = figure
                continue
            x = attrgetter(self.family.plot["x"])(recipe)
            series.setdefault(self._series(name), []).append((x[0] if isinstance(x, list) else x, figure))
        return series, levels

    def _by_text(self) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
        """Of a family whose x are training tokens: figures by them, and what is saved over the rival of each pair."""
        bits: dict[str, list[tuple[float, float]]] = {}
        saved: dict[str, list[tuple[float, float]]] = {}
        if self.family.plot.get("x") != _TOKENS:
            return bits, saved
        means = {
            name: statistics.mean(r.summary[self.family.metric.name] for r in results)
            for name, results in self.best.items()
            if results
        }
        for name, figure in means.items():
            if self.family.cells[name].like is None:
                bits.setdefault(self._series(name), []).append((self._tokens(name), figure))
        for name, rival in self.family.pairs:
            if gained := gained_over(self.best[rival], self.best[name], self.family.metric):
                at_equal = "tokens" if self.family.cells[rival].like is None else "seconds"
                series = saved.setdefault(f"{self._series(name)}, at equal {at_equal}", [])
                series.append((self._tokens(name), statistics.mean(gained)))
        return bits, saved

    def _series(self, cell: str) -> str:
        recipe, field = self.best[cell][0].recipe, self.family.plot["series"]
        return f"{field.split('.')[-1]} {attrgetter(field)(recipe)}" if recipe.model.memory_layers else "no memory"

    def _tokens(self, cell: str) -> int:
        tokens: int = attrgetter(_TOKENS)(self.best[cell][0].recipe)
        return tokens

    def _points(self) -> dict[str, tuple[float, float]]:
        points = {}
        for cell in self.family.cells.values():
            words, results = speeds_of(self.speeds, cell, "prefill_words_per_s"), self.trained[cell.name]
            if words and results and cell.like is None:
                perplexity = statistics.mean(result.summary["perplexity"] for result in results)
                points[cell.label] = statistics.mean(words), perplexity
        return points

    # Where every figure is from

    def _sweeps(self) -> Table:
        rows, metric = [], self.family.metric
        for cell in self.family.cells.values():
            tried = [r for r in self.results if r.cell == cell.name and r.seed == 0]
            tried.sort(key=lambda r: metric.loss(r.summary))
            remark = ""
            try:
                best = best_of_sweep(self.family, cell, self.results)
                if at_edge(self.family, cell, best):
                    remark = "at the edge of those tried: a better one may lie beyond"
            except NotYetError as error:
                remark = f"not complete: {error}"
            texts = [f"{r.rate}: {r.summary[metric.name]:.4f}" for r in tried]
            rows.append([cell.label, "; ".join(texts) or _NONE, remark])
        return Table(f"Learning rates tried at seed 0, best first, in {metric.title}", ["model", "rates", ""], rows)

    def _commands(self) -> Table:
        rows = [
            [
                r.file.name,
                machine_of(r.environment),
                str(r.environment.get("commit")),
                str(r.environment.get("command")),
            ]
            for r in self.results
        ]
        return Table("Every run", ["result", "machine", "commit", "command"], rows)


def _model_of(recipe: Recipe) -> tuple[Any, Any]:
    return recipe.model, recipe.memory if recipe.model.memory_layers else None


def _over_seeds(results: Sequence[Result], pattern: str, form: str) -> str:
    """A figure of a model, or one of each of its memories in order of the blocks; an older result may lack it."""
    texts = []
    for name in dict.fromkeys(name for result in results for name in fnmatch.filter(result.summary, pattern)):
        figures = tuple(result.summary[name] for result in results if name in result.summary)
        text = format(figures[0], form) if len(set(figures)) == 1 else Spread(figures).text(form)
        texts.append(text if len(figures) == len(results) else f"{text}, {len(figures)} of {len(results)} seeds")
    return ", ".join(texts) or _NONE


def _mean_curve(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The held-out records of several seeds, evaluation by evaluation, as far as all have come."""
    curve = []
    for records in zip(*(result.held_out for result in results), strict=False):
        shared = set.intersection(*(set(record) for record in records))  # an older result may lack some
        names = [name for name, figure in records[0].items() if name in shared and isinstance(figure, int | float)]
        means = {name: statistics.mean(record[name] for record in records) for name in names}
        curve.append(means | {"kind": "held_out"})
    return curve


def _papers_table(family: str, papers: dict[str, Any]) -> list[Block]:
    """What the paper reports, where it does."""
    if family not in papers["families"]:
        return []
    table = papers["families"][family]
    rows = [[_NONE if figure is None else str(figure) for figure in row] for row in table["rows"]]
    return [Table(f"The paper's. {table['caption']} ({papers['source']})", [str(c) for c in table["columns"]], rows)]
