"""What is to be run and what was found: a JSON file per run, and the best learning rate of those tried."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pkmem.training.files import load_json, save_json

METHODS = ("memory", "full", "lora")
LABELS = {"memory": "memory", "full": "full fine-tuning", "lora": "LoRA"}
FIRST_RATES = {  # of each sweep, which goes on where the best of them is the lowest or the highest
    "sweep": {"memory": (0.01, 0.03, 0.1), "full": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)},
    "text_sweep": {"memory": (0.001, 0.003, 0.01), "lora": (3e-4, 1e-3, 3e-3)},
}
MOST_RATES = 5
ENOUGH = 0.97  # recall at which methods are compared


@dataclass(frozen=True)
class Run:
    """One model to teach.

    Args:
        cell: what it answers, one of `cells.CELLS`.
        method: one of `METHODS`.
        rate: learning rate.
        seed: of facts, order and whatever is drawn.
        threads: of the process.
    """

    cell: str
    method: str
    rate: float
    seed: int = 0
    threads: int = 1

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
    """The learning rates of a sweep: three, and beyond the best of them while it is at the edge."""
    rates = list(FIRST_RATES[sweep][method])
    while len(rates) < MOST_RATES:
        losses = {run.rate: _loss(document) for run, document in found.items() if _is_of(run, sweep, method)}
        if any(rate not in losses for rate in rates):
            break
        best = min(rates, key=lambda rate: losses[rate])
        if best not in (min(rates), max(rates)):
            break
        rates.append(_beyond(best, rises=best == max(rates)))
    return rates


def best_rate(found: dict[Run, dict[str, Any]], sweep: str, method: str) -> float | None:
    """The best learning rate of a sweep; None while some have not been tried."""
    losses = {run.rate: _loss(document) for run, document in found.items() if _is_of(run, sweep, method)}
    rates = rates_to_try(found, sweep, method)
    return min(rates, key=lambda rate: losses[rate]) if all(rate in losses for rate in rates) else None


def _is_of(run: Run, sweep: str, method: str) -> bool:
    return (run.cell, run.method, run.seed) == (sweep, method, 0)


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


def _loss(document: dict[str, Any]) -> tuple[float, float]:
    """What a sweep makes small.

    Of facts, what else changed at the first epoch with enough recall (the product of both KL, so that neither outweighs
    the other); without enough recall, a rate is worse than all with it, by what it lacks. Of text, the held-out bits.
    """
    if "epochs" not in document:
        return 0.0, document["figures"]["held_out_bits_per_byte"]
    reached = first_with(document["epochs"], ENOUGH)
    if reached is None:
        return 1.0, -max((epoch["recall"] for epoch in document["epochs"]), default=0.0)
    return 0.0, reached["near_miss_kl"] * reached["background_kl"]


def as_text(found: dict[str, Any]) -> str:
    """A run's figures in a line."""
    return json.dumps(found["figures"])
