"""What do halves save: a layer in bf16, an fp32 layer under autocast and an fp32 layer with a bf16 table, against fp32?

    python benchmarks/halves.py

2,048 tokens, a forward without gradient and a training step as in training_step.py, each form with tables of its own: width
512 with 512^2 slots, and width 256 with 4 million slots, there with bf16 moments in both forms. Needs 20 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

import harness
from harness import Options, Report, interleave
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import dense_parameters
from steps import BETAS, LR, NEVER, TrainingStep, flow_of

FP32 = "fp32"


@dataclass(frozen=True)
class Form:
    """What of a layer is in bf16.

    Args:
        layer: all of it. table: the values alone. autocast: what torch's autocast chooses.
        options: of RowAdam.
    """

    layer: bool = False
    table: bool = False
    autocast: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A layer, and the forms it is compared in."""

    config: MemoryConfig
    forms: dict[str, Form]
    tokens: int = 2048


HALF = {"moment_dtype": torch.bfloat16}
ALL = {
    FP32: Form(),
    "all in bf16": Form(layer=True),
    "autocast": Form(autocast=True),
    "a bf16 table": Form(table=True),
    "bf16 moments": Form(options=HALF),
}
LARGE = {FP32: Form(options=HALF), "a bf16 table": Form(table=True, options=HALF)}
CASES = (Case(MemoryConfig(dim=512), ALL), Case(MemoryConfig(dim=256, num_sub_keys=2048), LARGE))
TINY = MemoryConfig(dim=16, num_sub_keys=16, heads=2, knn=4, query_dim=16)
SMOKE = (Case(TINY, ALL, 32), Case(TINY, LARGE, 33))


class UnderAutocast(nn.Module):
    """A layer as a training loop with autocast calls it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.layer(x)
        return out


def main() -> None:
    """Measures both cases and writes halves.json and halves.md."""
    options = harness.start(__doc__, repeats=15)
    report = Report("halves", options)
    for case in SMOKE if options.smoke else CASES:
        measure(report, options, case)
    report.note("a processor without instructions for products of halves multiplies them by way of fp32, in all forms")
    report.write()


def measure(report: Report, options: Options, case: Case) -> None:
    """Adds one case to the report: time of fp32 over that of each form."""
    contenders: dict[str, Callable[[], object]] = {}
    for name, form in reversed(case.forms.items()):  # what a table in fp32 leaves when it is converted serves the next
        contenders |= {f"{name}: {what}": run for what, run in runs(case, form).items()}
    timings = interleave(contenders, options.repeats)
    label = f"width {case.config.dim}, s {case.config.num_sub_keys}, {case.tokens:,} tokens"
    report.keep(label, timings)
    for what in ("forward", "training step"):
        for name in case.forms:
            if name != FP32:
                ratio = timings.ratio(f"{FP32}: {what}", f"{name}: {what}")
                report.add(f"{label}: {what}, fp32 / {name}", ratio)


def runs(case: Case, form: Form) -> dict[str, Callable[[], object]]:
    """A forward and a training step of one form."""
    torch.manual_seed(0)
    memory = ProductKeyMemory(case.config)
    if form.layer:
        memory.to(torch.bfloat16)
    if form.table:
        memory.values.to(torch.bfloat16)
    dtype = torch.bfloat16 if form.layer else torch.float32
    x, grad_output = (part.to(dtype) for part in flow_of(case.config, case.tokens))
    dense = dense_parameters(memory)
    values = RowAdam(memory, LR, BETAS, max_norm=NEVER, **form.options)
    layer = UnderAutocast(memory) if form.autocast else memory
    step = TrainingStep(layer, [Adam(dense, LR, BETAS, fused=True), values], x, grad_output, dense)
    return {"forward": partial(forward, layer, x), "training step": step}


@torch.no_grad()
def forward(layer: nn.Module, x: Tensor) -> Tensor:
    """Without gradient; as in training, whose batch norm is that of the step."""
    out: Tensor = layer(x)
    return out


if __name__ == "__main__":
    main()
