"""The operators tuned for the CPU, in numba: no compiler is needed at install time.

See `pkmem.ops` for what each computes; fp64 goes to the reference.
"""

from pkmem.ops.cpu.bag import row_products, weighted_sum
from pkmem.ops.cpu.compiling import warmup
from pkmem.ops.cpu.decoding import decode
from pkmem.ops.cpu.packed import packed_sum
from pkmem.ops.cpu.rows import (
    adam_rows,
    gradient_is_finite,
    row_gradient_norm,
    row_gradient_norm_bound,
    row_mean_squares,
    sort_reads,
    weighted_sum_grad_values,
)
from pkmem.ops.cpu.selection import flat_topk, product_key_topk
from pkmem.ops.cpu.selection_backward import product_key_topk_backward

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
    "warmup",
    "weighted_sum",
    "weighted_sum_grad_values",
]
