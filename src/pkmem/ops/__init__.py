"""The operators of a product-key memory: their contract, and the only place a backend is chosen.

`product_key_topk` and `weighted_sum` are the paper's; `row_products`, the other side of `weighted_sum`, makes experts of
one neuron out of slots. All are registered with `torch.library`, so `torch.compile(fullgraph=True)`, autocast and activation
checkpointing see them as single operations with known shapes and gradients.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from pkmem.ops.reading_log import ReadLog

_logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
if not _HAS_NUMBA:
    warnings.warn("numba is not installed, so the slow reference runs: pip install 'pkmem[cpu]'", stacklevel=2)


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The backend for tensors on `device`: the one asked for, else the fastest that has been measured there.

    "triton" has to be asked for: its kernels are checked in triton's interpreter and compile, but have not yet run
    on a GPU.

    Raises:
        ValueError: `backend` is not in `BACKENDS`.
    """
    if backend is None:
        return _fastest(device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r} but must be one of {', '.join(BACKENDS)}")
    return backend


def _fastest(device_type: str) -> str:
    return "cpu" if device_type == "cpu" and _HAS_NUMBA else "reference"


@functools.cache
def backend_module(backend: str) -> ModuleType:
    """The module that implements `backend`; the first use on a machine says that it compiles."""
    module = importlib.import_module(f"pkmem.ops.{backend}")
    if backend == "cpu" and module.is_cold():
        _logger.warning("pkmem compiles its CPU kernels, once (about 15 s); `pkmem warmup` does it ahead")
    return module


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles what the first calls on `device` with a table of `dtype` would, so that nobody times a compiler."""
    if choose_backend(device) == "cpu" and dtype != torch.float64:
        backend_module("cpu").warmup((dtype,))


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The `knn` slots whose product keys best match each query (Lample et al. 2019, section 3.1, eq. 4).

    Exact: both sub-keys of a best slot are among the best `knn` of their own set. Differentiable in query
    and sub_keys, through the scores. Equivalent to, without the (n, h, s ** 2) scores:

        first, second = query.chunk(2, -1)
        scores = torch.einsum("nhd,hid->nhi", first, sub_keys[:, 0])[..., :, None] \\
               + torch.einsum("nhd,hjd->nhj", second, sub_keys[:, 1])[..., None, :]
        scores, slots = scores.flatten(-2).topk(knn)

    Args:
        query: (n, h, q) one query per token and head; n >= 0.
        sub_keys: (h, 2, s, q / 2) two sets of sub-keys per head; slot `i * s + j` is the pair (i, j).
        knn: slots to keep, in [1, s].
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        scores: (n, h, knn) inner products, best first, accumulated and returned in fp32 (fp64 for fp64
            queries); scores equal before rounding by lower slot.
        slots: (n, h, knn) int64 in [0, s ** 2).

    Raises:
        ValueError: the shapes disagree, `knn` is outside [1, s], or the backend is unknown.
    """
    if query.dim() != 3 or sub_keys.dim() != 4 or sub_keys.shape[1] != 2 or sub_keys.shape[0] == 0:
        raise ValueError(
            f"query must be (n, h, q) and sub_keys (h, 2, s, q / 2) with h >= 1, "
            f"not {tuple(query.shape)} and {tuple(sub_keys.shape)}"
        )
    if query.shape[1] != sub_keys.shape[0] or query.shape[2] != 2 * sub_keys.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)} and sub_keys {tuple(sub_keys.shape)} disagree in heads "
            f"({query.shape[1]} and {sub_keys.shape[0]}) or width "
            f"({query.shape[2]} and twice {sub_keys.shape[3]})"
        )
    if not 1 <= knn <= sub_keys.shape[2]:
        raise ValueError(f"knn is {knn} but must be in [1, s = {sub_keys.shape[2]}]")
    chosen = choose_backend(query.device, backend)
    if _nobody_watches(query, sub_keys):
        return _select(query, sub_keys, knn, chosen)
    return _topk(query, sub_keys, knn, chosen)


def weighted_sum(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    *,
    log: ReadLog | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weighted sum of some rows of a table, per token (Lample et al. 2019, section 3.1, eq. 3).

    Useful on its own wherever few rows of a large table are summed: sparse autoencoders, expert layers.
    Differentiable in values and weights, with sums in the same order in every run. Equivalent to, without
    the (n, b, v) rows:

        (values[slots] * weights[..., None]).sum(1)

    Args:
        values: (m, v) the table, of any floating dtype; v >= 1.
        slots: (n, b) int64 rows to read, in [0, m); n, b >= 0; a row may be read many times.
        weights: (n, b) their weights, any floating dtype.
        log: None gives `values` a dense gradient; a log receives the reads instead, and no tensor of the
            table's size is made (`pkmem.RowAdam` sets and empties it).
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, v) in the dtype of values, accumulated in fp32 (fp64 for fp64 values).

    Raises:
        ValueError: the shapes disagree, slots are not int64, a slot is outside [0, m) (checked on the CPU), or
            the backend is unknown.
    """
    if values.dim() != 2 or slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(
            "values must be (m, v), slots and weights (n, b), not "
            f"{tuple(values.shape)}, {tuple(slots.shape)} and {tuple(weights.shape)}"
        )
    _check_dtypes(values, slots)
    chosen = choose_backend(values.device, backend)
    if _nobody_watches(values, slots, weights):
        return _checked_bag(values, slots, weights, chosen)
    if log is None:
        return _bag(values, slots, weights, chosen)
    return _logged_bag(values, slots, weights, log.counter, log.handle, chosen)


def row_products(
    table: Tensor,
    slots: Tensor,
    x: Tensor,
    *,
    log: ReadLog | None = None,
    backend: str | None = None,
) -> Tensor:
    """The inner products of each token with some rows of a table: what a slot's neuron sees (He 2024, PEER, eq. 2).

    Differentiable in table and x, with sums in the same order in every run. Equivalent to, without the (n, b, d) rows:

        (table[slots] * x[:, None]).sum(-1)

    Args:
        table: (m, d) of any floating dtype; d >= 1.
        slots: (n, b) int64 rows to read, in [0, m); n, b >= 0; a row may be read many times.
        x: (n, d) hidden states, any floating dtype.
        log: None gives `table` a dense gradient; a log receives the reads instead, as in `weighted_sum`.
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, b) fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: the shapes disagree, slots are not int64, a slot is outside [0, m) (checked on the CPU), or
            the backend is unknown.
    """
    if (table.dim(), slots.dim(), x.dim()) != (2, 2, 2) or x.shape != (slots.shape[0], table.shape[1]):
        raise ValueError(
            "table must be (m, d), slots (n, b) and x (n, d), not "
            f"{tuple(table.shape)}, {tuple(slots.shape)} and {tuple(x.shape)}"
        )
    _check_dtypes(table, slots)
    chosen = choose_backend(table.device, backend)
    if _nobody_watches(table, slots, x):
        return _checked_products(table, slots, x, chosen)
    if log is None:
        return _products(table, slots, x, chosen)
    return _logged_products(table, slots, x, log.counter, log.handle, chosen)


def _check_dtypes(table: Tensor, slots: Tensor) -> None:
    if not table.is_floating_point():
        raise ValueError(f"the table is {table.dtype} but must be of a floating dtype")
    if slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype} but must be torch.int64: use slots.long()")


MOST_DECODED = 8  # tokens; for more, matrix products pay
NORM_TENSORS = {  # of a query norm, in the order in which `decode` takes them
    "batch": ("weight", "bias", "running_mean", "running_var"),
    "layer": ("weight", "bias"),
    "rms": ("weight",),
    "none": (),
}


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: str,
    norm_tensors: list[Tensor],
    eps: float | None,
    sub_keys: Tensor,
    values: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    knn: int,
    *,
    backend: str | None = None,
) -> Tensor | None:
    """The whole layer (Lample et al. 2019, section 3) for a few tokens in one call: inference only, fp32 queries.

    Equivalent to `weighted_sum` of the softmax of `product_key_topk` of the normalised linear query, behind the gate.

    Args:
        x: (n, d), n <= `MOST_DECODED`.
        weight, bias: (h * q, d) and (h * q,) the linear query.
        norm: key of `NORM_TENSORS`: the query's norm, in evaluation mode.
        norm_tensors: as `NORM_TENSORS` names them: (h * q,) each for "batch", else (q,).
        eps: added to the variance by the norm; None is fp32's.
        sub_keys: (h, 2, s, q / 2). values: (s ** 2, v). knn: slots per head.
        gate: None, or W1 (v, d) and W2 (d', v) of Memory+'s output `W2(m(x) * silu(W1 x))`.
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, v) in the dtype of values, or (n, d') in that of x behind a gate; None where no backend can, or the shapes
        disagree: call the operators then, which say what is wrong.
    """
    if choose_backend(x.device, backend) != "cpu" or torch.is_autocast_enabled("cpu") or values.dtype == torch.float64:
        return None
    queried = (x, weight, bias, *norm_tensors, sub_keys, *(gate or ()))
    if {tensor.dtype for tensor in queried} != {torch.float32} or not _nobody_watches(*queried, values):
        return None
    heads, _, num_sub_keys, half = sub_keys.shape
    width = 2 * half if norm in ("layer", "rms") else 2 * half * heads
    agree = weight.shape == (2 * half * heads, x.shape[1]) and len(bias) == len(weight)
    if gate is not None:
        agree = agree and gate[0].shape == (values.shape[1], x.shape[1]) and gate[1].shape[1] == values.shape[1]
    if not agree or num_sub_keys**2 > min(len(values), 1 << 32) or any(len(t) != width for t in norm_tensors):
        return None
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    decoded: Tensor = backend_module("cpu").decode(
        x, weight, bias, norm, norm_tensors, eps, sub_keys, values, gate, knn
    )
    return decoded


def _nobody_watches(*tensors: Tensor) -> bool:
    """Whether neither a gradient nor a compiler nor a tensor subclass has to see an operator.

    A registered operator costs some 35 us a call before it does anything, half of a decoded token's whole memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _select(query: Tensor, sub_keys: Tensor, knn: int, backend: str) -> tuple[Tensor, Tensor]:
    scores, slots = backend_module(backend).product_key_topk(query, sub_keys, knn)
    return scores.contiguous(), slots.contiguous()


# --- registration with torch.library: forward, shapes, backward -----------------------------------------

_topk = custom_op("pkmem::product_key_topk", mutates_args=())(_select)


@_topk.register_fake
def _(query: Tensor, sub_keys: Tensor, knn: int, backend: str) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], knn)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=torch.int64)


@custom_op("pkmem::product_key_topk_backward", mutates_args=())
def _topk_backward(
    grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    grad_query, grad_sub_keys = backend_module(backend).product_key_topk_backward(grad_scores, query, sub_keys, slots)
    return grad_query.contiguous(), grad_sub_keys.contiguous()


@_topk_backward.register_fake
def _(
    grad_scores: Tensor,
    query: Tensor,
    sub_keys: Tensor,
    slots: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), sub_keys.new_empty(sub_keys.shape)


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, sub_keys, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, sub_keys, output[1])


def _topk_gradients(ctx: Any, grad_scores: Tensor, _: Any) -> tuple[Any, ...]:
    query, sub_keys, slots = ctx.saved_tensors
    return (*_topk_backward(grad_scores, query, sub_keys, slots, ctx.backend), None, None)


_topk.register_autograd(_topk_gradients, setup_context=_topk_context)


def _check_bounds(slots: Tensor, table: Tensor) -> None:
    if slots.numel() and slots.device.type == "cpu":
        lowest, highest = (int(bound) for bound in slots.aminmax())
        if lowest < 0 or highest >= table.shape[0]:
            raise ValueError(f"slots reach from {lowest} to {highest}: outside [0, m = {table.shape[0]})")


def _checked_bag(values: Tensor, slots: Tensor, weights: Tensor, backend: str) -> Tensor:
    _check_bounds(slots, values)
    return backend_module(backend).weighted_sum(values, slots, weights).contiguous()


_bag = custom_op("pkmem::weighted_sum", mutates_args=())(_checked_bag)


@custom_op("pkmem::weighted_sum_logged", mutates_args=())
def _logged_bag(
    values: Tensor,
    slots: Tensor,
    weights: Tensor,
    counter: Tensor,
    handle: int,
    backend: str,
) -> Tensor:
    return _checked_bag(values, slots, weights, backend)


@_bag.register_fake
@_logged_bag.register_fake
def _(values: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return values.new_empty(slots.shape[0], values.shape[1])


@custom_op("pkmem::weighted_sum_grad_weights", mutates_args=())
def _bag_grad_weights(values: Tensor, slots: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    return backend_module(backend).weighted_sum_grad_weights(values, slots, grad_output)


@_bag_grad_weights.register_fake
def _(values: Tensor, slots: Tensor, grad_output: Tensor, backend: str) -> Tensor:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return slots.new_empty(slots.shape, dtype=dtype)


@custom_op("pkmem::weighted_sum_grad_values", mutates_args=())
def _bag_grad_values(slots: Tensor, weights: Tensor, grad_output: Tensor, num_rows: int, backend: str) -> Tensor:
    module = backend_module(backend)
    return module.weighted_sum_grad_values(module.sort_reads([slots], [weights], [grad_output]), num_rows)


@_bag_grad_values.register_fake
def _(
    slots: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    num_rows: int,
    backend: str,
) -> Tensor:
    return grad_output.new_empty(num_rows, grad_output.shape[1])


@custom_op("pkmem::log_reads", mutates_args=("counter",))
def _log_reads(counter: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, handle: int) -> None:
    # Copies: a compiler reuses the memory of what it passed once the operator has returned.
    ReadLog.of(handle).append(slots.clone(), weights.clone(), grad_output.clone())
    counter.add_(1)


@_log_reads.register_fake
def _(counter: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, handle: int) -> None:
    return None


def _bag_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, slots, weights, *ctx.log, ctx.backend = inputs
    ctx.save_for_backward(values, slots, weights)


def _bag_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    values, slots, weights = ctx.saved_tensors
    grad_values = grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = _bag_grad_weights(values, slots, grad_output, ctx.backend).to(weights.dtype)
    if ctx.needs_input_grad[0] and ctx.log:
        counter, handle = ctx.log
        _log_reads(counter, slots, weights, grad_output, handle)
    elif ctx.needs_input_grad[0]:
        grad_values = _bag_grad_values(slots, weights, grad_output, values.shape[0], ctx.backend)
    return (grad_values, None, grad_weights, *(None for _ in ctx.log), None)


_bag.register_autograd(_bag_gradients, setup_context=_bag_context)
_logged_bag.register_autograd(_bag_gradients, setup_context=_bag_context)


def _checked_products(table: Tensor, slots: Tensor, x: Tensor, backend: str) -> Tensor:
    _check_bounds(slots, table)
    products: Tensor = backend_module(backend).weighted_sum_grad_weights(table, slots, x)
    return products.contiguous()


_products = custom_op("pkmem::row_products", mutates_args=())(_checked_products)


@custom_op("pkmem::row_products_logged", mutates_args=())
def _logged_products(
    table: Tensor,
    slots: Tensor,
    x: Tensor,
    counter: Tensor,
    handle: int,
    backend: str,
) -> Tensor:
    return _checked_products(table, slots, x, backend)


@_products.register_fake
@_logged_products.register_fake
def _(table: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return table.new_empty(slots.shape, dtype=torch.float64 if table.dtype == torch.float64 else torch.float32)


def _products_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    """A row is read with its product's gradient as weight, and x is what comes back to it."""
    table, slots, x = ctx.saved_tensors
    grad_table = grad_x = None
    if ctx.needs_input_grad[2]:
        grad_x = _bag(table, slots, grad_output, ctx.backend).to(x.dtype)
    if ctx.needs_input_grad[0] and ctx.log:
        counter, handle = ctx.log
        _log_reads(counter, slots, grad_output, x, handle)
    elif ctx.needs_input_grad[0]:
        grad_table = _bag_grad_values(slots, grad_output, x.to(table.dtype), table.shape[0], ctx.backend)
    return (grad_table, None, grad_x, *(None for _ in ctx.log), None)


_products.register_autograd(_products_gradients, setup_context=_bag_context)
_logged_products.register_autograd(_products_gradients, setup_context=_bag_context)
