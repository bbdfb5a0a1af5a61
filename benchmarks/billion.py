"""Does a language model with a memory of a billion parameters train on this machine?

    python benchmarks/billion.py

A GPT-2 of four blocks, one with a gated memory of 1,024^2 slots x 1,024, values and moments in bf16, on the Python
standard library: 100 steps of 2,048 tokens. The loss of every step, its seconds and the peak memory are in billion.json.
"""

from __future__ import annotations

import inspect
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness import Report, peak_bytes
from pkmem import CombinedOptimizer, MemoryConfig, RowAdam
from pkmem.layer.optim import dense_parameters
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.text import TokenBlocks, read_documents, tokenize, train_tokenizer


@dataclass(frozen=True)
class Sizes:
    """A model, its memory and how long it trains."""

    model: ModelConfig
    memory: MemoryConfig
    steps: int
    sequences: int
    documents: int
    data: str = "python"


FULL = Sizes(
    ModelConfig(num_layers=4, width=256, num_heads=4, context_tokens=256, vocab_size=4096, memory_layers=[2]),
    MemoryConfig(num_sub_keys=1024, value_dim=1024, gate=True),
    steps=100,
    sequences=8,
    documents=400,
)
SMOKE = Sizes(
    ModelConfig(num_layers=2, width=32, num_heads=2, context_tokens=32, vocab_size=300, memory_layers=[1]),
    MemoryConfig(num_sub_keys=16, heads=2, knn=4, query_dim=16, value_dim=64, gate=True),
    steps=4,
    sequences=2,
    documents=4,
    data=str(Path(__file__).parent),
)


def main() -> None:
    """Trains, and writes billion.json and billion.md."""
    options = harness.start(__doc__, repeats=1)
    report = Report("billion", options)
    sizes = SMOKE if options.smoke else FULL
    with tempfile.TemporaryDirectory() as folder:
        blocks, vocab_size, end = read_blocks(sizes, Path(folder))
        model = build(sizes, vocab_size, end)
        values = row_adam(model)
        report.details = train(model, values, blocks, sizes)
    add(report, sizes, values)
    report.write()


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


def train(model: nn.Module, values: RowAdam, blocks: TokenBlocks, sizes: Sizes) -> dict[str, list[float]]:
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
    return {"loss": losses, "seconds": seconds}


def row_adam(model: nn.Module) -> RowAdam:
    """RowAdam, its moments in bf16 where it can."""
    given: dict[str, Any] = {"lr": 2e-3, "max_norm": 1.0}
    if "moment_dtype" in inspect.signature(RowAdam).parameters:
        given["moment_dtype"] = torch.bfloat16
    return RowAdam(model, **given)


def add(report: Report, sizes: Sizes, values: RowAdam) -> None:
    """What was trained, and whether it learned."""
    ((table, state),) = values.state.items()
    loss, seconds = report.details["loss"], report.details["seconds"]
    few = max(1, sizes.steps // 10)
    first, last = statistics.mean(loss[:few]), statistics.mean(loss[-few:])
    report.add("parameters of the table, billions", table.numel() / 1e9)
    report.add("steps", sizes.steps)
    report.add("tokens per step", sizes.sequences * sizes.model.context_tokens)
    report.add(f"loss, first {few} steps", first)
    report.add(f"loss, last {few} steps", last)
    report.add("peak RSS, GB", peak_bytes() / 1e9)
    report.note(f"seconds per step, median of this run on this machine: {statistics.median(seconds):.2f}")
    report.note(f"values {table.dtype}, moments {state['exp_avg'].dtype} and {state['exp_avg_sq'].dtype}")


if __name__ == "__main__":
    main()
