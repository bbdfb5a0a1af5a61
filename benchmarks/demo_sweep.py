"""Which learning rates suit the demo's three models, and does its result hold over seeds?

    python benchmarks/demo_sweep.py    # -> experiments/results/demo_sweep.json, and its table

First every model over learning rates with a warm-up of 5 % of the updates, which turned out unstable at some seeds;
then, with 15 %, the best rates and the next higher ones, and the demo's own over seeds 0 to 2. Cells run one thread each, two at a time; finished ones are kept, so an interrupted sweep
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from sweep import run_missing

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "demo_sweep.json"
RATES = {
    "dense": [{"lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)],
    "deep": [{"lr": lr} for lr in (1e-3, 2e-3, 3e-3, 4e-3)],
    "memory": [
        *({"lr": 2e-3, "value_lr": value_lr} for value_lr in (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
        *({"lr": lr, "value_lr": 8e-3} for lr in (1e-3, 3e-3)),
        {"lr": 3e-3, "value_lr": 1.6e-2},
    ],
}
KEPT = ("bits_per_byte", "perplexity", "train_tokens_per_s", "memory_0/usage", "memory_0/top1_usage", "memory_0/kl")


def main() -> None:
    """Runs the missing cells and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    cell = parser.parse_args().cell
    if cell is not None:
        print(json.dumps(run_cell(json.loads(cell))))
        return
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": []}
    run_missing(__file__, RESULTS, document, rate_cells() + seed_cells())
    print(table(document["cells"]))


def rate_cells() -> list[dict[str, Any]]:
    """One cell per model and learning rate, seed 0, short warm-up."""
    return [
        {"model": model, "seed": 0, "warmup_share": 0.05, **rates}
        for model, choices in RATES.items()
        for rates in choices
    ]


def seed_cells() -> list[dict[str, Any]]:
    """The best rates and the next higher ones with the demo's warm-up, and its own rates over more seeds."""
    longer = {"warmup_share": 0.15}
    dense, memory = {"model": "dense", **longer}, {"model": "memory", "value_lr": 1.6e-2, **longer}
    return [
        *({**model, "seed": 0, "lr": lr} for lr in (2e-3, 3e-3, 4e-3) for model in (dense, memory)),
        {**dense, "seed": 0, "lr": 6e-3},
        {**memory, "seed": 1, "lr": 3e-3},
        {**dense, "seed": 1, "lr": 4e-3},
        {**memory, "seed": 2, "lr": 3e-3},
        {**dense, "seed": 2, "lr": 4e-3},
        *({"model": "deep", "seed": 0, "lr": lr, **longer} for lr in (3e-3, 4e-3)),
    ]


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Trains one model; returns its held-out figures."""
    from pkmem.demo import recipes
    from pkmem.training import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes(Path(folder), seed=cell["seed"])[cell["model"]]
        rates = {key: cell[key] for key in ("lr", "value_lr", "warmup_share") if key in cell}
        training = dataclasses.replace(
            recipe.training, **rates, checkpoint_every_steps=10**9, eval_every_steps=10**9, eval_tokens=10_000
        )
        summary = train(dataclasses.replace(recipe, training=training, tokenizer=None), progress=False)
    return {key: summary[key] for key in KEPT if key in summary}


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as Markdown, best first within each model."""
    rows = ["| model | warm-up | seed | lr | value lr | bits per byte | usage |", "|---|---|---|---|---|---|---|"]
    for cell in sorted(
        cells, key=lambda cell: (cell["warmup_share"], cell["model"], cell["seed"], cell["figures"]["bits_per_byte"])
    ):
        usage = cell["figures"].get("memory_0/usage")
        rows.append(
            f"| {cell['model']} | {cell['warmup_share']:.0%} | {cell['seed']} | {cell.get('lr', '')} | {cell.get('value_lr', '')} "
            f"| {cell['figures']['bits_per_byte']:.4f} | {'' if usage is None else f'{usage:.1%}'} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
