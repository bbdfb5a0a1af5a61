"""Does a language model with a memory of one or two billion parameters train on this machine?

    python benchmarks/billion.py

A GPT-2 of four blocks, one with a gated memory of bf16 values, on the Python standard library: 1,024^2 slots x 1,024 with
moments in bf16, for 100 steps of 2,048 tokens, and 1,448^2 slots x 1,024 with one second moment a row alone, for 50. Each
trains in a process of its own. The loss of every step, its seconds and the peak memory are in billion.json. Needs 14 GB,
most of it to make two billion values in fp32, of which the bf16 table is rounded.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness import Report, in_fresh_process, peak_bytes
from pkmem import CombinedOptimizer, MemoryConfig, RowAdam
from pkmem.layer.optim import dense_parameters
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.text import TokenBlocks, read_documents, tokenize, train_tokenizer


@dataclass(frozen=True)
class Sizes:
    """A model, its memory, what its RowAdam keeps, and how long it trains."""

    model: ModelConfig
    memory: MemoryConfig
    options: dict[str, Any]
    steps: int
    sequences: int
    documents: int
    data: str = "python"


ONE = Sizes(
    ModelConfig(num_layers=4, width=256, num_heads=4, context_tokens=256, vocab_size=4096, memory_layers=[2]),
    MemoryConfig(num_sub_keys=1024, value_dim=1024, gate=True),
    {"moment_dtype": torch.bfloat16},
    steps=100,
    sequences=8,
    documents=400,
)
ROWS = {"second_moment": "row", "betas": (0.0, 0.98)}
TWO = replace(ONE, memory=MemoryConfig(num_sub_keys=1448, value_dim=1024, gate=True), options=ROWS, steps=50)
TINY = Sizes(
    ModelConfig(num_layers=2, width=32, num_heads=2, context_tokens=32, vocab_size=300, memory_layers=[1]),
    MemoryConfig(num_sub_keys=16, heads=2, knn=4, query_dim=16, value_dim=64, gate=True),
    {"moment_dtype": torch.bfloat16},
    steps=4,
    sequences=2,
    documents=4,
    data=str(Path(__file__).parent),
)
MOMENTS, ALONE = "moments in bf16", "one second moment a row alone"
FULL, SMOKE = {MOMENTS: ONE, ALONE: TWO}, {MOMENTS: TINY, ALONE: replace(TINY, options=ROWS)}


@dataclass(frozen=True)
class Trained:
    """What was measured of a run."""

    parameters: int
    losses: list[float]
    seconds: list[float]
    peak: int
    state: str


def main() -> None:
    """Trains, and writes billion.json and billion.md."""
    options = harness.start(__doc__, repeats=1)
    report = Report("billion", options)
    for name, sizes in (SMOKE if options.smoke else FULL).items():
        add(report, name, sizes, in_fresh_process(train, sizes))
    report.write()


def train(sizes: Sizes) -> Trained:
    """Trains one model, in a process that does nothing else."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        blocks, vocab_size, end = read_blocks(sizes, Path(folder))
        model = build(sizes, vocab_size, end)
        values = RowAdam(model, lr=2e-3, max_norm=1.0, **sizes.options)
        losses, seconds = run(model, values, blocks, sizes)
    ((table, state),) = values.state.items()
    moments = ", ".join(f"{name} {part.dtype} of {part.numel():,}" for name, part in state.items() if "exp" in name)
    return Trained(table.numel(), losses, seconds, peak_bytes(), f"values {table.dtype}, {moments}")


def read_blocks(sizes: Sizes, folder: Path) -> tuple[TokenBlocks, int, int]:
    """Blocks of text, the vocabulary's size and its end-of-text token."""
    tokenizer = train_tokenizer(
        itertools.islice(read_documents(sizes.data, "train"), sizes.documents), sizes.model.vocab_size
    )
    tokens = tokenize(sizes.data, "train", tokenizer, cache_dir=folder, progress=False)
    return (
        TokenBlocks(tokens, sizes.model.context_tokens, sizes.steps * sizes.sequences),
        len(tokenizer),
        tokenizer.eos_token_id,
    )


def build(sizes: Sizes, vocab_size: int, end: int) -> nn.Module:
    """The model, its table in bf16."""
    model = build_model(sizes.model, sizes.memory, vocab_size, end)
    for table in tables_in(model):
        table.weight = nn.Parameter(table.weight.detach().to(torch.bfloat16))
    return model.train()


def run(model: nn.Module, values: RowAdam, blocks: TokenBlocks, sizes: Sizes) -> tuple[list[float], list[float]]:
    """Loss and seconds of every step."""
    optimizer = CombinedOptimizer(torch.optim.AdamW(dense_parameters(model), 2e-3, fused=True), values)
    losses, seconds = [], []
    for step in range(sizes.steps):
        begin = time.perf_counter()
        batch = [blocks[step * sizes.sequences + place]["input_ids"] for place in range(sizes.sequences)]
        tokens = torch.stack(batch)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(dense_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    return losses, seconds


def add(report: Report, name: str, sizes: Sizes, trained: Trained) -> None:
    """What was trained, and whether it learned."""
    few = max(1, sizes.steps // 10)
    report.details[name] = {"loss": trained.losses, "seconds": trained.seconds}
    report.add(f"{name}: parameters of the table, billions", trained.parameters / 1e9)
    report.add(f"{name}: steps", sizes.steps)
    report.add(f"{name}: tokens per step", sizes.sequences * sizes.model.context_tokens)
    report.add(f"{name}: loss, first {few} steps", statistics.mean(trained.losses[:few]))
    report.add(f"{name}: loss, last {few} steps", statistics.mean(trained.losses[-few:]))
    report.add(f"{name}: peak RSS, GB", trained.peak / 1e9)
    seconds = statistics.median(trained.seconds)
    report.note(f"{name}: seconds per step, median of this run on this machine: {seconds:.2f}")
    report.note(f"{name}: {trained.state}")


if __name__ == "__main__":
    main()
