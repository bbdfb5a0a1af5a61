"""Does a training step get dearer as the table grows, for the same tokens?

    python benchmarks/growth.py

Width 256, 2,048 tokens. First, from 16 thousand to 4 million slots, ours, SparseAdam, the dense peers and the floor, each
size in a process of its own: growth.png shows the time per token. Then ours at s 512, 1,024 and 2,048 in one interleaved
run, each with its floor: larger tables spread the same reads over more rows, and cost larger score products, so ours may
grow as the floor does, and no more. Needs 21 GB.
"""

from __future__ import annotations

import statistics
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import harness
import peers
import steps
from floor import training_floor
from harness import Ratio, Report, Timings, available_bytes, in_fresh_process, interleave
from peers import PKM, PLAIN
from pkmem import MemoryConfig, ProductKeyMemory
from steps import FUSED, LEAN, OURS, SPARSE, flow_of, moments_of, our_step, steps_on_one_table

FLOOR = "floor"
SIZES, TOKENS = tuple(MemoryConfig(dim=256, num_sub_keys=s) for s in (128, 256, 512, 1024, 2048)), 2048
TINY, TINY_TOKENS = tuple(MemoryConfig(dim=16, num_sub_keys=s, heads=2, knn=4, query_dim=16) for s in (8, 16, 32)), 32
COMPARED = 3  # the largest sizes, which are interleaved with each other


def main() -> None:
    """Measures both parts and writes growth.json, growth.md and growth.png."""
    options = harness.start(__doc__, repeats=15)
    report = Report("growth", options)
    configs, tokens = (TINY, TINY_TOKENS) if options.smoke else (SIZES, TOKENS)
    run = in_own_process if not options.smoke else lambda function, *arguments: function(*arguments)
    by_slots = {config.num_slots: run(all_at_one_size, config, tokens, options.repeats) for config in configs}
    for slots, timings in by_slots.items():
        add_size(report, slots, timings)
    compared = run(ours_at_all_sizes, configs[-COMPARED:], tokens, options.repeats)
    add_growth(report, configs[-COMPARED:], compared)
    plot(by_slots, tokens, options.out / "growth.png")
    for note in (*steps.NOTES.values(), peers.NOTES[PLAIN], peers.NOTES[PKM]):
        report.note(note)
    report.write()


def in_own_process(function: Any, *arguments: Any) -> Timings:
    """The timings of a process of its own, or why there are none."""
    try:
        timings: Timings = in_fresh_process(function, *arguments)
        return timings
    except BrokenProcessPool as error:
        return Timings({}, {"all": harness.one_line(error)})


def all_at_one_size(config: MemoryConfig, tokens: int, repeats: int) -> Timings:
    """Ours, the peers that fit in memory, and the floor."""
    memory = ProductKeyMemory(config)
    x, grad_output = flow_of(config, tokens)
    table_bytes = memory.values.weight.nbytes
    names = (LEAN, SPARSE, FUSED, PKM)
    fits = available_bytes() > (2 + 2) * table_bytes + (2 << 30)  # moments, a dense gradient, and what falls between
    contenders = steps_on_one_table(memory, names if fits else (LEAN, SPARSE), x, grad_output)
    moments = moments_of(contenders[OURS].optimizers[-1], memory.values.weight)
    floor = training_floor(memory, x, grad_output, moments)
    timings = floor.added_to(interleave(contenders | floor.parts, repeats))
    left_out = {} if fits else dict.fromkeys((FUSED, PKM), f"a gradient of {table_bytes / 1e9:.1f} GB does not fit")
    return Timings(timings.seconds, timings.failed | left_out)


def ours_at_all_sizes(configs: tuple[MemoryConfig, ...], tokens: int, repeats: int) -> Timings:
    """Ours and the floor at several sizes, interleaved with each other."""
    contenders: dict[str, Any] = {}
    floors = {}
    for config in configs:
        memory = ProductKeyMemory(config)
        flow = flow_of(config, tokens)
        step = our_step(memory, *flow)
        step()
        moments = moments_of(step.optimizers[-1], memory.values.weight)
        floors[config] = training_floor(memory, *flow, moments)
        contenders[_at(OURS, config)] = step
        contenders |= {_at(part, config): run for part, run in floors[config].parts.items()}
    timings = interleave(contenders, repeats)
    for config, floor in floors.items():
        factors = {_at(part, config): factor for part, factor in floor.factors.items()}
        timings = timings.with_sum(_at(FLOOR, config), factors)
    return timings


def _at(name: str, config: MemoryConfig) -> str:
    return f"{name}, s {config.num_sub_keys:,}"


def add_size(report: Report, slots: int, timings: Timings) -> None:
    """Lines of one size."""
    report.keep(f"{slots:,} slots", timings)
    for name in (SPARSE, FUSED, PKM):
        if name in timings.seconds:
            report.add(f"{slots:,} slots: {name} / ours", timings.ratio(name, OURS))
    for name in (FUSED, PKM):
        if name in timings.seconds:
            report.add(f"{slots:,} slots: {name} / ours with one second moment a row alone", timings.ratio(name, LEAN))
    if FLOOR in timings.seconds:
        report.add(f"{slots:,} slots: ours / floor", timings.ratio(OURS, FLOOR))


def add_growth(report: Report, configs: tuple[MemoryConfig, ...], timings: Timings) -> None:
    """Lines of the growth from the smallest size compared to the others."""
    report.keep("growth", timings)
    if not timings.seconds:
        return
    first = configs[0]
    for config in configs[1:]:
        what = f"s {config.num_sub_keys:,} over s {first.num_sub_keys:,}"
        report.add(f"{what}: slots", config.num_slots / first.num_slots)
        report.add(f"{what}: floor", timings.ratio(_at(FLOOR, config), _at(FLOOR, first)))
        report.add(f"{what}: ours", timings.ratio(_at(OURS, config), _at(OURS, first)))
        names = (_at(OURS, config), _at(OURS, first), _at(FLOOR, config), _at(FLOOR, first))
        turns = zip(*(timings.seconds[name] for name in names), strict=True)
        beyond = Ratio.of((ours / ours0) / (floor / floor0) for ours, ours0, floor, floor0 in turns)
        report.add(f"{what}: growth of ours / growth of the floor", beyond)


def plot(by_slots: dict[int, Timings], tokens: int, path: Path) -> None:
    """Time per token against slots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (PKM, FUSED, SPARSE, OURS, LEAN, FLOOR):
        points = [(slots, timings.seconds[name]) for slots, timings in by_slots.items() if name in timings.seconds]
        if points:
            microseconds = [statistics.median(seconds) / tokens * 1e6 for _, seconds in points]
            style = "k--" if name == FLOOR else "o-"
            axes.plot([slots for slots, _ in points], microseconds, style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="slots", ylabel="training step, microseconds per token")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
