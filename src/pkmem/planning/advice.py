"""What to change about a planned run: other settings of the recipe, each planned, and the best of them named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pkmem.planning.plan import Plan, layout_of, make_plan, trace_of
from pkmem.planning.trace import Trace

_WORTH = 1.1  # times as fast is worth a change


def advise(plan: Plan, trace: Trace) -> str:
    """One sentence: the change that makes a run fit, or else much faster; where there is none, what would be needed.

    Args:
        plan: of the run.
        trace: of its micro-batch.
    """
    others = [(name, other) for name, other in _others(plan, trace) if other.fits]
    if not others:
        return "Nothing of this kind makes it faster by a tenth." if plan.fits else _too_large(plan, trace)
    name, best = max(others, key=lambda pair: pair[1].tokens_per_s)
    if not plan.fits:
        return f"{name} makes it fit: {_gb(best)}, {best.step_seconds / plan.step_seconds:.2f} times the time."
    gain = best.tokens_per_s / plan.tokens_per_s
    if gain < _WORTH:
        return "No other columns, parallel, precision or micro_batches makes it faster by a tenth."
    return f"{name} makes it {gain:.2f} times as fast, at {_gb(best)}."


def _others(plan: Plan, trace: Trace) -> Iterator[tuple[str, Plan]]:
    """The same run with one setting changed; those that need no other trace first."""
    layout, training = plan.layout, plan.recipe.training
    for columns in _columns(plan, trace):
        yield _changed(plan, trace, "columns", layout.columns, columns)
    if layout.num_processes > 1:
        other = "fsdp" if layout.parallel == "ddp" else "ddp"
        yield _changed(plan, trace, "parallel", layout.parallel, other)
    sequences, micro_batches, fits = plan.recipe.micro_batch_sequences, training.micro_batches, plan.fits
    while not fits and sequences % (2 * layout.num_processes) == 0:
        sequences, micro_batches = sequences // 2, 2 * micro_batches
        name, changed = _changed(plan, None, "micro_batches", training.micro_batches, micro_batches)
        fits = changed.fits
        yield name, changed
    if training.micro_batches % 2 == 0 and plan.fits:
        yield _changed(plan, None, "micro_batches", training.micro_batches, training.micro_batches // 2)
    if training.precision == "fp32" and plan.device.name != "this":
        yield _changed(plan, None, "precision", "fp32", "bf16")


def _changed(plan: Plan, trace: Trace | None, name: str, before: Any, after: Any) -> tuple[str, Plan]:
    recipe = replace(plan.recipe, training=replace(plan.recipe.training, **{name: after}))
    layout = layout_of(recipe, plan.layout.num_processes, plan.layout.per_host)
    made = make_plan(recipe, layout, plan.device, trace or trace_of(recipe, layout.num_processes))
    return f"training.{name}={after} instead of {before}", made


def _columns(plan: Plan, trace: Trace) -> list[int]:
    """Other numbers of processes that could share the columns."""
    if plan.recipe.training.value_grad == "dense" or not plan.table_params:
        return []
    processes = plan.layout.num_processes
    return [
        count
        for count in range(1, processes + 1)
        if processes % count == 0 and count != plan.layout.columns and not any(t.width % count for t in trace.tables)
    ]


def _too_large(plan: Plan, trace: Trace) -> str:
    """How far it is from fitting, by the largest of what it needs."""
    name = max(plan.memory, key=plan.memory.__getitem__)
    over = plan.memory_bytes - plan.device.memory_bytes
    text = f"No columns, parallel, precision or micro_batches makes it fit: {over / 1e9:,.1f} GB too many, "
    text += f"of {plan.memory[name] / 1e9:,.1f} of {name}. "
    halved = plan.memory.get("values", 0) / 2 + plan.memory.get("moments of the values", 0) / 2
    if over <= halved:
        return text + "Values and moments in bf16 would halve those two and fit (your own script: docs, What it costs)."
    if "values" in plan.memory:
        whole = plan.memory["values"] + plan.memory["moments of the values"]
        if whole > over:
            sub_keys = plan.recipe.memory.num_sub_keys * (1 - over / whole) ** 0.5
            return text + f"memory.num_sub_keys={int(sub_keys)} fits."
    return text + "Take more devices, larger ones or a smaller model."


def _gb(plan: Plan) -> str:
    return f"{plan.memory_bytes / 1e9:,.1f} of {plan.device.memory_bytes / 1e9:,.0f} GB"
