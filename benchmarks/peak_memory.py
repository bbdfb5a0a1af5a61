"""How much memory does a training step need, beside the parameters and Adam's two moments?

    python benchmarks/peak_memory.py

The most memory a process had resident over three training steps of 2,048 tokens, interpreter and libraries included, each
contender in a process of its own.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import torch

import harness
import peers
import steps
from harness import Report, in_fresh_process, one_line, peak_bytes
from peers import FFN, PEER
from pkmem import MemoryConfig, ProductKeyMemory
from steps import OURS, STEPS, flow_of

CASES, TOKENS = (MemoryConfig(dim=512), MemoryConfig(dim=256, num_sub_keys=1024)), 2048
TINY, TINY_TOKENS = (MemoryConfig(dim=16, num_sub_keys=16, heads=2, knn=4, query_dim=16),), 32
GB = 1e9


def main() -> None:
    """Measures every contender and writes peak_memory.json and peak_memory.md."""
    options = harness.start(__doc__, repeats=1)
    report = Report("peak_memory", options)
    configs, tokens = (TINY, TINY_TOKENS) if options.smoke else (CASES, TOKENS)
    names = (OURS,) if options.smoke else tuple(name for name in STEPS if name != FFN)
    for config in configs:
        case = f"width {config.dim}, s {config.num_sub_keys}"
        for name in names:
            try:
                measured = in_fresh_process(measure, name, config, tokens)
            except (BrokenProcessPool, ImportError) as error:
                report.note(f"{name} could not run ({case}): {one_line(error)}")
                continue
            report.details[f"{case}: {name}"] = measured
            add(report, f"{case}: {name}", measured)
    for note in (*steps.NOTES.values(), *peers.NOTES.values()):
        report.note(note)
    report.write()


def measure(name: str, config: MemoryConfig, tokens: int) -> dict[str, int]:
    """Bytes of a fresh process: with all libraries and kernels loaded, of parameters and moments, and at the peak."""
    STEPS[name](ProductKeyMemory(TINY[0]), *flow_of(TINY[0], TINY_TOKENS))()
    libraries = peak_bytes()
    with torch.device("meta" if name == PEER else "cpu"):  # PEER makes tables of its own
        memory = ProductKeyMemory(config)
    step = STEPS[name](memory, *flow_of(config, tokens))
    for _ in range(3):
        step()
    needed = 3 * sum(parameter.nbytes for parameter in step.layer.parameters())
    return {"libraries": libraries, "parameters_and_moments": needed, "peak": peak_bytes()}


def add(report: Report, what: str, measured: dict[str, int]) -> None:
    """The lines of one contender, in GB."""
    needed, peak = measured["parameters_and_moments"] / GB, measured["peak"] / GB
    report.add(f"{what}: parameters and moments, GB", needed)
    report.add(f"{what}: peak RSS, GB", peak)
    libraries = measured["libraries"] / GB
    report.add(f"{what}: peak less parameters, moments and libraries ({libraries:.2f}), GB", peak - needed - libraries)


if __name__ == "__main__":
    main()
