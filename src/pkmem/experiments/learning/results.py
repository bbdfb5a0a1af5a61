"""What is to be run and what was found: a JSON file per run, and the best learning rate of those tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pkmem.files.documents import load_json, save_json

METHODS = ("memory", "full", "lora")
LABELS = {"memory": "memory", "full": "full fine-tuning", "lora": "LoRA"}
FIRST_RATES = {  # of each sweep, which goes on where the best of them is the lowest or the highest
    "compare": {"memory": (0.02, 0.05, 0.1), "full": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)},
    "text_sweep": {"memory": (0.001, 0.003, 0.01), "lora": (3e-4, 1e-3, 3e-3)},
}
MOST_RATES = 5
# `pkmem.learn`'s own, as it is used; the sweep beside it shows what others do.
OWN_RATES = {("compare", "memory"): 0.05}
ENOUGH = 0.97  # recall at which methods are compared
AS_WELL = 0.75  # of the most that a method recalls in other phrasings: what its best rate has to reach


@dataclass(frozen=True)
class Run:
    """One model to teach.

    Args:
        cell: what it answers, one of `cells.CELLS`.
        method: one of `METHODS`.
        rate: learning rate.
        seed: of facts, order and whatever is drawn.
    """

    cell: str
    method: str
    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.cell}-{self.method}-lr{self.rate:g}-seed{self.seed}"


def save_found(folder: Path, run: Run, found: dict[str, Any]) -> None:
    """Writes what a run found, at once."""
    save_json(folder / f"{run.name}.json", asdict(run) | found)


def load_found(folder: Path) -> dict[Run, dict[str, Any]]:
    """What all runs found whose files are in a folder.

    Raises:
        ValueError: a file is damaged, or of something else.
    """
    found = {}
    for file in sorted(folder.glob("*-lr*-seed*.json")):
        document = load_json(file)
        try:
            run = Run(**{name: document[name] for name in Run.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of `pkmem experiment learn` ({error}): move it away") from error
        found[run] = document
    return found


def rates_to_try(found: dict[Run, dict[str, Any]], sweep: str, method: str) -> list[float]:
    """The learning rates of a sweep: three, and beyond the best of them while it is at the edge, if it is to be taken."""
    rates = list(FIRST_RATES[sweep][method])
    while len(rates) < MOST_RATES and (sweep, method) not in OWN_RATES:
        losses = _losses(found, sweep, method)
        if any(rate not in losses for rate in rates):
            break
        best = min(rates, key=lambda rate: losses[rate])
        if best not in (min(rates), max(rates)):
            break
        rates.append(_beyond(best, rises=best == max(rates)))
    return rates


def best_rate(found: dict[Run, dict[str, Any]], sweep: str, method: str) -> float | None:
    """The best learning rate of a sweep, None while some have not been tried; or a method's own."""
    if (sweep, method) in OWN_RATES:
        return OWN_RATES[sweep, method]
    losses = _losses(found, sweep, method)
    rates = rates_to_try(found, sweep, method)
    return min(rates, key=lambda rate: losses[rate]) if all(rate in losses for rate in rates) else None


def _losses(found: dict[Run, dict[str, Any]], sweep: str, method: str) -> dict[float, tuple[float, ...]]:
    """What a sweep makes small, by rate; a sweep is of seed 0.

    Of text, the held-out bits per byte. Of facts, what else changed at the first epoch with enough recall: the product
    of both KL, so that neither outweighs the other. A rate that lets the model understand clearly fewer phrasings than
    the method's best one comes behind those that do not, and one that does not teach enough behind all.
    """
    tried = {run.rate: doc for run, doc in found.items() if (run.cell, run.method, run.seed) == (sweep, method, 0)}
    if sweep == "text_sweep":
        return {rate: (document["figures"]["held_out_bits_per_byte"],) for rate, document in tried.items()}
    reached = {rate: first_with(document["epochs"], ENOUGH) for rate, document in tried.items()}
    most = max((epoch["held_out"] for epoch in reached.values() if epoch is not None), default=0.0)
    losses: dict[float, tuple[float, ...]] = {}
    for rate, epoch in reached.items():
        if epoch is None:
            losses[rate] = 2, -max((earlier["recall"] for earlier in tried[rate]["epochs"]), default=0.0)
        elif epoch["held_out"] < AS_WELL * most:
            losses[rate] = 1, -epoch["held_out"]
        else:
            losses[rate] = 0, epoch["near_miss_kl"] * epoch["background_kl"]
    return losses


def _beyond(rate: float, rises: bool) -> float:
    """The next of 1e-5, 3e-5, 1e-4, ..., up or down."""
    factor = 3 if f"{rate:e}".startswith("1") == rises else 10 / 3
    return float(f"{rate * factor if rises else rate / factor:.0e}")


def first_with(epochs: Iterable[dict[str, float]], recall: float) -> dict[str, float] | None:
    """The first epoch that reached a recall; None if none did."""
    return next((epoch for epoch in epochs if epoch["recall"] >= recall), None)


def last_within(epochs: Iterable[dict[str, float]], seconds: float) -> dict[str, float] | None:
    """The last epoch that ended within so many seconds of teaching; None if none did."""
    within = [epoch for epoch in epochs if epoch["seconds"] <= seconds]
    return within[-1] if within else None
