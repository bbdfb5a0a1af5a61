"""Results of families that were never run, shared by the tests of what reads results."""

from pathlib import Path

import yaml

from pkmem.experiments.family import Family, config_folder
from pkmem.experiments.results import Result, find_results, runs_of, save_result, save_speeds

HERE = {"gpu": None, "cores": 2, "processor": "P", "torch_threads": 2, "versions": {"torch": "2"}, "commit": "abc"}


def all_families() -> list[tuple[str, str]]:
    """Every family at every scale it has."""
    files = sorted((config_folder() / "experiments").glob("*.yaml"))
    return [(file.stem, scale) for file in files for scale in yaml.safe_load(file.read_text())["scales"]]


def rates_of(family: Family, cell: str) -> list[str]:
    return [family.run(family.cells[cell], rate).rate for rate in family.cells[cell].rates]


def figures(cell: str, is_good_rate: bool, seed: int) -> dict:
    """Made-up figures: every layer and memory helps."""
    layers, memories = int(cell[0]), 0
    if "memor" in cell:
        memories = 1 if "upper" in cell else int(cell[9])
    tokens_per_s = 1000 * 40 / (10 * layers + memories)
    bits = 2.5 - 0.04 * layers - 0.2 * memories + 0.01 * seed + 0.1 * ("equal" in cell)
    bits += 0.0 if is_good_rate else 0.05
    found = {
        "bits_per_byte": bits,
        "perplexity": 30 * bits,
        "dense_params": 1000 * layers,
        "memory_params": 10 * memories,
    }
    for memory in range(memories):
        found |= {f"memory_{memory}/usage": 0.5 + memory / 10, f"memory_{memory}/kl": 1.25}
    return found | {"train_tokens_per_s": tokens_per_s, "train_seconds": 500_000 / tokens_per_s}


def make(folder: Path, family: Family, seeds: int, **changed: object) -> None:
    """Results of a family as if it had been run; the last two rates of each cell are the best, and equally good."""
    folder = folder / family.name / family.scale
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for seed in range(seeds):
        for cell in family.cells.values():
            for run in runs_of(family, cell, seed, results):
                is_good = run.rate in rates_of(family, run.cell)[-2:]
                summary = figures(run.cell, is_good, seed) | changed.get(run.cell, {})
                curve = [
                    {
                        **summary,
                        "kind": "held_out",
                        "step": s,
                        "tokens": s * 1000,
                        "seconds": s * 1.0,
                        "bits_per_byte": 6 / s,
                    }
                    for s in (1, 2, 3)
                ]
                found = {"summary": summary, "held_out": curve}
                save_result(folder / f"{run.name}.json", family, run, found | {"environment": HERE | {"command": "c"}})
            results = find_results(folder)[0]


def make_speeds(folder: Path, family: Family, number: int = 0, faster: float = 1.0) -> None:
    folder = folder / family.name / family.scale
    folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for cell in family.cells.values():
        if cell.like is None:
            prefill = 80_000 / int(cell.name[0]) * (faster if "memor" in cell.name else 1)
            models[cell.name] = {
                "prefill_tokens_per_s": prefill,
                "decode_tokens_per_s": prefill / 100,
                "prefill_words_per_s": prefill / 4,
            }
    save_speeds(folder / f"speed__{number}.json", family, models, HERE)
