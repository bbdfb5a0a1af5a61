"""How many facts does a small model store, with a memory and without?

    python benchmarks/facts.py    # -> experiments/results/facts.json, facts.png, and the table

Four models learn the same number of tokens of `synthetic:facts`, so the more facts, the fewer exposures of each: a small
dense one; the same with a memory; a dense one as wide as trains in the seconds of that (measured once, in turns, and
kept); and a dense one of its size. Each at several learning rates: the table and the plot have the best by bits. Cells
run one thread each, two at a time; finished ones are kept, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sweep import run_missing

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "facts.json"
LABELS = {
    "dense": "dense",
    "memory": "dense + memory",
    "equal_time": "dense of equal time",
    "equal_size": "dense of equal size",
}
RATES = {
    "dense": [{"lr": lr} for lr in (1.6e-2, 3e-2, 6e-2)],
    "memory": [
        *({"lr": 1.6e-2, "value_lr": value_lr} for value_lr in (2e-2, 5e-2, 1e-1)),
        {"lr": 3e-2, "value_lr": 5e-2},
    ],
    "equal_time": [{"lr": lr} for lr in (8e-3, 1.6e-2, 3e-2)],
    "equal_size": [{"lr": lr} for lr in (4e-3, 8e-3, 1.6e-2)],
}
NUMS = (2000, 1000)
WIDTH, LADDER = 16, range(16, 121, 8)  # so narrow that this many facts do not fit
NUM_TOKENS = 6_000_000
KEPT = ("recall", "bits_per_fact", "stored_bits", "bits_per_param", "bits_per_dense_param", "bits_per_active_param")
TURNS = 9
TITLES = (
    "| facts | exposures | model | width | parameters | lr | value lr | seconds | recall | bits per fact "
    "| bits per parameter | per dense parameter | per active parameter |"
)


def main() -> None:
    """Runs the missing cells, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    cell = parser.parse_args().cell
    if cell is not None:
        print(json.dumps(run_cell(json.loads(cell))))
        return
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"widths": choose_widths(), "cells": []}
    cells = [
        {"model": model, "width": document["widths"][model], "num_facts": num, "num_tokens": NUM_TOKENS, **rate}
        for num in NUMS
        for model in LABELS
        for rate in RATES[model]
    ]
    run_missing(__file__, RESULTS, document, cells)
    best = best_cells(document["cells"])
    print(table(best))
    plot(best, RESULTS.with_suffix(".png"))


def recipe(cell: dict[str, Any], folder: Path) -> Any:
    """The training run of a cell."""
    from pkmem.layer.config import MemoryConfig
    from pkmem.lm.config import ModelConfig
    from pkmem.training.recipe import Recipe, TrainingConfig

    return Recipe(
        data=f"synthetic:facts:{cell['num_facts']}",
        out=folder / "run",
        tokenizer=str(folder / "tokenizer"),
        model=ModelConfig(
            family="llama",
            num_layers=2,
            width=cell["width"],
            num_heads=2,
            context_tokens=64,
            vocab_size=1024,
            memory_layers=[1] if cell["model"] == "memory" else [],
        ),
        memory=MemoryConfig(num_sub_keys=128, heads=4, knn=16, query_dim=64, gate=True),
        training=TrainingConfig(
            num_tokens=cell["num_tokens"],
            batch_tokens=1024,
            lr=cell["lr"],
            value_lr=cell.get("value_lr", cell["lr"]),
            warmup_share=0.15,
            eval_every_steps=10**9,
            checkpoint_every_steps=10**9,
            eval_tokens=10_000,
        ),
    )


def choose_widths() -> dict[str, int]:
    """The width of every model: those of equal time and size are the nearest to the one with memory."""
    memory = {"model": "memory", "width": WIDTH}
    ladder = {width: {"model": "dense", "width": width} for width in LADDER}
    seconds = step_seconds([memory, *ladder.values()])
    sizes = {width: num_params(cell) for width, cell in ladder.items()}
    return {
        "dense": WIDTH,
        "memory": WIDTH,
        "equal_time": min(ladder, key=lambda width: abs(math.log(seconds[1 + LADDER.index(width)] / seconds[0]))),
        "equal_size": min(ladder, key=lambda width: abs(sizes[width] - num_params(memory))),
    }


def step_seconds(cells: list[dict[str, Any]]) -> list[float]:
    """Median seconds of a training step of each cell's model, taken in turns on one thread."""
    import torch

    from pkmem.training.trainer import build_optimizer

    torch.set_num_threads(1)
    runs = [recipe({"num_facts": 1, "num_tokens": 1, "lr": 1e-3, **cell}, Path()) for cell in cells]
    models = [build(run) for run in runs]
    optimizers = [build_optimizer(model, run.training) for model, run in zip(models, runs, strict=True)]
    seconds: list[list[float]] = [[] for _ in cells]
    tokens = torch.randint(runs[0].model.vocab_size, (runs[0].micro_batch_sequences, runs[0].model.context_tokens))
    for _ in range(TURNS):
        for model, optimizer, taken in zip(models, optimizers, seconds, strict=True):
            start = time.perf_counter()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first warms up


def build(run: Any) -> Any:
    """The untrained model of a recipe."""
    from pkmem.lm.build import build_model

    return build_model(run.model, run.memory, run.model.vocab_size, 0).train()


def num_params(cell: dict[str, Any]) -> int:
    """All parameters of a cell's model."""
    import torch

    from pkmem.layer.values import count_parameters

    with torch.device("meta"):
        model = build(recipe({"num_facts": 1, "num_tokens": 1, "lr": 1e-3, **cell}, Path()))
    return sum(count_parameters(model).values())


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Trains one model and asks it every fact."""
    from pkmem.lm.recall import measure_recall
    from pkmem.text import read_documents, tokenize, train_tokenizer
    from pkmem.text.facts import EXPOSURES, Facts
    from pkmem.training.run import train
    from pkmem.training.saved import load_saved

    with tempfile.TemporaryDirectory() as folder:
        run = recipe(cell, Path(folder))
        vocabulary = read_documents(f"synthetic:facts:{max(NUMS)}", "train")  # the same for every number of facts
        train_tokenizer(vocabulary, run.model.vocab_size).save_pretrained(run.tokenizer)
        summary = train(run, progress=False)
        model, tokenizer = load_saved(run.out)
        figures = measure_recall(model, tokenizer, Facts.named(run.data))
        epochs = summary["train_tokens"] / tokenize(run.data, "train", tokenizer, progress=False).num_tokens
    learned = ("dense_params", "memory_params", "bits_per_byte", "train_seconds", "memory_0/usage")
    return (
        {name: figures[name] for name in KEPT}
        | {"exposures": epochs * EXPOSURES}
        | {name: summary[name] for name in learned if name in summary}
    )


def best_cells(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per number of facts and model the cell that stores most, in order."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for cell in cells:
        key = cell["num_facts"], cell["model"]
        if key not in best or cell["figures"]["bits_per_fact"] > best[key]["figures"]["bits_per_fact"]:
            best[key] = cell
    return sorted(best.values(), key=lambda cell: (cell["num_facts"], list(LABELS).index(cell["model"])))


def table(best: list[dict[str, Any]]) -> str:
    """The best cells as Markdown."""
    rows = [TITLES, "|" + "---|" * (TITLES.count("|") - 1)]
    for cell in best:
        figures = cell["figures"]
        rows.append(
            f"| {cell['num_facts']:,} | {figures['exposures']:.0f} | {LABELS[cell['model']]} | {cell['width']} "
            f"| {figures['dense_params'] + figures['memory_params']:,} | {cell['lr']:g} | {cell.get('value_lr', '-')} "
            f"| {figures['train_seconds']:.0f} "
            f"| {figures['recall']:.1%} | {figures['bits_per_fact']:.2f} | {figures['bits_per_param']:.3f} "
            f"| {figures['bits_per_dense_param']:.3f} | {figures['bits_per_active_param']:.3f} |"
        )
    return "\n".join(rows)


def plot(best: list[dict[str, Any]], path: Path) -> None:
    """Recall, and stored bits per parameter, against the number of facts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_recall, by_bits = figure.subplots(1, 2)
    for model, label in LABELS.items():
        cells = [cell for cell in best if cell["model"] == model]
        nums = [cell["num_facts"] for cell in cells]
        by_recall.plot(nums, [cell["figures"]["recall"] for cell in cells], marker="o", label=label)
        by_bits.plot(nums, [cell["figures"]["bits_per_param"] for cell in cells], marker="o", label=label)
    by_recall.set(xlabel="facts", ylabel="recall", xscale="log", ylim=(0, 1))
    by_bits.set(xlabel="facts", ylabel="stored bits per parameter", xscale="log", yscale="log")
    for axes in (by_recall, by_bits):
        axes.grid(visible=True, which="both", alpha=0.3)
    by_recall.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
