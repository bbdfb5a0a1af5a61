"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_learning_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out bits per byte of several runs, against tokens and against training seconds.

    Args:
        curves: per label the records of a run's metrics (`pkmem.training.journal.read_metrics`).
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    _colours_for(len(curves), by_tokens, by_seconds)
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
    _legend_below(figure, by_tokens)
    figure.savefig(path, dpi=150)


def plot_usage(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Usage and KL (section 4.1) of the first memory of several runs on held-out text, against training tokens.

    Args:
        curves: per label the held-out records of a run's metrics; those without a memory are left out.
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    usage, kl = figure.subplots(1, 2)
    _colours_for(len(curves), usage, kl)
    for label, records in curves.items():
        read = [record for record in records if "memory_0/usage" in record]
        if read:
            tokens = [record["tokens"] / 1e6 for record in read]
            usage.plot(tokens, [100 * record["memory_0/usage"] for record in read], marker=".", label=label)
            kl.plot(tokens, [record["memory_0/kl"] for record in read], marker=".", label=label)
    usage.set(xlabel="training tokens (millions)", ylabel="usage (%)", title="slots that are read")
    kl.set(xlabel="training tokens (millions)", ylabel="KL (nats)", title="distance from reading all slots alike")
    for axes in (usage, kl):
        axes.grid(visible=True, alpha=0.3)
    _legend_below(figure, usage)
    figure.savefig(path, dpi=150)


def plot_lines(
    series: dict[str, list[tuple[float, float]]], levels: dict[str, float], path: Path, xlabel: str, ylabel: str
) -> None:
    """Lines through points, and horizontal lines to compare them with.

    Args:
        series: per label its (x, y), in any order.
        levels: per label the y of a horizontal line.
        path: the PNG to write.
        xlabel, ylabel: of the axes.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    for label, level in levels.items():
        axes.axhline(level, linestyle="--", color="gray", label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(sorted({x for points in series.values() for x, _ in points}))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def plot_by_text(
    bits: dict[str, list[tuple[float, float]]], saved: dict[str, list[tuple[float, float]]], path: Path
) -> None:
    """What models of one kind make of more and more text, and what a memory saves of it.

    Args:
        bits: per label its training tokens and bits per byte, in any order.
        saved: per label its training tokens and the bits per byte that it saves.
        path: the PNG to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, series in ((left, bits), (right, saved)):
        for label, points in series.items():
            tokens, heights = zip(*sorted(points), strict=True)
            axes.plot([count / 1e6 for count in tokens], heights, marker="o", label=label)
        ticks = sorted({count / 1e6 for points in series.values() for count, _ in points})
        axes.set(xscale="log", xlabel="training tokens (millions)")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    left.set_ylabel("held-out bits per byte")
    right.set_ylabel("bits per byte saved by the memory")
    right.axhline(0, color="gray", linewidth=1)
    figure.savefig(path, dpi=150)


def plot_speeds(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Perplexity against inference speed, a named point a model (figure 4): low and right is good.

    Args:
        points: per label words per second and perplexity.
        path: the PNG to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (words_per_s, perplexity) in points.items():
        axes.plot(words_per_s, perplexity, marker="o")
        axes.annotate(label, (words_per_s, perplexity), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axes.set(xlabel="words/s in prefill", ylabel="held-out perplexity")
    axes.margins(x=0.2)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150)


def _colours_for(lines: int, *axes: Axes) -> None:
    """A colour of its own for each line; matplotlib's ten would be given twice."""
    if lines > 10:
        for each in axes:
            each.set_prop_cycle(color=colormaps["tab20"](range(20)))


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Below the axes, not on them, which many or long labels would cover; the curves keep their height."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) > 30 else 3
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
