"""What the replicas of a table have read, brought together before an update: as reads, or as sums where those are less.

A read takes a slot and a weight on the wire, and a token one row of gradient; the sums over rows take a row for each row
that was read, many more while a step has fewer tokens than the table has rows. Past that, the processes add up dense
gradients, and which rows were read: a row that was not must stay as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pkmem.layer.crossing import all_to_all, gathered
from pkmem.ops.backends import backend_module
from pkmem.ops.reads import Reads

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLOT_BYTES = 4
_Entry = tuple[Tensor, Tensor, Tensor]


def with_replicas(reads: Reads, width: int, device: torch.device, group: Any) -> list[_Entry]:
    """The reads of a table (m, v) by all its replicas, in the order of the processes, the same on all; collective.

    Args:
        reads: of this process; may be none.
        width: v, columns of the table here.
        device: of the table.
        group: the processes that hold the same.

    Returns:
        as `Reads.entries`.
    """
    own = [entry for entry in reads.entries if entry[0].numel()]
    counts = gathered(torch.tensor(_counts(own), device=device), group)
    if not counts[:, 0].any():
        return []
    weights_dtype, back_dtype = (_DTYPES[kind] for kind in counts[:, 3:].amax(0).tolist())
    # A process receives this much times (R - 1) / R, on average over the R: a rule that all follow alike.
    _, num_reads, num_tokens, *_ = counts.sum(0).tolist()
    read_bytes = num_reads * (_SLOT_BYTES + weights_dtype.itemsize) + num_tokens * width * back_dtype.itemsize
    exact = torch.promote_types(torch.promote_types(weights_dtype, back_dtype), torch.float32)
    dense_bytes = 2 * reads.num_rows * width * exact.itemsize
    if read_bytes > dense_bytes:
        return _summed(reads, width, device, exact, group)
    slots_dtype = torch.int32 if reads.num_rows <= 1 << 31 else torch.int64
    per_entry, per_read, per_token = counts[:, :3].T.tolist()
    shapes = torch.tensor([slots.shape for slots, _, _ in own], dtype=torch.int64, device=device).view(-1, 2)
    slots = _flat([entry[0].flatten() for entry in own], (), slots_dtype, device)
    weights = _flat([entry[1].flatten() for entry in own], (), weights_dtype, device)
    backs = _flat([entry[2] for entry in own], (width,), back_dtype, device)
    return _as_entries(
        _from_all(shapes, per_entry, group).tolist(),
        _from_all(slots, per_read, group).long(),
        _from_all(weights, per_read, group),
        _from_all(backs, per_token, group),
    )


def _counts(own: list[_Entry]) -> list[int]:
    """Passes, reads and tokens, and the dtypes of weights and gradients; -1 without any."""
    kinds = [max((_DTYPES.index(entry[part].dtype) for entry in own), default=-1) for part in (1, 2)]
    return [len(own), sum(slots.numel() for slots, _, _ in own), sum(len(slots) for slots, _, _ in own), *kinds]


def _flat(parts: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One after the other, if any."""
    return torch.cat([torch.empty(0, *shape, dtype=dtype, device=device), *(part.to(dtype) for part in parts)])


def _from_all(part: Tensor, counts: list[int], group: Any) -> Tensor:
    """What each process has, one after the other."""
    copies = part.repeat(len(counts), *(1 for _ in part.shape[1:]))
    return all_to_all(copies, counts, [len(part)] * len(counts), group)


def _as_entries(shapes: list[list[int]], slots: Tensor, weights: Tensor, backs: Tensor) -> list[_Entry]:
    num_reads, num_tokens = [n * b for n, b in shapes], [n for n, _ in shapes]
    parts = zip(shapes, slots.split(num_reads), weights.split(num_reads), backs.split(num_tokens), strict=True)
    return [(slots.view(n, b), weights.view(n, b), back) for (n, b), slots, weights, back in parts]


def _summed(reads: Reads, width: int, device: torch.device, exact: torch.dtype, group: Any) -> list[_Entry]:
    """The sum of all gradients as one read of each row that any process has read."""
    grouped = reads.sorted()
    dense = torch.zeros(reads.num_rows, width, dtype=exact, device=device)
    is_read = torch.zeros(reads.num_rows, dtype=torch.uint8, device=device)
    if grouped is not None:
        grouped = replace(grouped, grad_output=grouped.grad_output.to(exact))
        dense = backend_module(reads.backend).weighted_sum_grad_values(grouped, reads.num_rows)
        is_read[grouped.rows[: len(grouped.host_offsets) - 1]] = 1
    dist.all_reduce(dense, group=group)
    dist.all_reduce(is_read, dist.ReduceOp.MAX, group=group)
    rows = is_read.nonzero()
    return [(rows, torch.ones_like(rows, dtype=exact), dense[rows[:, 0]])]
