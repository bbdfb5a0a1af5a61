"""Draws the pictures of these pages and writes their tables of measurements: `make docs` runs it before Sphinx.

    python docs/figures.py            # into docs/_build/figures and docs/_build/tables

The pictures of the layer are made up of a small example, computed here; every measurement is read from
benchmarks/results and experiments/results, so that a page cannot say anything else than they do. A plan is made anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

import learning
from pkmem import cli

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "docs" / "_build"
STYLE = {  # few inches and large letters: a picture is as wide as a phone, and nobody zooms
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "pkmem",  # the same bytes in every run
    "savefig.facecolor": "white",
}
BLUE, ORANGE, GREEN, RED, GREY, LIGHT = "#1f5fa8", "#d9730d", "#2e7d4f", "#b3261e", "#6b7280", "#e8edf3"


def main() -> None:
    """Draws and writes everything."""
    (BUILD / "figures").mkdir(parents=True, exist_ok=True)
    (BUILD / "tables").mkdir(exist_ok=True)
    with rc_context(STYLE):
        for draw in (layer, product_keys, reading_log, growth, slots, value_rates, moment_rates, learning.learning):
            draw().savefig(BUILD / "figures" / f"{draw.__name__}.svg", metadata={"Date": None})
    for write in (
        forward,
        training_step,
        peak_memory,
        decode,
        mapped_rows,
        mapped_models,
        gpu_reference,
        gpu_code,
        reliability,
        reliability_runs,
        plan_time,
    ):
        (BUILD / "tables" / f"{write.__name__}.md").write_text(write(), encoding="utf-8")
    for name, table in learning.tables().items():
        (BUILD / "tables" / f"{name}.md").write_text(table, encoding="utf-8")
    (BUILD / "tables" / "plan.txt").write_text(plan(), encoding="utf-8")


# --- how the layer works --------------------------------------------------------------------------------


def layer() -> Figure:
    """The layer from top to bottom, with the shapes of `start.md`."""
    steps = [
        ("hidden states x", "(n, d)", LIGHT),
        ("query network: linear, then a norm", "one query a head, (n, h, q)", "white"),
        ("product keys: 2 s sub-keys a head", "stand for the keys of s² slots", "white"),
        ("the knn best slots, and a softmax", "slots and weights, (n, h, knn)", "white"),
        ("value table: one row a slot, s² rows", "h · knn rows are read, no others", "white"),
        ("weighted sum of these rows", "output, (n, d)", LIGHT),
    ]
    figure = Figure(figsize=(4.6, 5.6), layout="constrained")
    axes = _blank(figure, (0, 10), (0, 6 * len(steps) - 1.5))
    for i, (what, shape, color) in enumerate(steps):
        y = 6 * (len(steps) - 1 - i)
        axes.add_patch(FancyBboxPatch((0.3, y + 0.3), 9.4, 3.6, boxstyle="round,pad=0.2", ec=BLUE, fc=color, lw=1.3))
        axes.text(5, y + 2.9, what, ha="center", va="center", weight="bold")
        axes.text(5, y + 1.2, shape, ha="center", va="center", color=GREY)
        if i:
            _arrow(axes, (5, y + 5.8), (5, y + 4.2))
    return figure


def product_keys() -> Figure:
    """All s² sums of two halves' scores, and the few of them that a product key search computes."""
    num_sub_keys, knn = 8, 3
    first, second = np.random.default_rng(76).normal(size=(2, num_sub_keys)).round(1) + 0.0  # no -0.0
    sums = first[:, None] + second[None]
    rows, columns = (set(np.argsort(-scores, kind="stable")[:knn].tolist()) for scores in (first, second))
    best = {divmod(int(slot), num_sub_keys) for slot in np.argsort(-sums.ravel(), kind="stable")[:knn]}
    assert best <= {(i, j) for i in rows for j in columns}  # what the page explains
    figure = Figure(figsize=(4.8, 4.9), layout="constrained")
    axes = _blank(figure, (-1.6, num_sub_keys + 0.1), (num_sub_keys + 0.1, -1.9))
    axes.set_aspect("equal")
    for i in range(num_sub_keys):
        for j in range(num_sub_keys):
            candidate, chosen = i in rows and j in columns, (i, j) in best
            color = ORANGE if chosen else "#fbd9b5" if candidate else "white"
            axes.add_patch(Rectangle((j, i), 1, 1, fc=color, ec="#cbd2da", lw=0.8))
            if candidate:
                _number(axes, (j + 0.5, i + 0.5), sums[i, j], "white" if chosen else "black")
    for k in range(num_sub_keys):
        for place, score, chosen in (((-1.3, k), first[k], k in rows), ((k, -1.3), second[k], k in columns)):
            axes.add_patch(Rectangle(place, 1, 1, fc="#bcd3ec" if chosen else LIGHT, ec="#cbd2da", lw=0.8))
            _number(axes, (place[0] + 0.5, place[1] + 0.5), score, BLUE if chosen else GREY)
    axes.text(num_sub_keys / 2, -1.6, "second half of the query with each of s sub-keys", ha="center", va="center")
    axes.text(-1.55, num_sub_keys / 2, "first half", rotation=90, ha="center", va="center")
    return figure


def _number(axes: Axes, place: tuple[float, float], number: float, color: str) -> None:
    axes.text(*place, f"{number:.1f}".replace("-", "\N{MINUS SIGN}"), ha="center", va="center", size=9, color=color)


def reading_log() -> Figure:
    """Reads in the order of the backward pass, the same sorted by slot, and the rows that are updated."""
    reads = [("t1", 6), ("t1", 2), ("t2", 2), ("t2", 9), ("t3", 6), ("t3", 2)]  # token, slot
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = _blank(figure, (-0.3, 12.6), (10.4, -1.9))
    in_order = sorted(reads, key=lambda read: read[1])
    colors = {2: BLUE, 6: ORANGE, 9: GREEN}
    for x, title in ((1.35, "the log"), (6.1, "sorted by slot"), (11.15, "the table")):
        axes.text(x, -1.2, title, ha="center", va="center", weight="bold")
    for x, column in ((0, reads), (4.75, in_order)):
        for i, (token, slot) in enumerate(column):
            y = 1.55 * i + 0.15
            axes.add_patch(Rectangle((x, y), 2.7, 1.2, fc="white", ec=colors[slot], lw=1.6))
            axes.text(x + 1.35, y + 0.62, f"{token} read {slot}", ha="center", va="center", size=10, color=colors[slot])
    for row in range(12):
        y = 0.8 * row
        touched = row in colors
        axes.add_patch(Rectangle((9.9, y), 2.5, 0.8, fc=colors[row] if touched else LIGHT, ec="white", lw=1.5))
        axes.text(9.75, y + 0.42, str(row), ha="right", va="center", size=8, color=GREY)
        if touched:
            first = min(i for i, read in enumerate(in_order) if read[1] == row)
            last = max(i for i, read in enumerate(in_order) if read[1] == row)
            _arrow(axes, (7.55, 1.55 * (first + last) / 2 + 0.75), (9.25, y + 0.42), colors[row])
            axes.text(11.15, y + 0.44, "Adam", ha="center", va="center", size=9, color="white")
    _arrow(axes, (2.9, 4.6), (4.6, 4.6))
    return figure


def _blank(figure: Figure, x: tuple[float, float], y: tuple[float, float]) -> Axes:
    axes = figure.subplots()
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return axes


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black") -> None:
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    )


# --- what was measured ----------------------------------------------------------------------------------


def growth() -> Figure:
    """How many times as long as pkmem others take for a training step, against slots."""
    lines = _lines("growth")
    sizes = sorted({int(what.split(" slots")[0].replace(",", "")) for what in lines if " slots: " in what})
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.subplots()
    others = {"SparseAdam": GREEN, "product-key-memory": BLUE, "dense Adam (fused)": ORANGE}
    for name, color in others.items():
        points = [lines[f"{size:,} slots: {name} / ours"] for size in sizes]
        middle = [point["median"] for point in points]
        spread = [[m - p["low"] for m, p in zip(middle, points, strict=True)]]
        spread.append([p["high"] - m for m, p in zip(middle, points, strict=True)])
        axes.errorbar(sizes, middle, spread, color=color, marker="o", capsize=3, label=name)
    axes.axhline(1, color="black", lw=2, label="pkmem")
    floor = [1 / lines[f"{size:,} slots: ours / floor"]["median"] for size in sizes]
    axes.plot(sizes, floor, "--", color=GREY, label="floor")
    axes.set(xscale="log", ylim=(0, None), xlabel="slots of the table", ylabel="time of a training step, pkmem = 1")
    axes.set_xticks(sizes, ["16 K", "65 K", "262 K", "1 M", "4 M"])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9.5, loc="upper left", ncols=2, frameon=False)
    axes.set_ylim(0, 9.5)
    return figure


def slots() -> Figure:
    """Bits per byte against slots, in the first layer and in the paper's place."""
    sub_keys = [32, 64, 128, 256, 512]
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.subplots()
    for label, color, cells, sizes in (
        ("layer 1", BLUE, "scaling/laptop/{}_sub_keys__lr0.008_value_lr0.1", [*sub_keys, 1024]),
        ("layer 3, batch norm", ORANGE, "size/laptop/{}_batch__lr0.005_value_lr0.04", sub_keys),
        ("layer 3, no query norm", GREEN, "size/laptop/{}_none__lr0.005_value_lr0.04", sub_keys),
    ):
        bits = [_bits(cells.format(s)) for s in sizes]
        middle = [statistics.mean(seeds) for seeds in bits]
        spread = [statistics.stdev(seeds) for seeds in bits]
        axes.errorbar([s**2 for s in sizes], middle, spread, color=color, marker="o", capsize=3, label=label)
    axes.axhline(statistics.mean(_bits("scaling/laptop/no_memory__lr0.005")), color=GREY, ls="--", label="no memory")
    axes.set(xscale="log", xlabel="slots", ylabel="held-out bits per byte", ylim=(None, 1.7))
    sizes = [32, 64, 128, 256, 512, 1024]
    axes.set_xticks([s**2 for s in sizes], [f"{s}²" for s in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9.5, loc="upper right", ncols=2, frameon=False)
    return figure


def value_rates() -> Figure:
    """Bits per byte of seed 0 against the values' learning rate, for two models and several rates of the rest."""
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.subplots()
    for label, color, cell, lr in (
        ("2 layers, the rest at 0.005", GREEN, "2_layers_1_memory", 0.005),
        ("4 layers, the rest at 0.005", ORANGE, "4_layers_1_memory", 0.005),
        ("4 layers, the rest at 0.008", BLUE, "4_layers_1_memory", 0.008),
    ):
        folder = ROOT / "experiments" / "results" / "table1" / "laptop"
        found = {}
        for file in folder.glob(f"{cell}__lr{lr}_value_lr*__seed0.json"):
            run = json.loads(file.read_text(encoding="utf-8"))
            found[run["recipe"]["training"]["value_lr"]] = run["summary"]["bits_per_byte"]
        rates = sorted(found)
        axes.plot(rates, [found[rate] for rate in rates], color=color, marker="o", label=label)
    axes.set(xscale="log", xlabel="learning rate of the values", ylabel="held-out bits per byte", ylim=(None, 1.715))
    ticks = [0.002, 0.006, 0.016, 0.04, 0.1, 0.25]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9.5, loc="upper right", frameon=False)
    return figure


def moment_rates() -> Figure:
    """Bits per byte of seed 0 against the values' learning rate, for what Adam keeps of 512² slots."""
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.subplots()
    for label, color, kind in (
        ("both moments of each number", ORANGE, "fp32"),
        ("one second moment a row, and the first", GREY, "row"),
        ("row-wise Adagrad, no first", GREEN, "row_adagrad"),
        ("one second moment a row, no first", BLUE, "row_alone"),
    ):
        found = {}
        for file in (ROOT / "experiments" / "results" / "moments" / "laptop").glob(f"512_{kind}__*__seed0.json"):
            run = json.loads(file.read_text(encoding="utf-8"))
            found[run["recipe"]["training"]["value_lr"]] = run["summary"]["bits_per_byte"]
        rates = sorted(found)
        axes.plot(rates, [found[rate] for rate in rates], color=color, marker="o", label=label)
    axes.set(xscale="log", xlabel="learning rate of the values", ylabel="held-out bits per byte", ylim=(None, 1.68))
    ticks = [0.02, 0.08, 0.32, 1.2]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=9.5, loc="upper right", frameon=False)
    return figure


def _bits(cell: str) -> list[float]:
    """Bits per byte of all seeds of a cell at one learning rate."""
    files = sorted((ROOT / "experiments" / "results").glob(f"{cell}__seed*.json"))
    assert len(files) == 3, cell
    return [json.loads(file.read_text(encoding="utf-8"))["summary"]["bits_per_byte"] for file in files]


# --- tables ---------------------------------------------------------------------------------------------


def forward() -> str:
    """A layer's forward pass: how many times as long as pkmem others take."""
    lines, peers = _lines("layer_forward"), ("best peer (plain torch)", "product-key-memory", "PEER-pytorch", "FFN")
    rows = []
    for width in (512, 1024):
        for tokens in ("2,048", "8", "1"):
            case = f"width {width}, s 512, {tokens} tokens"
            rows.append([f"{width:,}", tokens, *(_ratio(lines[f"{case}: {peer} / ours"]) for peer in peers)])
    return _table(["width", "tokens", "plain torch", "product-key-memory", "PEER-pytorch", "MLP"], rows)


def training_step() -> str:
    """A training step of a layer: how many times as long as pkmem others take."""
    lines = _lines("training_step")
    peers = ("best dense peer (dense Adam (fused))", "SparseAdam", "product-key-memory", "PEER-pytorch", "FFN")
    leanest = f"{peers[0]} / ours with one second moment a row alone"
    rows = []
    for width, sub_keys in ((512, 512), (1024, 512), (512, 1024)):
        case = f"width {width}, s {sub_keys}, 2,048 tokens"
        found = [lines.get(f"{case}: {what}") for what in (f"{peers[0]} / ours", leanest)]
        found += [lines.get(f"{case}: {peer} / ours") for peer in peers[1:]]
        rows.append([f"{width:,}", f"{sub_keys:,}²", *("-" if line is None else _ratio(line) for line in found)])
    titles = ["width", "slots", "dense Adam", "leanest", "SparseAdam", "product-key-memory", "PEER-pytorch", "MLP"]
    return _table(titles, rows)


def peak_memory() -> str:
    """Peak memory of training a layer."""
    lines, cases = _lines("peak_memory"), ("width 512, s 512", "width 256, s 1024")
    peers = ("pkmem", "dense Adam (fused)", "product-key-memory", "SparseAdam", "PEER-pytorch")
    rows = [[peer, *(f"{lines[f'{case}: {peer}: peak RSS, GB']['median']:.2f}" for case in cases)] for peer in peers]
    needed = [f"{lines[f'{case}: pkmem: parameters and moments, GB']['median']:.2f}" for case in cases]
    sizes = ["width 512, 512² slots, GB", "width 256, 1024² slots, GB"]
    return _table(["trained with", *sizes], [*rows, ["*parameters and moments alone*", *needed]])


def decode() -> str:
    """What a memory adds to a token that is written."""
    lines = _lines("decode")
    rows = [
        [f"{case}: {way}", *(_ratio(lines[f"{case}, {batch} at once: {way} / no memory"]) for batch in (1, 8, 32))]
        for case in ("30 blocks, width 576", "the demo's")
        for way in ("in place of an MLP", "beside an MLP", "beside an MLP, int8")
    ]
    return _table(["a memory in", "1 text at once", "8", "32"], rows)


def mapped_rows() -> str:
    """How rows come from a file that is not in memory yet."""
    lines = _lines("mapped_tables")
    peers = ("one fault after another", "one fault after another, told to be at random", "64 threads with pread")
    cases = [f"{form}, {tokens} tokens" for tokens in (64, 512) for form in ("fp32", "bf16", "int8", "int4")]
    rows = [
        [
            case,
            f"{lines[f'{case}: pages of 4096 bytes read for each distinct row, asked ahead']['median']:.2f}",
            f"{lines[f'{case}: rows a second, asked ahead']['median']:,.0f}",
            *(_ratio(lines[f"{case}: {peer} / asked ahead"]) for peer in peers),
        ]
        for case in cases
    ]
    return _table(["width 512", "pages a row", "rows a second", *(f"{peer}, times as long" for peer in peers)], rows)


def mapped_models() -> str:
    """What a model costs whose table stays in its file."""
    lines = _lines("mapped_tables")
    ways = dict.fromkeys(what.split(": ")[0] for what in lines if ": opening, s" in what)
    kinds = {
        "opening, s": "s",
        "held after opening, MB": "MB",
        "prompt, s for 256 tokens": "s",
        "decode, ms a token": "ms",
    }
    rows = [
        [way, *(f"{lines[f'{way}: {kind}']['median']:,.{0 if unit == 'MB' else 2}f}" for kind, unit in kinds.items())]
        for way in ways
    ]
    return _table(["", *kinds], rows)


def gpu_reference() -> str:
    """What a training step of the reference asks of a GPU."""
    document = _document("gpu_reference")
    rows = []
    for part in ("forward", "backward", "RowAdam step"):
        counted = [document["figures"][dtype][part] for dtype in ("float32", "bfloat16")]
        rows.append(
            [part, *(f"{f['operators']:,}" for f in counted), *(f"{f['peak_bytes'] / 2**20:,.0f}" for f in counted)]
        )
    size = f"{document['tokens']:,} tokens"
    titles = [size, "operators, fp32", "operators, bf16", "MiB beside inputs and outputs, fp32", "the same, bf16"]
    return _table(titles, rows)


def gpu_code() -> str:
    """What the Triton kernels take of each GPU."""
    document = _document("gpu_code")
    rows = []
    for name, gpu in document["gpus"].items():
        kernels = [kernel for kernel in document["kernels"] if kernel["gpu"] == name]
        largest = [max(kernel[what] for kernel in kernels) for what in ("shared_bytes", "registers", "spills")]
        rows.append([
            f"{gpu['models']} ({name})", str(len(kernels)), f"{largest[0] >> 10} of {gpu['shared_bytes'] >> 10}",
            str(largest[1]), str(largest[2]),
        ])  # fmt: skip
    return _table(["GPU", "kernels", "most shared KiB", "most registers", "spilled registers"], rows)


def reliability() -> str:
    """What the trials of the reliability page found."""
    words = {True: "yes", False: "**no**", None: "not tried"}
    rows = [
        [number, outcome["what"], outcome["required"], outcome["found"], words[outcome["holds"]]]
        for number, trial in _document("reliability")["trials"].items()
        for outcome in trial["outcomes"]
    ]
    return _table(["trial", "what", "required", "found", "holds"], rows, "---")


def reliability_runs() -> str:
    """Where and when the trials ran."""
    runs: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for number, trial in _document("reliability")["trials"].items():
        where, versions = trial["environment"], trial["environment"]["versions"]
        key = (where["commit"], f"{where['processor']}, {where['cores']} cores", versions["torch"], where["python"])
        runs.setdefault(key, []).append((number, sum(outcome["seconds"] for outcome in trial["outcomes"])))
    rows = [
        [", ".join(number for number, _ in ran), *key, f"{sum(seconds for _, seconds in ran) / 60:.1f}"]
        for key, ran in runs.items()
    ]
    return _table(["trials", "commit", "machine", "torch", "Python", "minutes"], rows, "---")


def plan_time() -> str:
    """The time of an update as it was planned, over what it took."""
    rows = [[what.split(": ")[0], _ratio(line)] for what, line in _lines("plan_time").items()]
    return _table(["update", "planned / measured"], rows)


def plan() -> str:
    """What the first command of `plan.md` prints."""
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    command = page.split("```sh\n")[1].split("```")[0].replace("\\\n", " ")
    printed = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed):
        cli.main(shlex.split(command)[1:])
    return printed.getvalue()


def _document(benchmark: str) -> dict[str, Any]:
    file = ROOT / "benchmarks" / "results" / f"{benchmark}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _lines(benchmark: str) -> dict[str, dict[str, Any]]:
    return {line["what"]: line for line in _document(benchmark)["lines"]}


def _ratio(line: dict[str, Any]) -> str:
    return f"{line['median']:.2f} <small>({line['low']:.2f} to {line['high']:.2f})</small>"


def _table(titles: list[str], rows: Iterable[list[str]], align: str = "---:") -> str:
    lines = [titles, ["---", *[align] * (len(titles) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
