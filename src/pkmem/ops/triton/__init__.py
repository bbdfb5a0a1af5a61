"""The operators for GPUs, in Triton.

See `pkmem.ops` for what each computes; fp64, and what the kernels do not cover, goes to the reference. Nothing
here waits for the GPU. With `TRITON_INTERPRET=1` set before the import the same kernels run on CPU tensors, slowly: for tests.

Raises:
    ImportError: at import, if Triton is missing or too old.
"""

from pkmem.ops.triton import installed  # noqa: F401, raises where Triton is missing or too old

# isort: split
from pkmem.ops.reference.decoding import decode
from pkmem.ops.reference.rows import sort_without_waiting as sort_reads
from pkmem.ops.reference.selection import flat_topk
from pkmem.ops.triton.bag import row_products, weighted_sum
from pkmem.ops.triton.device import why_not
from pkmem.ops.triton.kernels import compiled_kernels
from pkmem.ops.triton.packed import packed_sum
from pkmem.ops.triton.rows import (
    adam_rows,
    gradient_is_finite,
    row_gradient_norm,
    row_gradient_norm_bound,
    row_mean_squares,
    weighted_sum_grad_values,
)
from pkmem.ops.triton.selection import product_key_topk
from pkmem.ops.triton.selection_backward import product_key_topk_backward

__all__ = [
    "adam_rows",
    "compiled_kernels",
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
    "why_not",
]
