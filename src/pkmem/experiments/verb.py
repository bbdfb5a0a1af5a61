"""`pkmem experiment` on the command line."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ActionYesNo, ArgumentParser, Namespace


def experiment_arguments(parser: ArgumentParser) -> None:
    """What the verb takes."""
    parser.add_argument(
        "name",
        type=str,
        help="table1, depth, speed, size, position, keys or heads of the paper; layers, scaling, dead_slots, moments, hashed, more_text, facts "
        "beyond it; learn for facts taught to a pretrained model",
    )
    parser.add_argument("--scale", type=str, default="laptop", help="laptop, gpu or paper")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. SEEDS - 1 of each model")
    parser.add_argument("--out", type=str, default="runs/experiments", help="where all results go, a file per run")
    parser.add_argument("--cells", nargs="+", type=str, help="some models alone, such as 8_layers; without their speed")
    parser.add_argument("--data", type=str | None, default=None, help="text to learn instead of the family's")
    for name, text in (
        ("resume", "continue half-trained runs; they start over otherwise"),
        ("dry_run", "say what the runs cost, and their commands; train nothing"),
    ):
        parser.add_argument(f"--{name}", action=ActionYesNo, default=False, help=text)


def experiment(options: Namespace) -> None:
    """Run one of the paper's tables or figures, model by model; finished runs are kept and skipped.

    Example: pkmem experiment table1 --scale laptop --seeds 3, after a look with --dry_run
    """
    if options.name == "learn":
        _experiment_learn(options)
        return
    from pkmem.experiments.family import load_family
    from pkmem.experiments.grid import describe, experiment, require_complete

    family = load_family(options.name, options.scale)
    family = family.only(options.cells) if options.cells else family
    if options.dry_run:
        print(describe(family, options.seeds, options.data))
        return
    require_complete(experiment(family, Path(options.out), options.seeds, options.data, options.resume))
    print(f"all results are in {Path(options.out) / family.name / family.scale}; next: pkmem report {options.out}")


def _experiment_learn(options: Namespace) -> None:
    from pkmem.experiments.learning.grid import describe, experiment_learn

    if options.dry_run:
        print(describe(options.seeds, options.cells))
        return
    out = Path(options.out) / "learn"
    experiment_learn(out, options.seeds, options.cells)
    print(f"all results are in {out}")
