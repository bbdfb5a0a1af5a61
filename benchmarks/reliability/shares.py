"""What the processes of a sharded memory send each other and hold: trials 12 and 14."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import pkmem
from benchmarks.reliability.failures import ROOT
from benchmarks.reliability.hosts import one_host, why_no_hosts
from benchmarks.reliability.launching import Launch, held_by, require_success, torchrun
from benchmarks.reliability.outcome import Outcome, Trial
from benchmarks.reliability.workers import results
from pkmem.layer.values import tables_in
from pkmem.planning.wire import TableReads, column_bytes_per_token
from pkmem.training.together import Together

# --- 12: bytes on the wire ------------------------------------------------------------------------------


def bytes_on_the_wire(short: bool) -> Iterator[Outcome]:
    """What the kernel counts on the interface of a host that these processes have to themselves."""
    if reason := why_no_hosts():
        yield Outcome(12, "bytes on the wire", "as the formula says", f"not tried: {reason}", None)
        return
    width, tokens, passes = (256, 512, 2) if short else (1024, 2048, 4)
    for columns, bits in [(2, 32)] if short else [(2, 32), (2, 16), (4, 32), (4, 16)]:
        with tempfile.TemporaryDirectory() as folder:
            counted = _counted(Path(folder), columns, width, tokens, passes, bits)
        reads = TableReads(num_slots=64**2, width=width, reads_per_token=4 * 32, element_bytes=bits // 8)
        formula = column_bytes_per_token(reads, columns)
        found = counted / (columns * tokens * passes)
        dtype = {32: "fp32", 16: "bf16"}[bits]
        yield Outcome(
            12,
            f"bytes received per token, forward and backward: {columns} processes, 128 reads, width {width:,}, {dtype}",
            f"{formula:,.0f} by the formula, within 5 %",
            f"{found:,.0f} ({found / formula - 1:+.1%})",
            abs(found / formula - 1) < 0.05,
        )


def _counted(folder: Path, columns: int, width: int, tokens: int, passes: int, bits: int) -> int:
    """Bytes that all processes received."""
    given = [str(number) for number in (width, tokens, passes, bits)]
    with one_host() as host:
        count = ["-m", "benchmarks.reliability.count_wire", host.interface, *given]
        command = host.command(torchrun(f"--nproc-per-node={columns}", command=count))
        environ = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": host.interface}
        with Launch(command, folder, environ) as launch:
            require_success([launch])
            return int(launch.said.split("received ")[1].split()[0])


# --- 14: a large table ----------------------------------------------------------------------------------


def large_table(short: bool) -> Iterator[Outcome]:
    """A table that is never whole anywhere, drawn and trained by four processes."""
    num_sub_keys, width, steps = (64, 64, 3) if short else (1024, 1024, 20)
    parameters = num_sub_keys**2 * width
    of_all = results(4, train_large, num_sub_keys, width, steps, seconds=1200)
    first, last = (sum(one[which] for one in of_all) / 4 for which in ("first_loss", "last_loss"))
    yield Outcome(
        14,
        f"a table of {parameters:,} parameters over 4 processes, values and moments in bf16, {steps} steps",
        "the loss falls",
        f"from {first:.4f} to {last:.4f}",
        last < first,
    )
    whole = parameters * 2 * 3
    share = max(one["tensor_bytes"] for one in of_all) / whole
    yield Outcome(
        14,
        "the same: a process's part of the table and its moments, by its tensors",
        "a quarter",
        f"{share:.4f} of {whole / 1e9:.2f} GB",
        share == 0.25,
    )
    if not short:
        peak = max(one["peak_bytes"] - one["bytes_before"] for one in of_all)
        yield Outcome(
            14,
            "the same: what a process took in all, at its peak, beyond what it had before the table",
            "at most 1.5 times its quarter",
            f"{peak / 1e9:.2f} GB, {peak / (whole / 4):.2f} times",
            peak <= 1.5 * whole / 4,
        )


def train_large(together: Together, num_sub_keys: int, width: int, steps: int) -> dict[str, Any]:
    """Trains one memory to give back what it is given; losses, and the bytes of this process."""
    before = held_by(os.getpid()).resident_bytes
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (together.size,), mesh_dim_names=("columns",))
    with pkmem.undrawn_tables():
        memory = pkmem.ProductKeyMemory(pkmem.MemoryConfig(dim=width, num_sub_keys=num_sub_keys, heads=2, knn=16))
    memory.values.to(torch.bfloat16)
    pkmem.shard_values(memory, mesh)
    values = pkmem.RowAdam(memory, lr=1e-2, moment_dtype=torch.bfloat16)
    optimizer = pkmem.CombinedOptimizer(torch.optim.Adam(pkmem.dense_parameters(memory), 1e-3), values)
    torch.manual_seed(1 + together.rank)
    x = torch.randn(256, width)
    losses = []
    for _ in range(steps):
        loss = (memory(x) - x).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (table,) = tables_in(memory)
    moments = [tensor for tensor in values.state[table.weight].values() if isinstance(tensor, torch.Tensor)]
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tensor_bytes": sum(tensor.nbytes for tensor in [table.weight, *moments] if tensor.dim() == 2),
        "bytes_before": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


TRIALS: dict[int, Trial] = {12: bytes_on_the_wire, 14: large_table}
