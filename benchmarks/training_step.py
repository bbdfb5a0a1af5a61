"""What does a training step of the layer cost: forward, backward, clipping, update of everything?

    python benchmarks/training_step.py

2,048 tokens; gradients in the input too, as inside a model. Ours trains its values with RowAdam, with all of Adam's moments
and with one second moment a row alone; the peers with SparseAdam (the same rule) or a dense Adam, whichever form is fastest.
steps.py says what is shared and checked, floor.py what the floors are. Needs 20 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

import harness
import peers
import steps
from floor import training_floor
from harness import Options, Report, interleave
from peers import FFN, PEER, PKM
from pkmem import MemoryConfig, ProductKeyMemory
from steps import DENSE, FOREACH, FUSED, LEAN, OURS, SPARSE, flow_of, moments_of, steps_on_one_table

PEERS = (SPARSE, FUSED, FOREACH, PKM, PEER, FFN)
OF_LARGE_TABLES = (SPARSE, FUSED, PKM)  # the fastest of them; the others would want tables of their own
LEAN_FLOOR = "floor without moments"


@dataclass(frozen=True)
class Case:
    """A layer, and the tokens of a training step."""

    config: MemoryConfig
    tokens: int = 2048
    peers: tuple[str, ...] = PEERS

    def __str__(self) -> str:
        return f"width {self.config.dim}, s {self.config.num_sub_keys}, {self.tokens:,} tokens"


CASES = (
    Case(MemoryConfig(dim=512)),
    Case(MemoryConfig(dim=1024)),
    Case(MemoryConfig(dim=512, num_sub_keys=1024), peers=OF_LARGE_TABLES),
)
SMOKE = (Case(MemoryConfig(dim=16, num_sub_keys=16, heads=2, knn=4, query_dim=16), 32),)


def main() -> None:
    """Measures every case and writes training_step.json and training_step.md."""
    options = harness.start(__doc__, repeats=15)
    report = Report("training_step", options)
    for case in SMOKE if options.smoke else CASES:
        measure(report, options, case)
    for note in (*steps.NOTES.values(), *peers.NOTES.values()):
        report.note(note)
    report.write()


def measure(report: Report, options: Options, case: Case) -> None:
    """Adds one case to the report."""
    memory = ProductKeyMemory(case.config)
    x, grad_output = flow_of(case.config, case.tokens)
    contenders = steps_on_one_table(memory, (LEAN, *case.peers), x, grad_output)
    moments = moments_of(contenders[OURS].optimizers[-1], memory.values.weight)
    floor = training_floor(memory, x, grad_output, moments)
    lean_floor = training_floor(memory, x, grad_output, {})
    timings = interleave(contenders | floor.parts | lean_floor.parts, options.repeats)
    timings = lean_floor.added_to(floor.added_to(timings), LEAN_FLOOR)
    report.keep(str(case), timings)
    report.details[f"{case}, rates"] = floor.rates(timings) | lean_floor.rates(timings)
    report.add(f"{case}: SparseAdam / ours", timings.ratio(SPARSE, OURS))
    best = timings.fastest(DENSE)
    report.add(f"{case}: best dense peer ({best}) / ours", timings.ratio(best, OURS))
    report.add(f"{case}: best dense peer ({best}) / ours with one second moment a row alone", timings.ratio(best, LEAN))
    for name in case.peers:
        if name in timings.seconds and name not in (SPARSE, best):
            report.add(f"{case}: {name} / ours", timings.ratio(name, OURS))
    report.add(f"{case}: ours / floor", timings.ratio(OURS, "floor"))
    report.add(f"{case}: ours with one second moment a row alone / its floor", timings.ratio(LEAN, LEAN_FLOOR))


if __name__ == "__main__":
    main()
