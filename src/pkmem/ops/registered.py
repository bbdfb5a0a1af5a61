"""What torch sees of the operators: registered with `torch.library`, each with its shapes and its gradients.

So `torch.compile(fullgraph=True)`, autocast and activation checkpointing take them as single operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import custom_op
from torch.overrides import has_torch_function

from pkmem.ops.backends import backend_module
from pkmem.ops.reading_log import ReadLog, row_gradient
from pkmem.ops.reference.bag import packed_products
from pkmem.ops.reference.selection import scores_of_slots

_PLAIN = (Tensor, nn.Parameter)


def nobody_watches(*tensors: Tensor) -> bool:
    """Whether nothing has to see an operator: no gradient, compiler, tracer, transform, mode or tensor subclass.

    A registered operator costs some 35 us a call before it does anything, half of a decoded token's whole memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return False
    if torch._C._len_torch_dispatch_stack() or has_torch_function(tensors) or tensors[0].is_meta:
        return False
    return all(map(is_plain, tensors))


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor whose memory holds its numbers one by one, as a kernel reads them."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_neg()


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation sees more in a tensor than its numbers."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# `torch.compiler.assume_constant_result`, without importing the compiler: it guards by itself what is asked here.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(query: Tensor, sub_keys: Tensor, knn: int, backend: str) -> tuple[Tensor, Tensor]:
    """The backend's selection, unregistered: for where nobody watches."""
    scores, slots = backend_module(backend).product_key_topk(query, sub_keys, knn)
    return scores.contiguous(), slots.contiguous()


topk = custom_op("pkmem::product_key_topk", mutates_args=())(select)


@topk.register_fake
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
def _(grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), sub_keys.new_empty(sub_keys.shape)


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, sub_keys, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, sub_keys, output[1])


def _topk_gradients(ctx: Any, grad_scores: Tensor, _: Any) -> tuple[Any, ...]:
    query, sub_keys, slots = ctx.saved_tensors
    return (*_topk_backward(grad_scores, query, sub_keys, slots, ctx.backend), None, None)


topk.register_autograd(_topk_gradients, setup_context=_topk_context)


def _second_topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _second_topk_gradients(ctx: Any, grad_query: Tensor, grad_sub_keys: Tensor) -> tuple[Any, ...]:
    """A score is linear in its query and in its sub-keys, so what meets one gradient takes the other's place."""
    grad_scores, query, sub_keys, slots = ctx.saved_tensors
    scores = scores_of_slots(grad_query, sub_keys, slots) + scores_of_slots(query, grad_sub_keys, slots)
    return (scores, *_topk_backward(grad_scores, grad_query, grad_sub_keys, slots, ctx.backend), None, None)


_topk_backward.register_autograd(_second_topk_gradients, setup_context=_second_topk_context)


@custom_op("pkmem::flat_topk", mutates_args=())
def flat(query: Tensor, keys: Tensor, knn: int, backend: str) -> Tensor:
    return backend_module(backend).flat_topk(query, keys, knn).contiguous()


@flat.register_fake
def _(query: Tensor, keys: Tensor, knn: int, backend: str) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], knn), dtype=torch.int64)


def _check_bounds(slots: Tensor, table: Tensor) -> None:
    if slots.numel() and slots.device.type == "cpu":
        lowest, highest = (int(bound) for bound in slots.aminmax())
        if lowest < 0 or highest >= table.shape[0]:
            raise ValueError(f"slots reach from {lowest} to {highest}: outside [0, m = {table.shape[0]})")


def checked_bag(values: Tensor, slots: Tensor, weights: Tensor, backend: str) -> Tensor:
    """The backend's weighted sum, unregistered, of slots that are in the table."""
    _check_bounds(slots, values)
    return backend_module(backend).weighted_sum(values, slots, weights).contiguous()


bag = custom_op("pkmem::weighted_sum", mutates_args=())(checked_bag)


@custom_op("pkmem::weighted_sum_logged", mutates_args=())
def logged_bag(values: Tensor, slots: Tensor, weights: Tensor, counter: Tensor, handle: int, backend: str) -> Tensor:
    return checked_bag(values, slots, weights, backend)


@bag.register_fake
@logged_bag.register_fake
def _(values: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return values.new_empty(slots.shape[0], values.shape[1])


@custom_op("pkmem::weighted_sum_grad_values", mutates_args=())
def _table_gradient(slots: Tensor, weights: Tensor, grad_output: Tensor, num_rows: int, backend: str) -> Tensor:
    module = backend_module(backend)
    return module.weighted_sum_grad_values(module.sort_reads([slots], [weights], [grad_output], num_rows), num_rows)


@_table_gradient.register_fake
def _(slots: Tensor, weights: Tensor, grad_output: Tensor, num_rows: int, backend: str) -> Tensor:
    return grad_output.new_empty(num_rows, grad_output.shape[1])


# A replayed graph would not log.
@custom_op("pkmem::log_reads", mutates_args=("counter",), tags=[torch.Tag.cudagraph_unsafe])
def _log_reads(counter: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor, handle: int, backend: str) -> None:
    log = ReadLog.of(handle)
    log.append(row_gradient(log.weight, slots, weights, grad_output, backend, handle))
    counter.add_(1)


@_log_reads.register_fake
def _(*_: Any) -> None:
    return None


def _table_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _second_table_gradients(ctx: Any, grad_table: Tensor) -> tuple[Any, ...]:
    slots, weights, grad_output = ctx.saved_tensors
    grad_weights = products(grad_table, slots, grad_output, ctx.backend).to(weights.dtype)
    grad_grad_output = bag(grad_table, slots, weights, ctx.backend).to(grad_output.dtype)
    return None, grad_weights, grad_grad_output, None, None


_table_gradient.register_autograd(_second_table_gradients, setup_context=_table_context)


def checked_packed(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int, backend: str) -> Tensor:
    """The backend's sum of packed rows, unregistered, of slots that are in the table."""
    _check_bounds(slots, rows)
    return backend_module(backend).packed_sum(rows, slots, weights, width, bits).contiguous()


packed = custom_op("pkmem::packed_sum", mutates_args=())(checked_packed)


@packed.register_fake
def _(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int, backend: str) -> Tensor:
    return weights.new_empty(slots.shape[0], width, dtype=torch.float32)


@custom_op("pkmem::packed_products", mutates_args=())
def _packed_products(rows: Tensor, slots: Tensor, x: Tensor, width: int, bits: int) -> Tensor:
    return packed_products(rows, slots, x, width, bits).contiguous()


@_packed_products.register_fake
def _(rows: Tensor, slots: Tensor, x: Tensor, width: int, bits: int) -> Tensor:
    return x.new_empty(slots.shape, dtype=torch.float32)


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, slots, weights, ctx.width, ctx.bits, _ = inputs
    ctx.dtype = weights.dtype
    ctx.save_for_backward(rows, slots)


def _packed_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    rows, slots = ctx.saved_tensors
    grad_weights = None
    if ctx.needs_input_grad[2]:
        grad_weights = _packed_products(rows, slots, grad_output, ctx.width, ctx.bits).to(ctx.dtype)
    return None, None, grad_weights, None, None, None


def _packed_products_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, slots, x, ctx.width, ctx.bits = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(rows, slots)


def _packed_products_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    rows, slots = ctx.saved_tensors
    return None, None, packed(rows, slots, grad_output, ctx.width, ctx.bits, "reference").to(ctx.dtype), None, None


packed.register_autograd(_packed_gradients, setup_context=_packed_context)
_packed_products.register_autograd(_packed_products_gradients, setup_context=_packed_products_context)


def checked_products(table: Tensor, slots: Tensor, x: Tensor, backend: str) -> Tensor:
    """The backend's row products, unregistered, of slots that are in the table."""
    _check_bounds(slots, table)
    return backend_module(backend).row_products(table, slots, x).contiguous()


products = custom_op("pkmem::row_products", mutates_args=())(checked_products)


@custom_op("pkmem::row_products_logged", mutates_args=())
def logged_products(table: Tensor, slots: Tensor, x: Tensor, counter: Tensor, handle: int, backend: str) -> Tensor:
    return checked_products(table, slots, x, backend)


@products.register_fake
@logged_products.register_fake
def _(table: Tensor, slots: Tensor, *_: Any) -> Tensor:
    return table.new_empty(slots.shape, dtype=torch.float64 if table.dtype == torch.float64 else torch.float32)


def _read_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, slots, given, *ctx.log, ctx.backend = inputs
    ctx.save_for_backward(table, slots, given)


def _sum_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    return _read_gradients(ctx, grad_output, products, lambda weights: (weights, grad_output))


def _product_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    """A row is read with its product's gradient as weight, and x is what comes back to it."""
    return _read_gradients(ctx, grad_output, bag, lambda x: (grad_output, x))


def _read_gradients(ctx: Any, grad_output: Tensor, adjoint: Any, as_read: Any) -> tuple[Any, ...]:
    """Gradients in the table, dense or as reads in its log, and in what was `given`, weights or x, by the `adjoint`.

    A sum weights rows, a product weighs them: each is the adjoint of the other.
    """
    table, slots, given = ctx.saved_tensors
    grad_table = grad_given = None
    if ctx.needs_input_grad[2]:
        grad_given = adjoint(table, slots, grad_output, ctx.backend).to(given.dtype)
    if ctx.needs_input_grad[0]:
        weights, back = as_read(given)
        if not ctx.log or torch.is_grad_enabled():  # a second derivative needs the numbers
            grad_table = _table_gradient(slots, weights, back.to(table.dtype), table.shape[0], ctx.backend)
        elif type(grad_output) is Tensor:
            grad_table = row_gradient(table, slots, weights, back, ctx.backend, ctx.log[1])
        else:  # a compiler traces
            _log_reads(ctx.log[0], slots, weights, back, ctx.log[1], ctx.backend)
    return (grad_table, None, grad_given, *(None for _ in ctx.log), None)


for summing in (bag, logged_bag):
    summing.register_autograd(_sum_gradients, setup_context=_read_context)
for multiplying in (products, logged_products):
    multiplying.register_autograd(_product_gradients, setup_context=_read_context)
