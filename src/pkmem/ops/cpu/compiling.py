"""Compiling ahead: numba compiles a kernel at its first call, and keeps the code on disk for the next process."""

from __future__ import annotations

import torch

from pkmem.ops import packing
from pkmem.ops.arguments import AdamStep, LayerWeights
from pkmem.ops.cpu import bag, decoding, packed, rows, selection, selection_backward

KERNELS = (
    selection.multiply,
    selection.select,
    selection.select_flat,
    selection_backward.to_queries,
    selection_backward.to_keys,
    bag.sum_rows,
    bag.dot_rows,
    packed.sum_packed_rows,
    decoding.choose,
    decoding.apply_gate,
    rows.sort,
    rows.write_gradients,
    rows.sum_squares,
    rows.adam,
    rows.adam_by_row,
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def warmup(dtypes: tuple[torch.dtype, ...] = _DTYPES) -> int:
    """Compiles every kernel, or loads it from disk, and returns how many there are.

    Rarer forms of RowAdam's state, such as one second moment a row beside a first moment, are compiled at their first use.

    Args:
        dtypes: of the tables that will be used.
    """
    weights = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    update = AdamStep(0.1, (0.9, 0.9), eps=1.0, step=1, scale=1.0)
    query, sub_keys = weights.expand(1, 1, 2), weights.expand(1, 2, 1, 1)
    scores, slots = selection.product_key_topk(query, sub_keys, 1)
    selection.flat_topk(query, sub_keys[0, :1].expand(1, 1, 2), 1)
    selection_backward.product_key_topk_backward(scores, query, sub_keys, slots)
    for bits in packing.BITS:
        packed.packed_sum(packing.pack_rows(weights, bits), slots[0], weights, 1, bits)
    for dtype in dtypes:
        values = weights.to(dtype)
        bag.weighted_sum(values, slots[0], weights)
        query_network, gate = (weights.expand(2, 1), weights[0].expand(2)), (weights, weights)
        decoding.decode(weights, LayerWeights(*query_network, "none", (), 1.0, sub_keys, values, gate, 1, 1))
        bag.row_products(values, slots[0], values)
        reads = rows.sort_reads([slots[0]], [weights], [values], 1)
        rows.weighted_sum_grad_values(reads, 1)
        rows.row_gradient_norm(reads)
        for moments in (torch.float32, torch.bfloat16):
            table, first, second = (weights.to(kind, copy=True) for kind in (dtype, moments, moments))
            rows.adam_rows(table, first, second, reads, update)
        rows.adam_rows(table, None, weights[0].clone(), reads, update)
    return sum(len(kernel.signatures) for kernel in KERNELS)
