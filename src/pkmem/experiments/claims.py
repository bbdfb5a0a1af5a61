"""What a family's results say of the paper's claims: bits per byte saved, and the ratio of speeds, pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from pkmem.experiments.family import Cell, Family
from pkmem.experiments.results import Result, Speeds
from pkmem.lm.config import ModelConfig


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    figures: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.mean(self.figures)

    def text(self, form: str) -> str:
        """The mean, and with several seeds the standard deviation and the range."""
        if len(self.figures) == 1:
            return format(self.mean, form)
        low, high = (format(edge, form) for edge in (min(self.figures), max(self.figures)))
        return f"{self.mean:{form}} ± {statistics.stdev(self.figures):{form.lstrip('+')}} ({low} to {high})"


def speeds_of(speeds: Sequence[Speeds], cell: Cell, name: str) -> tuple[float, ...]:
    """A cell's speeds, one per measurement that has it.

    Args:
        speeds: measurements of the cell's family.
        cell: a cell trained for another time has the speeds of the one it is like.
        name: prefill_tokens_per_s, decode_tokens_per_s or prefill_words_per_s.
    """
    model = cell.like or cell.name
    return tuple(s.models[model][name] for s in speeds if name in s.models.get(model, {}))


def claims(family: Family, best: Mapping[str, list[Result]], speeds: Sequence[Speeds]) -> list[str]:
    """A sentence for each pair of models that a claim of the paper is about.

    The pairs: L layers with a memory and 2 L without (figure 4, table 1), a model and its rival at equal training
    seconds, and the points that both series of a family have, such as product and flat keys of one size (table 4).

    Args:
        family: at one scale.
        best: per cell its results at its best rate, by seed; may be empty.
        speeds: measurements of the family's models.
    """
    if not family.trains:
        return []  # they are those of the family that trains these models
    found = _Evidence(family, best, speeds)
    texts: list[str] = []
    for memory in family.cells.values():
        texts += [
            found.claim(memory, deep) for deep in family.cells.values() if _is_twice_as_deep(family, deep, memory)
        ]
        rivals = (rival for rival in family.cells.values() if rival.match_seconds_of == memory.name)
        texts += [found.bits_saved(memory, rival) + "." for rival in rivals]
    return texts + [found.bits_saved(ours, theirs) + "." for ours, theirs in _twins(family)]


def _model(family: Family, cell: Cell) -> ModelConfig:
    return family.run(cell, cell.rates[0]).recipe.model


def _is_twice_as_deep(family: Family, deep: Cell, memory: Cell) -> bool:
    a, b = _model(family, deep), _model(family, memory)
    same_width = a.width == b.width and deep.like is None and memory.like is None
    return same_width and bool(b.memory_layers) and not a.memory_layers and a.num_layers == 2 * b.num_layers


def _twins(family: Family) -> list[tuple[Cell, Cell]]:
    """Where a family has two series: the cells of one point of both."""
    if not family.plot:
        return []
    series: dict[str, dict[str, Cell]] = {}
    for cell in family.cells.values():
        recipe = family.run(cell, cell.rates[0]).recipe
        if cell.like is None and recipe.model.memory_layers:
            x, kind = (str(attrgetter(family.plot[axis])(recipe)) for axis in ("x", "series"))
            series.setdefault(kind, {})[x] = cell
    if len(series) != 2:
        return []
    ours, theirs = series.values()
    return [(cell, theirs[x]) for x, cell in ours.items() if x in theirs]


@dataclass(frozen=True)
class _Evidence:
    """What was trained and measured of a family."""

    family: Family
    best: Mapping[str, list[Result]]
    speeds: Sequence[Speeds]

    def claim(self, memory: Cell, deep: Cell) -> str:
        """The paper's claim for a pair, and plainly whether it holds."""
        saved, ratios = self._saved(memory, deep), self._speed_ratios(memory, deep)
        fast = (
            f"{ratios[0]:.2f}x as fast in prefill, {ratios[1]:.2f}x in decode" if ratios else "speeds not measured yet"
        )
        text = f"{self.bits_saved(memory, deep)}; {fast}."
        if not saved or not ratios:
            return f"{text} Whether the claim holds cannot be said yet."
        if statistics.mean(saved) >= 0 and min(ratios) > 1:
            won = sum(bits >= 0 for bits in saved)
            text += " The claim holds" + (
                f" in the mean, but at {won} of {len(saved)} seeds." if won < len(saved) else "."
            )
        else:
            text += " The claim does not hold."
        return text + self._weakness(memory, deep)

    def _weakness(self, memory: Cell, deep: Cell) -> str:
        """A warning where twice the layers are no better than the layers alone: then the claim is easy."""
        depth = _model(self.family, memory)
        for cell in self.family.cells.values():
            model = _model(self.family, cell)
            is_shallow = (model.num_layers, model.width, model.memory_layers) == (depth.num_layers, depth.width, [])
            if is_shallow and cell.like is None:
                gained = self._saved(deep, cell)
                if gained and statistics.mean(gained) <= 0:
                    return f" But {deep.label} are no better than {cell.label} here, so that it says little."
        return ""

    def bits_saved(self, model: Cell, rival: Cell) -> str:
        """What a model saves over another, and at how many seeds."""
        pair, saved = f"{model.label} against {rival.label}", self._saved(model, rival)
        if not saved:
            return f"{pair}: not both trained yet"
        won = f"better at {sum(bits > 0 for bits in saved)} of {len(saved)} seeds"
        return f"{pair}: {Spread(tuple(saved)).text('+.4f')} bits per byte saved, {won}"

    def _saved(self, model: Cell, rival: Cell) -> list[float]:
        """Bits per byte a model saves over another, at each seed that both have."""
        theirs = {result.seed: result.bits_per_byte for result in self.best[rival.name]}
        return [theirs[r.seed] - r.bits_per_byte for r in self.best[model.name] if r.seed in theirs]

    def _speed_ratios(self, memory: Cell, deep: Cell) -> list[float]:
        """Prefill and decode, each the mean over measurements of the ratio within one."""
        ratios = []
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            pairs = zip(speeds_of(self.speeds, memory, name), speeds_of(self.speeds, deep, name), strict=True)
            within = [ours / theirs for ours, theirs in pairs]
            ratios += [statistics.mean(within)] if within else []
        return ratios
