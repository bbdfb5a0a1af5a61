"""The whole layer for a few tokens at once, without gradient, as a decoder reads it: two kernels, or a gate's, too; one
thread.

A token costs a read of the query's weights and of the sub-keys. Torch's matrix product reads them at half the speed
of a plain loop when there is one token to multiply with, and a dozen small calls cost as much again. So would ten arrays
for the kernel: it gets the addresses of what it reads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops.arguments import NORM_TENSORS, LayerWeights
from pkmem.ops.cpu.bag import sum_rows
from pkmem.ops.cpu.halves import widen
from pkmem.ops.cpu.kernels import array, fp32_at, kernel, part_of_kernel
from pkmem.ops.cpu.packed import sum_packed_rows
from pkmem.ops.cpu.selection import multiply, products, select
from pkmem.ops.packing import code_bytes

_NORMS = tuple(NORM_TENSORS)


def decode(x: Tensor, layer: LayerWeights) -> Tensor:
    """See `Backend.decode`; values of any dtype but fp64, or packed."""
    tokens, (heads, _, num_sub_keys, half) = x.shape[0], layer.sub_keys.shape
    weights, slots = np.empty((tokens, heads * layer.knn), np.float32), np.empty((tokens, heads * layer.knn), np.int64)
    given = (x, layer.project, layer.bias, layer.sub_keys, *layer.norm_tensors)
    read = [tensor.contiguous() for tensor in given]  # must not go before the kernel has run
    addresses = [tensor.data_ptr() for tensor in read] + [0] * (8 - len(read))
    choose(*addresses, _NORMS.index(layer.norm), layer.eps, x.shape[1], num_sub_keys, half, layer.knn, weights, slots)
    if layer.ask_ahead is not None:
        layer.ask_ahead(torch.from_numpy(slots))
    values = array(layer.values)
    summed = np.empty((tokens, layer.width), values.dtype if layer.bits is None else np.float32)
    if layer.bits is None:
        sum_rows(values, slots, weights, summed, 0, tokens)
    else:
        sum_packed_rows(values, code_bytes(layer.width, layer.bits), layer.bits, slots, weights, summed, 0, tokens)
    if layer.gate is not None:
        gate, project = layer.gate
        out = np.empty((tokens, len(project)), np.float32)
        apply_gate(summed, array(x), array(gate), array(project), out)
        return torch.from_numpy(out)
    found = torch.from_numpy(summed)
    return found if layer.bits is not None or found.dtype is layer.values.dtype else found.view(layer.values.dtype)


@kernel
def choose(  # type: ignore[no-untyped-def]
    x_at, weight_at, bias_at, sub_keys_at, scale_at, shift_at, mean_at, variance_at,
    norm, eps, width, num_sub_keys, half, knn, weights, slots,
):  # fmt: skip
    """Writes weights and slots (n, h * knn)."""
    tokens, heads = len(weights), weights.shape[1] // knn
    channels = heads * 2 * half
    x, weight = fp32_at(x_at, (tokens, width)), fp32_at(weight_at, (channels, width))
    bias, keys = fp32_at(bias_at, (channels,)), fp32_at(sub_keys_at, (2 * heads, num_sub_keys, half))
    normed = channels if norm == 0 else 2 * half
    scale, shift = fp32_at(scale_at, (normed,)), fp32_at(shift_at, (normed,))
    mean, variance = fp32_at(mean_at, (normed,)), fp32_at(variance_at, (normed,))
    query = np.empty((tokens, heads, 2 * half), np.float32)
    half_scores = np.empty((2 * heads, tokens, num_sub_keys), np.float32)
    flat = query.reshape(tokens, channels)
    products(weight, x, flat)
    for token in range(tokens):
        for channel in range(channels):
            flat[token, channel] += bias[channel]
        if norm == 0:
            for channel in range(channels):
                factor = scale[channel] / np.sqrt(variance[channel] + np.float32(eps))
                flat[token, channel] = (flat[token, channel] - mean[channel]) * factor + shift[channel]
        elif norm < 3:
            _normalise(query[token], norm == 1, scale, shift, np.float32(eps))
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
