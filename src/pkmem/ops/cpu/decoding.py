"""The whole layer for a few tokens at once, without gradient, as a decoder reads it: one kernel, one thread.

A token costs a read of the query's weights and of the sub-keys. Torch's matrix product reads them at half the speed
of a plain loop when there is one token to multiply with, and a dozen small calls cost as much again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops.cpu.bag import sum_rows
from pkmem.ops.cpu.selection import multiply, products, select
from pkmem.ops.cpu.vectors import array, kernel, part_of_kernel

_NORMS = ("batch", "layer", "rms", "none")


def decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: str,
    norm_tensors: list[Tensor],
    eps: float,
    sub_keys: Tensor,
    values: Tensor,
    knn: int,
) -> Tensor:
    """The memory's output (n, v) for a few tokens, see `pkmem.ops.decode`."""
    heads, _, num_sub_keys, half = sub_keys.shape
    query = np.empty((len(x), heads, 2 * half), np.float32)
    half_scores = np.empty((2 * heads, len(x), num_sub_keys), np.float32)
    weights, slots = np.empty((len(x), heads, knn), np.float32), np.empty((len(x), heads, knn), np.int64)
    out = values.new_empty(len(x), values.shape[1])
    read(
        array(x), array(weight), array(bias), _NORMS.index(norm), _packed(norm_tensors), np.float32(eps),
        array(sub_keys).reshape(-1, num_sub_keys, half), array(values), knn, query, half_scores, weights, slots, array(out),
    )  # fmt: skip
    return out


def _packed(tensors: list[Tensor]) -> np.ndarray:
    """One (k, c) array, so that the kernel is compiled once for every norm."""
    return array(torch.stack(tensors)) if tensors else np.empty((0, 0), np.float32)


@kernel
def read(x, weight, bias, norm, norm_tensors, eps, sub_keys, values, knn, query, half_scores, weights, slots, out):  # type: ignore[no-untyped-def]
    """Writes query (n, h, q), half_scores (2h, n, s), weights and slots (n, h, knn), and out (n, v)."""
    tokens, heads, width = query.shape
    flat = query.reshape(tokens, heads * width)
    products(weight, x, flat)
    for token in range(tokens):
        for channel in range(heads * width):
            flat[token, channel] += bias[channel]
        _normalise(query[token], norm, norm_tensors, eps)
    multiply(query.reshape(tokens, 2 * heads, width // 2), sub_keys, half_scores, 0, 2 * heads)
    select(half_scores, knn, weights, slots, 0, tokens)
    for token in range(tokens):
        for head in range(heads):
            _softmax(weights[token, head])
    sum_rows(values, slots.reshape(tokens, heads * knn), weights.reshape(tokens, heads * knn), out, 0, tokens)


@part_of_kernel
def _normalise(query, norm, tensors, eps):  # type: ignore[no-untyped-def]
    """Normalises the queries (h, q) of a token in place; norm is a place in `_NORMS`."""
    heads, width = query.shape
    if norm == 0:
        for head in range(heads):
            for column in range(width):
                channel = head * width + column
                scale = tensors[0, channel] / np.sqrt(tensors[3, channel] + eps)
                query[head, column] = (query[head, column] - tensors[2, channel]) * scale + tensors[1, channel]
    for head in range(heads if norm in (1, 2) else 0):
        row = query[head]
        mean = np.float32(0)
        if norm == 1:
            mean = np.float32(row.sum() / width)
        square = np.float32(0)
        for column in range(width):
            square += (row[column] - mean) * (row[column] - mean)
        scale = np.float32(1) / np.sqrt(np.float32(square / width) + eps)
        for column in range(width):
            row[column] = (row[column] - mean) * scale * tensors[0, column]
            if norm == 1:
                row[column] += tensors[1, column]


@part_of_kernel
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Scores, best first, to weights (eq. 2), in place."""
    highest, total = scores[0], np.float32(0)
    for rank in range(len(scores)):
        scores[rank] = np.exp(scores[rank] - highest)
        total += scores[rank]
    for rank in range(len(scores)):
        scores[rank] /= total
