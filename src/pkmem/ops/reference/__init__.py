"""The meaning of the operators in plain torch (Lample et al. 2019, section 3.1, eq. 1-4).

Every other backend computes the same and is tested against this one. It works in chunks: on a CPU of what its cache
holds, on a GPU of what its memory has room for, since there every operator costs a launch. Sums run in a fixed order on
both: no atomics. Only sorted reads make the host wait for a GPU.
"""

from pkmem.ops.reference.bag import packed_sum, row_products, weighted_sum
from pkmem.ops.reference.decoding import decode
from pkmem.ops.reference.rows import (
    adam_rows,
    gradient_is_finite,
    row_gradient_norm,
    row_gradient_norm_bound,
    row_mean_squares,
    sort_reads,
    weighted_sum_grad_values,
)
from pkmem.ops.reference.selection import flat_topk, product_key_topk, product_key_topk_backward

__all__ = [
    "adam_rows",
    "decode",
    "flat_topk",
    "gradient_is_finite",
    "packed_sum",
    "product_key_topk",
    "product_key_topk_backward",
    "row_gradient_norm",
    "row_gradient_norm_bound",
    "row_mean_squares",
    "row_products",
    "sort_reads",
    "weighted_sum",
    "weighted_sum_grad_values",
]
