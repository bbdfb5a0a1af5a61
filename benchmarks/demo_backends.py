"""How much faster does the demo's model train with the CPU kernels than with plain torch operators?

    python benchmarks/demo_backends.py

The demo's model with memory on a part of its tokens, both backends in turns, each run in a process of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from unittest import mock

import harness
from harness import Report, Timings, in_fresh_process

CPU, REFERENCE = "numba kernels", "reference"
TOKENS, TINY_TOKENS = 100_000, 2_048


def main() -> None:
    """Measures both and writes demo_backends.json and demo_backends.md."""
    options = harness.start(__doc__, repeats=3)
    report = Report("demo_backends", options)
    tokens, data = (TINY_TOKENS, str(Path(__file__).parent)) if options.smoke else (TOKENS, "python")
    seconds: dict[str, list[float]] = {CPU: [], REFERENCE: []}
    for turn in range(1 if options.smoke else options.repeats):
        for backend in (CPU, REFERENCE) if turn % 2 == 0 else (REFERENCE, CPU):
            seconds[backend].append(in_fresh_process(train_seconds, backend, tokens, data))
    timings = Timings(seconds)
    report.keep(f"training on {tokens:,} tokens", timings)
    report.add(f"demo's memory model, seconds of training: {REFERENCE} / {CPU}", timings.ratio(REFERENCE, CPU))
    for backend in (CPU, REFERENCE):
        report.add(f"{backend}: seconds for {tokens:,} tokens", timings.median(backend))
    report.write()


def train_seconds(backend: str, tokens: int, data: str) -> float:
    """Seconds of training alone, of the demo's model with memory."""
    from pkmem.experiments.demo import recipes
    from pkmem.ops import backends
    from pkmem.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipes(Path(folder), data)["memory"]
        short = dataclasses.replace(recipe.training, num_tokens=tokens, eval_every_steps=10**9, eval_tokens=4096)
        recipe = dataclasses.replace(recipe, training=short, tokenizer=None)
        fastest = backends._fastest_on_the_cpu if backend == CPU else lambda: "reference"
        with mock.patch("pkmem.ops.backends._fastest_on_the_cpu", fastest):
            seconds: float = train(recipe, progress=False)["train_seconds"]
    return seconds


if __name__ == "__main__":
    main()
