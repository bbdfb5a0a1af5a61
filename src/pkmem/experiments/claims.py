"""What a family's results say of the paper's claims, pair by pair: what a model has over its rival, and their speeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pkmem.experiments.family import Cell, Family, Metric
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


def gained_over(rival: Sequence[Result], model: Sequence[Result], metric: Metric) -> list[float]:
    """What a model has over a rival at each seed that both have, > 0 where it is better.

    Args:
        rival, model: results of each at one rate, one a seed; may be empty.
        metric: what they are compared by.
    """
    theirs = {result.seed: metric.loss(result.summary) for result in rival}
    return [theirs[r.seed] - metric.loss(r.summary) for r in model if r.seed in theirs]


def claims(family: Family, best: Mapping[str, list[Result]], speeds: Sequence[Speeds]) -> list[str]:
    """A sentence for each pair of a family: what a model has over its rival, and how much faster it is.

    Args:
        family: at one scale.
        best: per cell its results at its best rate, by seed; may be empty.
        speeds: measurements of the family's models.
    """
    if not family.trains:
        return []  # they are those of the family that trains these models
    found = _Evidence(family, best, speeds)
    texts = []
    for model, rival in ((family.cells[name], family.cells[other]) for name, other in family.pairs):
        # a model trained for another time is inferred from as fast as its like: a pair with it is about training
        with_speed = family.measures_speed and model.like is None and rival.like is None
        texts.append(found.claim(model, rival) if with_speed else found.gain(model, rival) + ".")
    return texts


@dataclass(frozen=True)
class _Evidence:
    """What was trained and measured of a family."""

    family: Family
    best: Mapping[str, list[Result]]
    speeds: Sequence[Speeds]

    def claim(self, model: Cell, rival: Cell) -> str:
        """The paper's claim for a pair, at least as good and faster, and plainly whether it holds."""
        gained, ratios = self._gained(model, rival), self._speed_ratios(model, rival)
        fast = (
            f"{ratios[0]:.2f}x as fast in prefill, {ratios[1]:.2f}x in decode" if ratios else "speeds not measured yet"
        )
        text = f"{self.gain(model, rival)}; {fast}."
        if not gained or not ratios:
            return f"{text} Whether the claim holds cannot be said yet."
        if statistics.mean(gained) >= 0 and min(ratios) > 1:
            won = sum(figure >= 0 for figure in gained)
            text += " The claim holds" + (
                f" in the mean, but at {won} of {len(gained)} seeds." if won < len(gained) else "."
            )
        else:
            text += " The claim does not hold."
        return text + self._weakness(model, rival)

    def _weakness(self, model: Cell, rival: Cell) -> str:
        """A warning where a rival with more layers is no better than without them: then the claim is easy."""
        depth = self._decoder(model)
        for cell in self.family.cells.values():
            shape = self._decoder(cell)
            is_shallow = (shape.num_layers, shape.width, shape.memory_layers) == (depth.num_layers, depth.width, [])
            if is_shallow and cell.like is None and cell != rival:
                gained = self._gained(rival, cell)
                if gained and statistics.mean(gained) <= 0:
                    return f" But {rival.label} are no better than {cell.label} here, so that it says little."
        return ""

    def _decoder(self, cell: Cell) -> ModelConfig:
        return self.family.run(cell, cell.rates[0]).recipe.model

    def gain(self, model: Cell, rival: Cell) -> str:
        """What a model has over another by the family's metric, and at how many seeds."""
        pair, gained, metric = f"{model.label} against {rival.label}", self._gained(model, rival), self.family.metric
        if not gained:
            return f"{pair}: not both trained yet"
        won = f"better at {sum(figure > 0 for figure in gained)} of {len(gained)} seeds"
        verb = "gained" if metric.greater_is_better else "saved"
        return f"{pair}: {Spread(tuple(gained)).text('+.4f')} {metric.title} {verb}, {won}"

    def _gained(self, model: Cell, rival: Cell) -> list[float]:
        return gained_over(self.best[rival.name], self.best[model.name], self.family.metric)

    def _speed_ratios(self, model: Cell, rival: Cell) -> list[float]:
        """Prefill and decode, each the mean over measurements of the ratio within one."""
        ratios = []
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            pairs = zip(speeds_of(self.speeds, model, name), speeds_of(self.speeds, rival, name), strict=True)
            within = [ours / theirs for ours, theirs in pairs]
            ratios += [statistics.mean(within)] if within else []
        return ratios
