"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_learning_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out bits per byte of several runs, against tokens and against training seconds.

    Args:
        curves: per label the records of a run's metrics (`pkmem.training.read_metrics`).
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for label, records in curves.items():
        held_out = [record for record in records if record["kind"] == "held_out"]
        bits = [record["bits_per_byte"] for record in held_out]
        by_tokens.plot([record["tokens"] / 1e6 for record in held_out], bits, marker=".", label=label)
        by_seconds.plot([record["seconds"] for record in held_out], bits, marker=".", label=label)
    by_tokens.set(xlabel="training tokens (millions)", ylabel="held-out bits per byte", yscale="log")
    by_seconds.set(xlabel="training time (seconds)")
    by_tokens.set_title("at equal tokens")
    by_seconds.set_title("at equal time")
    for axes in (by_tokens, by_seconds):
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.yaxis.set_minor_formatter("{x:.1f}")
        axes.yaxis.set_major_formatter("{x:.1f}")
    by_tokens.legend()
    figure.savefig(path, dpi=150)
