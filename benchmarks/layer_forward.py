"""What does the layer's forward cost: ours, plain torch, the packages, the MLP it replaces, and the floor?

    python benchmarks/layer_forward.py

Evaluation mode, no gradient; 2,048 tokens, 8, and 1. Each call reads another input of many, so that rows do not wait in
a cache. The floor (see floor.py) stands beside 2,048 tokens; at a few tokens calls cost more than work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import harness
import peers
from floor import Floor, forward_floor
from harness import Options, Report, check_same, interleave
from peers import FFN, LAYERS, PLAIN
from pkmem import MemoryConfig, ProductKeyMemory

OURS = "pkmem"
MANY_READS = 2048 * 128  # over all inputs of a contender


@dataclass(frozen=True)
class Case:
    """A layer, the tokens of a call, and whether its floor is measured."""

    config: MemoryConfig
    tokens: int
    with_floor: bool = False

    def __str__(self) -> str:
        return f"width {self.config.dim}, s {self.config.num_sub_keys}, {self.tokens:,} tokens"


CASES = (
    Case(MemoryConfig(dim=512), 2048, with_floor=True),
    Case(MemoryConfig(dim=1024), 2048, with_floor=True),
    Case(MemoryConfig(dim=512), 8),
    Case(MemoryConfig(dim=1024), 8),
    Case(MemoryConfig(dim=512), 1),
    Case(MemoryConfig(dim=1024), 1),
)
TINY = MemoryConfig(dim=16, num_sub_keys=16, heads=2, knn=4, query_dim=16)
SMOKE = (Case(TINY, 32, with_floor=True), Case(TINY, 1))


def main() -> None:
    """Measures every case and writes layer_forward.json and layer_forward.md."""
    options = harness.start(__doc__, repeats=31)
    report = Report("layer_forward", options)
    for case in SMOKE if options.smoke else CASES:
        measure(report, options, case)
    for note in peers.NOTES.values():
        report.note(note)
    report.write()


@torch.no_grad()
def measure(report: Report, options: Options, case: Case) -> None:
    """Adds one case to the report."""
    memory = ProductKeyMemory(case.config)
    settle_norm(memory)
    layers = {OURS: memory.eval()}
    for name, build in LAYERS.items():
        try:
            layers[name] = build(memory).eval()
        except ImportError as error:
            report.note(f"{name} is not installed: {harness.one_line(error)}")
    reads_per_input = case.tokens * case.config.heads * case.config.knn
    inputs = [torch.randn(case.tokens, case.config.bound_dim) for _ in range(max(1, MANY_READS // reads_per_input))]
    check_same(str(case), memory(inputs[0]), layers[PLAIN](inputs[0]))
    floor = forward_floor(memory, inputs[0]) if case.with_floor else Floor({}, {}, {})
    contenders = {name: calling(layer, inputs) for name, layer in layers.items()}
    timings = interleave(contenders | floor.parts, options.repeats)
    if floor.parts:
        timings = floor.added_to(timings)
        report.details[f"{case}, rates"] = floor.rates(timings)
    report.keep(str(case), timings)
    best = timings.fastest(name for name in LAYERS if name != FFN)
    report.add(f"{case}: best peer ({best}) / ours", timings.ratio(best, OURS))
    for name in timings.seconds:
        if name in LAYERS and name != best:
            report.add(f"{case}: {name} / ours", timings.ratio(name, OURS))
    if floor.parts:
        report.add(f"{case}: ours / floor", timings.ratio(OURS, "floor"))


def settle_norm(memory: ProductKeyMemory) -> None:
    """Gives the batch norm statistics of its inputs, or evaluation would not normalise."""
    memory.train()
    for _ in range(20):
        memory.query(torch.randn(64, memory.config.bound_dim))


def calling(layer: nn.Module, inputs: list[Tensor]) -> Callable[[], Tensor]:
    """A call of the layer on the next input each time."""
    following = itertools.cycle(inputs)
    return lambda: layer(next(following))


if __name__ == "__main__":
    main()
