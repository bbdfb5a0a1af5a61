"""The whole layer for a few tokens at once, without gradient, as a decoder reads it: two kernels, or a gate's, too; one
thread.

A token costs a read of the query's weights and of the sub-keys. Torch's matrix product reads them at half the speed
of a plain loop when there is one token to multiply with, and a dozen small calls cost as much again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops.arguments import NORM_TENSORS, LayerWeights
from pkmem.ops.cpu.bag import sum_rows
from pkmem.ops.cpu.halves import widen
from pkmem.ops.cpu.kernels import array, kernel, part_of_kernel
from pkmem.ops.cpu.packed import sum_packed_rows
from pkmem.ops.cpu.selection import multiply, products, select
from pkmem.ops.packing import code_bytes

_NORMS = tuple(NORM_TENSORS)


def decode(x: Tensor, layer: LayerWeights) -> Tensor:
    """See `Backend.decode`; values of any dtype but fp64, or packed."""
    norms = [array(tensor) for tensor in layer.norm_tensors]
    norms += [np.empty(0, np.float32)] * (4 - len(norms))
    tokens, reads = array(x), (len(x), layer.sub_keys.shape[0] * layer.knn)
    weights, slots = np.empty(reads, np.float32), np.empty(reads, np.int64)
    choose(
        tokens, array(layer.project), array(layer.bias), _NORMS.index(layer.norm), *norms, layer.eps,
        array(layer.sub_keys), layer.knn, weights, slots,
    )  # fmt: skip
    if layer.ask_ahead is not None:
        layer.ask_ahead(torch.from_numpy(slots))
    if layer.bits is None:
        summed = layer.values.new_empty(len(x), layer.width)
        sum_rows(array(layer.values), slots, weights, array(summed), 0, len(x))
    else:
        summed = x.new_empty(len(x), layer.width)
        packed = array(layer.values), code_bytes(layer.width, layer.bits), layer.bits
        sum_packed_rows(*packed, slots, weights, array(summed), 0, len(x))
    if layer.gate is None:
        return summed
    gate, project = layer.gate
    out = x.new_empty(len(x), len(project))
    apply_gate(array(summed), tokens, array(gate), array(project), array(out))
    return out


@kernel
def choose(x, weight, bias, norm, scale, shift, mean, variance, eps, sub_keys, knn, weights, slots):  # type: ignore[no-untyped-def]
    """Writes weights and slots (n, h * knn)."""
    tokens = len(x)
    heads, _, num_sub_keys, half = sub_keys.shape
    query = np.empty((tokens, heads, 2 * half), np.float32)
    half_scores = np.empty((2 * heads, tokens, num_sub_keys), np.float32)
    flat = query.reshape(tokens, len(weight))
    products(weight, x, flat)
    for token in range(tokens):
        for channel in range(len(weight)):
            flat[token, channel] += bias[channel]
        if norm == 0:
            for channel in range(len(weight)):
                factor = scale[channel] / np.sqrt(variance[channel] + np.float32(eps))
                flat[token, channel] = (flat[token, channel] - mean[channel]) * factor + shift[channel]
        elif norm < 3:
            _normalise(query[token], norm == 1, scale, shift, np.float32(eps))
    keys = sub_keys.reshape(2 * heads, num_sub_keys, half)
    multiply(query.reshape(tokens, 2 * heads, half), keys, half_scores, 0, 2 * heads)
    scores = weights.reshape(tokens, heads, knn)
    select(half_scores, knn, scores, slots.reshape(tokens, heads, knn), 0, tokens)
    for token in range(tokens):
        for head in range(heads):
            _softmax(scores[token, head])


@kernel
def apply_gate(summed, x, gate, project, out):  # type: ignore[no-untyped-def]
    """Writes out (n, d'): project @ (summed * silu(gate @ x)), summed being (n, v) and x (n, d)."""
    opened = np.empty((len(x), len(gate)), np.float32)
    products(gate, x, opened)
    for token in range(len(x)):
        for column in range(len(gate)):
            number = opened[token, column]
            opened[token, column] = widen(summed[token, column]) * number / (np.float32(1) + np.exp(-number))
    products(project, opened, out)


@part_of_kernel
def _normalise(query, centred, scale, shift, eps):  # type: ignore[no-untyped-def]
    """Layer norm, or rms norm if not centred, of the queries (h, q) of a token, in place."""
    heads, width = query.shape
    for head in range(heads):
        row = query[head]
        mean = np.float32(row.sum() / width) if centred else np.float32(0)
        square = np.float32(0)
        for column in range(width):
            square += (row[column] - mean) * (row[column] - mean)
        factor = np.float32(1) / np.sqrt(np.float32(square / width) + eps)
        for column in range(width):
            row[column] = (row[column] - mean) * factor * scale[column]
            if centred:
                row[column] += shift[column]


@part_of_kernel
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Scores, best first, to weights (eq. 2), in place."""
    highest, total = scores[0], np.float32(0)
    for rank in range(len(scores)):
        scores[rank] = np.exp(scores[rank] - highest)
        total += scores[rank]
    for rank in range(len(scores)):
        scores[rank] /= total
