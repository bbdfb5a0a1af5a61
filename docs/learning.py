"""The tables and the picture of what teaching a pretrained model costs, for `teach.md`; docs/figures.py writes them.

All is read from experiments/results/learn, which `pkmem experiment learn` makes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pkmem.experiments.learning.kinds import KINDS
from pkmem.experiments.learning.results import (
    ENOUGH,
    LABELS,
    METHODS,
    Run,
    best_rate,
    first_with,
    last_within,
    load_found,
)

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "learn"
COLORS = {"memory": "#1f5fa8", "full": "#d9730d", "lora": "#2e7d4f"}
NOT_YET = "*Not measured yet.*\n"

Found = dict[Run, dict[str, Any]]
COSTS = {  # of an epoch: key, title, form
    "recall": ("recall as taught", "{:.0%}"),
    "held_out": ("recall, other phrasings", "{:.0%}"),
    "near_miss_kl": ("near misses, KL", "{:.2f}"),
    "background_kl": ("Python reference, KL", "{:.4f}"),
    "background_nats": ("Python reference, nats per token more", "{:+.4f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def tables() -> dict[str, str]:
    """Every table by name, as Markdown."""
    found = load_found(RESULTS)
    made = (at_equal_recall, at_equal_seconds, by_kind, machine_costs, more_facts, in_sequence, on_text, rates)
    return {f"learn_{table.__name__}": _or_not_yet(table, found) for table in made}


def _or_not_yet(table: Callable[[Found], list[list[str]]], found: Found) -> str:
    rows = table(found)
    return _table(rows) if len(rows) > 1 else NOT_YET


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def runs_of(found: Found, cell: str, method: str) -> list[dict[str, Any]]:
    """What a cell's runs of a method found, a seed after another; of the comparison, those at the method's best rate."""
    best = best_rate(found, cell, method) if cell == "compare" else None
    runs = [
        run for run in found if (run.cell, run.method) == (cell, method) and (cell != "compare" or run.rate == best)
    ]
    return [found[run] for run in sorted(runs, key=lambda run: run.seed)]


def at_equal_recall(found: Found) -> list[list[str]]:
    """Each method at the first epoch that recalls enough of what was taught."""
    return _compared(found, lambda epochs: first_with(epochs, ENOUGH))


def at_equal_seconds(found: Found) -> list[list[str]]:
    """Each method after as many seconds as the memory needs."""
    reached = [first_with(run["epochs"], ENOUGH) for run in runs_of(found, "compare", "memory")]
    if not reached or None in reached:
        return [[]]
    seconds = statistics.mean(epoch["seconds"] for epoch in reached if epoch is not None)
    return _compared(found, lambda epochs: last_within(epochs, seconds * 1.001))


def _compared(found: Found, choose: Callable[[list[dict[str, float]]], dict[str, float] | None]) -> list[list[str]]:
    rows = [["", *(title for title, _ in COSTS.values())]]
    compared = {("compare", method): LABELS[method] for method in METHODS}
    for (cell, method), name in (compared | {("kept", "full"): "full fine-tuning, near misses kept"}).items():
        epochs = [choose(run["epochs"]) for run in runs_of(found, cell, method)]
        reached = [epoch for epoch in epochs if epoch is not None]
        if not epochs:
            continue
        label = name if len(reached) == len(epochs) else f"{name} ({len(reached)} of {len(epochs)})"
        rows.append([label, *(_mean([epoch[key] for epoch in reached], form) for key, (_, form) in COSTS.items())])
    return rows


def by_kind(found: Found) -> list[list[str]]:
    """What each method knows at its end, by kind of facts."""
    asked = {"recall": "as taught", "held_out": "other phrasings", "reversed": "reversed", "chat": "chat"}
    rows = [["", *asked.values()]]
    for method in METHODS:
        runs = [run["figures"] for run in runs_of(found, "compare", method)]
        for kind in KINDS if runs else ():
            shares = [[run[key][kind] for run in runs] for key in asked]
            rows.append([f"{LABELS[method]}, {kind}", *(_mean(share, "{:.0%}") for share in shares)])
    return rows


def machine_costs(found: Found) -> list[list[str]]:
    """Time, memory and files of each method, and the general questions it still answers."""
    rows = [
        [
            "",
            "learning rate",
            "seconds before the first epoch",
            "seconds an epoch",
            "peak memory, GB",
            "file, MB",
            "general questions right",
        ]
    ]
    for method in METHODS:
        runs = runs_of(found, "compare", method)
        if not runs:
            continue
        rows.append([
            LABELS[method],
            f"{runs[0]['rate']:g}",
            _mean([_preparing(run) for run in runs], "{:.0f}"),
            _mean([(run["seconds"] - _preparing(run)) / len(run["epochs"]) for run in runs], "{:.0f}"),
            _mean([run["peak_rss_bytes"] / 1e9 for run in runs], "{:.2f}"),
            _mean([run["edit_bytes"] / 1e6 for run in runs], "{:.1f}"),
            _mean([run["figures"]["quiz"] for run in runs], "{:.0%}"),
        ])  # fmt: skip
    return rows


def _preparing(run: dict[str, Any]) -> float:
    seconds: float = run.get("edit_figures", {}).get("seconds_preparing", 0.0)
    return seconds


def more_facts(found: Found) -> list[list[str]]:
    """What larger lessons come to, by a memory."""
    rows = [
        ["taught", "recall", "near misses, KL", "Python reference, KL", "seconds, to prepare", "to teach", "file, MB"]
    ]
    taught = {f"hundred_{kind}": f"100 facts of the kind {kind}" for kind in KINDS}
    taught |= {
        "few_rows": "100 codes in a quarter of the rows",
        "thousand": "1,000 facts in one edit",
        "sequence": "20 edits of 10 facts",
    }
    for cell, label in taught.items():
        for run in runs_of(found, cell, "memory"):
            figures, size = run["figures"], run["edit_bytes"]
            rows.append([
                label,
                f"{statistics.mean(figures['recall'].values()):.0%}",
                f"{figures['near_miss_kl']:.2f}",
                f"{figures['background_kl']:.4f}",
                f"{_preparing(run):.0f}",
                f"{run['edit_figures']['seconds_training']:.0f}",
                f"{(sum(size) if isinstance(size, list) else size) / 1e6:.1f}",
            ])  # fmt: skip
    return rows


def in_sequence(found: Found) -> list[list[str]]:
    """What edits one after another recall, and what is left of it when half of them are taken back."""
    rows = [["recall of an edit's facts", "mean", "lowest"]]
    labels = {
        "recall_when_learned": "when it was learned",
        "recall_of_each": "when all had been learned",
        "recall_of_the_others": "of those that stayed, when half were taken back",
        "recall_of_those_taken_back": "of those that were taken back",
    }
    for run in runs_of(found, "sequence", "memory"):
        for name, label in labels.items():
            of_each = run["figures"][name]
            shares = list(of_each.values()) if isinstance(of_each, dict) else of_each
            rows.append([label, f"{statistics.mean(shares):.1%}", f"{min(shares):.0%}"])
    return rows


def on_text(found: Found) -> list[list[str]]:
    """Bits per byte of documentation and of other text, before and after training on documentation."""
    rows = [["", "updates", "seconds", "held-out documentation", "unrelated text"]]
    for method in ("memory", "lora"):
        for run in runs_of(found, "text", method):
            figures = run["figures"]
            if len(rows) == 1:
                before = [f"{figures[f'{text}_bits_per_byte_before']:.3f}" for text in ("held_out", "unrelated")]
                rows.append(["before", "0", "0", *before])
            after = [f"{figures[f'{text}_bits_per_byte']:.3f}" for text in ("held_out", "unrelated")]
            rows.append([LABELS[method], str(run["updates"]), f"{run['seconds']:.0f}", *after])
    return rows


def rates(found: Found) -> list[list[str]]:
    """All learning rates that were tried, at the first epoch with enough recall."""
    rows = [["", "learning rate", *(title for title, _ in COSTS.values())]]
    for method in METHODS:
        tried = [run for run in found if (run.cell, run.method, run.seed) == ("compare", method, 0)]
        for run in sorted(tried, key=lambda run: run.rate):
            epochs = found[run]["epochs"]
            epoch = first_with(epochs, ENOUGH) or (epochs[-1] if epochs else None)
            if epoch is not None:
                figures = [form.format(epoch[key]) for key, (_, form) in COSTS.items()]
                rows.append([LABELS[method], f"{run.rate:g}", *figures])
    return rows


def _mean(numbers: Sequence[float], form: str) -> str:
    """The mean over seeds, and the smallest and largest behind it, smaller."""
    if not numbers:
        return "-"
    mean = form.format(statistics.mean(numbers))
    ends = [form.format(end) for end in (min(numbers), max(numbers))]
    return mean if ends[0] == ends[1] else f"{mean} <small>({ends[0]} to {ends[1]})</small>"


def learning() -> Figure:
    """What changed elsewhere, against what is recalled: an epoch of a seed is a point."""
    found = load_found(RESULTS)
    figure = Figure(figsize=(4.8, 6.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    titles = {"background_kl": "Python reference: KL, nats", "near_miss_kl": "near misses: KL, nats"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for method in METHODS:
            for i, run in enumerate(runs_of(found, "compare", method)):
                points = [(100 * epoch["recall"], epoch[key]) for epoch in run["epochs"]]
                label = LABELS[method] if i == 0 else None
                axes.plot(*zip(*points, strict=True), marker=".", color=COLORS[method], lw=0.8, label=label)
        axes.set(yscale="log" if found else "linear", ylabel=title)
        axes.grid(visible=True, alpha=0.3)
    panels[1].set(xlabel="recall of what was taught, %")
    if found:
        panels[0].legend(frameon=False)
    return figure
