"""A plan in words and numbers."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from pkmem.layer.room import bytes_of
from pkmem.planning.advice import advise
from pkmem.planning.devices import Device, read_devices
from pkmem.planning.machine import measure
from pkmem.planning.plan import Plan, layout_of, make_plan, trace_of
from pkmem.planning.wire import Wire
from pkmem.training.reading import check_known
from pkmem.training.recipe import Recipe

_MOST_PER_HOST = 8
_THIS = "this"
_WIDTH = 100


def planned(
    recipe: Recipe, processes: int = 1, per_host: int | None = None, device: str = _THIS, devices: Path | None = None
) -> tuple[Plan, str]:
    """Plans a training run.

    Args:
        recipe: the run.
        processes: in all, one per device, >= 1.
        per_host: processes of a host, a divisor of `processes`; None is as many as divide it, up to 8.
        device: a name of configs/devices.yaml, or "this" for this machine, which is measured.
        devices: a file of further devices.

    Returns:
        the plan, and what to change.

    Raises:
        ValueError: the model cannot be built, the processes cannot share it, or there is no such device.
    """
    known = read_devices(*([devices] if devices else []))
    check_known(device, [_THIS, *known], "device")
    if per_host is None:
        per_host = max(count for count in range(1, _MOST_PER_HOST + 1) if processes % count == 0)
    layout = layout_of(recipe, processes, per_host)
    trace = trace_of(recipe, processes)
    if device == _THIS:
        torch.set_num_threads(max(1, torch.get_num_threads() // per_host))
        memory_bytes = bytes_of(torch.device("cpu")) / per_host
        on: Device = measure([*trace.forward, *trace.backward], trace.tables, memory_bytes, processes > 1)
    else:
        on = known[device]
    plan = make_plan(recipe, layout, on, trace)
    return plan, advise(plan, trace)


def as_json(plan: Plan, advice: str) -> str:
    """The plan as a JSON object; bytes, seconds and counts, without units of other sizes."""
    document: dict[str, Any] = {
        "recipe": plan.recipe.to_dict(),
        "layout": dataclasses.asdict(plan.layout),
        "device": plan.device.name,
        "fits": plan.fits,
        "memory_bytes": plan.memory,
        "device_bytes": plan.device.memory_bytes,
        "flops_per_token": plan.flops_per_token,
        "bytes_per_token": plan.bytes_per_token,
        "wire_bytes_per_token": {name: wire._asdict() for name, wire in plan.wire_per_token.items()},
        "step_seconds": plan.seconds,
        "tokens_per_s": plan.tokens_per_s,
        "bottleneck": plan.bottleneck,
        "advice": advice,
    }
    return json.dumps(document, indent=2)


def as_text(plan: Plan, advice: str) -> str:
    """The plan for people."""
    layout, share = plan.layout, plan.seconds[plan.bottleneck] / plan.step_seconds
    fits = "fits" if plan.fits else "does not fit"
    unit, scale = ("GB", 1e9) if plan.memory_bytes > 1e9 else ("MB", 1e6)
    lines = [
        *_sentences(plan),
        "",
        *_table("bytes of a device, when they are most", unit, plan.memory, scale, 2),
        f"  {'of ' + plan.device.name + ', ' + fits:44}{plan.device.memory_bytes / scale:14,.2f}",
        "",
        *_line("per token: products, forward and backward, MFLOP", plan.flops_per_token / 1e6, 1),
        *_line("per token: memory read and written, KB", plan.bytes_per_token / 1e3, 1),
    ]
    if layout.num_processes > 1:
        for where in Wire._fields[: 1 + (layout.hosts > 1)]:
            received = {name: getattr(wire, where) for name, wire in plan.wire_per_token.items()}
            what = {"inside": "its own host", "between": "other hosts"}[where]
            lines += ["", *_table(f"per token: received from {what}", "KB", received, 1e3, 2)]
    lines += [
        "",
        *_table("an update, one after the other", "ms", plan.seconds, 1e-3, 2),
        *_line("tokens a second, all processes together", plan.tokens_per_s, 0),
        "",
        *textwrap.wrap(f"Bottleneck: {plan.bottleneck}, {share:.0%} of the time.", _WIDTH),
        *textwrap.wrap(f"To change: {advice}", _WIDTH),
        "",
        *textwrap.wrap(_assumed(plan), _WIDTH),
    ]
    return "\n".join(lines)


def _sentences(plan: Plan) -> list[str]:
    layout, name = plan.layout, plan.device.name
    where = "this machine" if name == _THIS else f"{name}"
    one = layout.num_processes == 1
    hosts = f" in {layout.hosts} hosts" if layout.hosts > 1 else ""
    who = f"One process on {where}" if one else f"{layout.num_processes} processes on {where}{hosts}"
    shared = "" if one else f": {layout.columns} columns x {layout.replicas} replicas, {layout.parallel}"
    return [
        f"{who}{shared}.",
        f"{plan.table_params:,} parameters in tables, {plan.dense_params:,} outside.",
        f"{plan.tokens:,} tokens of each process in an update, {plan.recipe.training.batch_tokens:,} in all.",
    ]


def _assumed(plan: Plan) -> str:
    if plan.device.name == _THIS:
        return "Reckoned with operators measured here, one after the other; other work on the machine adds to it."
    return (
        "A bound: every operator at the full rate of products or memory, whichever takes longer, one after the other; no "
        "time between them. Dense gradients travel during the last backward pass; everything waits for what tables exchange."
    )


def _table(title: str, unit: str, parts: dict[str, Any], scale: float, digits: int) -> list[str]:
    lines = [f"{title:46}{unit:>14}"]
    lines += [f"  {name:44}{part / scale:14,.{digits}f}" for name, part in parts.items() if part]
    return [*lines, f"  {'sum':44}{sum(parts.values()) / scale:14,.{digits}f}"]


def _line(title: str, figure: float, digits: int) -> list[str]:
    return [f"{title:46}{figure:14,.{digits}f}"]
