"""The operators of a product-key memory: their contract.

`product_key_topk` and `weighted_sum` are the paper's, and `flat_topk` is what the first one is compared with;
`row_products`, the other side of `weighted_sum`, makes experts of one neuron out of slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkmem.ops import packing, transformed
from pkmem.ops.backends import BACKENDS as BACKENDS
from pkmem.ops.backends import backend_module as backend_module
from pkmem.ops.backends import choose_backend as choose_backend
from pkmem.ops.backends import prepare as prepare
from pkmem.ops.reading_log import ReadLog
from pkmem.ops.registered import (
    bag,
    checked_bag,
    checked_packed,
    checked_products,
    flat,
    is_transformed,
    logged_bag,
    logged_products,
    nobody_watches,
    packed,
    products,
    select,
    topk,
)


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The `knn` slots whose product keys best match each query (Lample et al. 2019, section 3.1, eq. 4).

    Exact: both sub-keys of a best slot are among the best `knn` of their own set. Differentiable in query
    and sub_keys, through the scores. Equivalent to, without the (n, h, s ** 2) scores::

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
        The scores (n, h, knn), inner products, best first, accumulated and returned in fp32 (fp64 for fp64 queries);
        scores equal before rounding by lower slot. And their slots (n, h, knn), int64 in [0, s ** 2).

    Raises:
        ValueError: shapes or devices disagree, `knn` is outside [1, s], or the backend is unknown.
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
    _check_devices(query=query, sub_keys=sub_keys)
    if not 1 <= knn <= sub_keys.shape[2]:
        raise ValueError(f"knn is {knn} but must be in [1, s = {sub_keys.shape[2]}]")
    chosen = choose_backend(sub_keys, backend, query)
    if nobody_watches(query, sub_keys):
        return select(query, sub_keys, knn, chosen)
    if is_transformed():
        return transformed.product_key_topk(query, sub_keys, knn, chosen)
    return topk(query, sub_keys, knn, chosen)


def flat_topk(query: Tensor, keys: Tensor, knn: int, *, backend: str | None = None) -> Tensor:
    """The `knn` slots whose flat keys best match each query: what product keys save (Lample et al. 2019, section 4.5).

    Without a gradient: `row_products` scores the slots found, and has one. Equivalent to, on the CPU without all the
    scores at once::

        torch.einsum("nhd,hmd->nhm", query, keys).topk(knn).indices

    Args:
        query: (n, h, q) one query per token and head; n >= 0.
        keys: (h, m, q) a key per slot and head.
        knn: slots to keep, in [1, m].
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, h, knn) int64 in [0, m), best first, by inner products accumulated in fp32 (fp64 for fp64 queries), equal
        ones by lower slot.

    Raises:
        ValueError: shapes or devices disagree, `knn` is outside [1, m], or the backend is unknown.
    """
    if (query.dim(), keys.dim()) != (3, 3) or query.shape[1:] != (keys.shape[0], keys.shape[2]) or keys.shape[0] == 0:
        raise ValueError(
            f"query must be (n, h, q) and keys (h, m, q) with h >= 1, not {tuple(query.shape)} and {tuple(keys.shape)}"
        )
    _check_devices(query=query, keys=keys)
    if not 1 <= knn <= keys.shape[1]:
        raise ValueError(f"knn is {knn} but must be in [1, m = {keys.shape[1]}]")
    return flat(query.detach(), keys.detach(), knn, choose_backend(keys, backend, query))


def weighted_sum(
    values: Tensor, slots: Tensor, weights: Tensor, *, log: ReadLog | None = None, backend: str | None = None
) -> Tensor:
    """The weighted sum of some rows of a table, per token (Lample et al. 2019, section 3.1, eq. 3).

    Useful on its own wherever few rows of a large table are summed: sparse autoencoders, expert layers.
    Differentiable in values and weights, with sums in the same order in every run. Equivalent to, without
    the (n, b, v) rows::

        (values[slots] * weights[..., None]).sum(1)

    Args:
        values: (m, v) the table, of any floating dtype; v >= 1.
        slots: (n, b) int64 rows to read, in [0, m); n, b >= 0; a row may be read many times.
        weights: (n, b) their weights, any floating dtype.
        log: None gives `values` a dense gradient; with the log that a `pkmem.RowAdam` gives its tables, the gradient
            holds the reads instead, and no tensor of the table's size is made.
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, v) in the dtype of values, accumulated in fp32 (fp64 for fp64 values).

    Raises:
        ValueError: shapes or devices disagree, slots are not int64, a slot is outside [0, m) (checked on the CPU), or
            the backend is unknown.
    """
    if values.dim() != 2 or slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(
            "values must be (m, v), slots and weights (n, b), not "
            f"{tuple(values.shape)}, {tuple(slots.shape)} and {tuple(weights.shape)}"
        )
    _check_dtypes(values, slots)
    _check_devices(values=values, slots=slots, weights=weights)
    chosen = choose_backend(values, backend)
    if nobody_watches(values, slots, weights):
        return checked_bag(values, slots, weights, chosen)
    if is_transformed():
        return transformed.weighted_sum(values, slots, weights)
    if log is None:
        return bag(values, slots, weights, chosen)
    return logged_bag(values, slots, weights, log.counter, log.handle, chosen)


def packed_sum(
    rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int, *, backend: str | None = None
) -> Tensor:
    """The weighted sum of some rows of a table that is packed in few bits, per token: `weighted_sum` at inference.

    Differentiable in weights alone. Equivalent to, without unpacking the table::

        weighted_sum(unpack_rows(rows, width, bits), slots, weights)

    Args:
        rows: (m, `row_bytes(width, bits)`) uint8, as `pkmem.ops.packing.pack_rows` makes them.
        slots: (n, b) int64 rows to read, in [0, m); n, b >= 0; a row may be read many times.
        weights: (n, b) their weights, any floating dtype.
        width: of an unpacked row, v >= 1.
        bits: of a number, 8 or 4.
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, v) fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree, `bits` is neither 8 nor 4, a slot is outside [0, m) (checked on
            the CPU), or the backend is unknown.
    """
    packing.require_bits(bits)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != packing.row_bytes(width, bits):
        raise ValueError(
            f"rows of width {width} in {bits} bits are (m, {packing.row_bytes(width, bits)}) torch.uint8, not "
            f"{tuple(rows.shape)} {rows.dtype}: make them with pkmem.ops.packing.pack_rows"
        )
    if slots.dim() != 2 or slots.shape != weights.shape:
        raise ValueError(f"slots and weights must be (n, b), not {tuple(slots.shape)} and {tuple(weights.shape)}")
    _check_slots(slots)
    _check_devices(rows=rows, slots=slots, weights=weights)
    chosen = choose_backend(rows, backend, weights)
    if nobody_watches(rows, slots, weights):
        return checked_packed(rows, slots, weights, width, bits, chosen)
    if is_transformed():
        return transformed.packed_sum(rows, slots, weights, width, bits)
    return packed(rows, slots, weights, width, bits, chosen)


def row_products(
    table: Tensor, slots: Tensor, x: Tensor, *, log: ReadLog | None = None, backend: str | None = None
) -> Tensor:
    """The inner products of each token with some rows of a table: what a slot's neuron sees (He 2024, PEER, eq. 2).

    Differentiable in table and x, with sums in the same order in every run. Equivalent to, without the (n, b, d) rows::

        (table[slots] * x[:, None]).sum(-1)

    Args:
        table: (m, d) of any floating dtype; d >= 1.
        slots: (n, b) int64 rows to read, in [0, m); n, b >= 0; a row may be read many times.
        x: (n, d) hidden states, any floating dtype.
        log: None gives `table` a dense gradient; with a log it holds the reads instead, as in `weighted_sum`.
        backend: one of `BACKENDS`; None takes the fastest for the device.

    Returns:
        (n, b) fp32 (fp64 for an fp64 table).

    Raises:
        ValueError: shapes or devices disagree, slots are not int64, a slot is outside [0, m) (checked on the CPU), or
            the backend is unknown.
    """
    if (table.dim(), slots.dim(), x.dim()) != (2, 2, 2) or x.shape != (slots.shape[0], table.shape[1]):
        raise ValueError(
            "table must be (m, d), slots (n, b) and x (n, d), not "
            f"{tuple(table.shape)}, {tuple(slots.shape)} and {tuple(x.shape)}"
        )
    _check_dtypes(table, slots)
    _check_devices(table=table, slots=slots, x=x)
    chosen = choose_backend(table, backend)
    if nobody_watches(table, slots, x):
        return checked_products(table, slots, x, chosen)
    if is_transformed():
        return transformed.row_products(table, slots, x)
    if log is None:
        return products(table, slots, x, chosen)
    return logged_products(table, slots, x, log.counter, log.handle, chosen)


def _check_dtypes(table: Tensor, slots: Tensor) -> None:
    if not table.is_floating_point():
        raise ValueError(f"the table is {table.dtype} but must be of a floating dtype")
    _check_slots(slots)


def _check_slots(slots: Tensor) -> None:
    if slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype} but must be torch.int64: use slots.long()")


def _check_devices(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, not {places}: move them with .to()")
