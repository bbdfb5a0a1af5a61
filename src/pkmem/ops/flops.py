"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: multiplications and additions of products.

As torch counts its own: two for a multiplication and the addition of its product; comparisons, softmax, norms and
sorting are none. It needs no call: `import pkmem` is enough, before or after torch's counter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from pkmem.ops import registered  # the operators are there once it is imported

assert registered.topk is not None
_pkmem = torch.ops.pkmem
Shape = tuple[int, ...]


@register_flop_formula(_pkmem.product_key_topk)
def product_key_topk_flops(query: Shape, sub_keys: Shape, *_: Any, **__: Any) -> int:
    """Every query half with every sub-key of its set (section 3.2: sqrt|K| dq a query)."""
    n, h, q = query
    return 2 * n * h * sub_keys[2] * q


@register_flop_formula(_pkmem.product_key_topk_backward)
def product_key_topk_backward_flops(grad_scores: Shape, query: Shape, *_: Any, **__: Any) -> int:
    """Two products of width q for each chosen slot: one for the query's gradient, one for its sub-keys'."""
    n, h, knn = grad_scores
    return 4 * n * h * knn * query[2]


@register_flop_formula(_pkmem.flat_topk)
def flat_topk_flops(query: Shape, keys: Shape, *_: Any, **__: Any) -> int:
    """Every query with every key."""
    n, h, q = query
    return 2 * n * h * keys[1] * q


@register_flop_formula([
    _pkmem.weighted_sum, _pkmem.weighted_sum_logged, _pkmem.row_products, _pkmem.row_products_logged
])  # fmt: skip
def rows_flops(table: Shape, slots: Shape, *_: Any, **__: Any) -> int:
    """A product of the table's width for each read; in a gradient it stands for the other of the two."""
    n, b = slots
    return 2 * n * b * table[1]


@register_flop_formula([_pkmem.packed_sum, _pkmem.packed_products])
def packed_rows_flops(rows: Shape, slots: Shape, given: Shape, width: int, *_: Any, **__: Any) -> int:
    """The same of rows that are packed in few bits."""
    n, b = slots
    return 2 * n * b * width


@register_flop_formula(_pkmem.weighted_sum_grad_values)
def weighted_sum_grad_values_flops(slots: Shape, weights: Shape, grad_output: Shape, *_: Any, **__: Any) -> int:
    """A row of the gradient gets a product of the table's width for each read."""
    n, b = slots
    return 2 * n * b * grad_output[1]
