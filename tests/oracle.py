"""Independent truth for the tests: brute force and loops in fp64; nothing of pkmem is imported.

Every function takes torch tensors or numpy arrays of any dtype and returns numpy arrays in fp64 (slots: int64).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fp64(array: Any) -> Array:
    """The same numbers as a new numpy array in fp64."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().double().numpy()
    return np.array(array, dtype=np.float64)


def integers(array: Any) -> NDArray[np.int64]:
    """The same slots as a numpy array."""
    return np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array, dtype=np.int64)


def product_keys(sub_keys: Any) -> Array:
    """All keys (h, s * s, q): key i * s + j is sub-key i of the first set beside sub-key j of the second."""
    sub_keys = fp64(sub_keys)
    i, j = np.divmod(np.arange(sub_keys.shape[2] ** 2), sub_keys.shape[2])
    return np.concatenate([sub_keys[:, 0, i], sub_keys[:, 1, j]], axis=-1)


def all_scores(query: Any, sub_keys: Any) -> Array:
    """The score (n, h, s * s) of every query (n, h, q) with every key."""
    return np.swapaxes(np.swapaxes(fp64(query), 0, 1) @ np.swapaxes(product_keys(sub_keys), 1, 2), 0, 1)


def best_first(scores: Any, knn: int) -> tuple[Array, NDArray[np.int64]]:
    """The `knn` highest of scores (..., c) and where they stand, equal scores by lower place."""
    scores = fp64(scores)
    places = np.argsort(-scores, axis=-1, kind="stable")[..., :knn]
    return np.take_along_axis(scores, places, axis=-1), places


def product_key_topk(query: Any, sub_keys: Any, knn: int) -> tuple[Array, NDArray[np.int64]]:
    """Scores and slots (n, h, knn) of the best keys among all s * s."""
    return best_first(all_scores(query, sub_keys), knn)


def product_key_topk_gradients(grad_scores: Any, query: Any, sub_keys: Any, slots: Any) -> tuple[Array, Array]:
    """Gradients in query and sub_keys of sum(grad_scores * scores of slots)."""
    grad_scores, query, sub_keys, slots = fp64(grad_scores), fp64(query), fp64(sub_keys), integers(slots)
    num_sub_keys, half = sub_keys.shape[2:]
    grad_query, grad_sub_keys = np.zeros_like(query), np.zeros_like(sub_keys)
    for n, h, k in np.ndindex(slots.shape):
        i, j = divmod(int(slots[n, h, k]), num_sub_keys)
        grad_query[n, h, :half] += grad_scores[n, h, k] * sub_keys[h, 0, i]
        grad_query[n, h, half:] += grad_scores[n, h, k] * sub_keys[h, 1, j]
        grad_sub_keys[h, 0, i] += grad_scores[n, h, k] * query[n, h, :half]
        grad_sub_keys[h, 1, j] += grad_scores[n, h, k] * query[n, h, half:]
    return grad_query, grad_sub_keys


def weighted_sum(values: Any, slots: Any, weights: Any) -> Array:
    """Sum (n, v) of the weighted rows `slots` (n, b) of values (m, v)."""
    values, slots, weights = fp64(values), integers(slots), fp64(weights)
    summed = np.zeros((slots.shape[0], values.shape[1]))
    for n, b in np.ndindex(slots.shape):
        summed[n] += weights[n, b] * values[slots[n, b]]
    return summed


def weighted_sum_gradients(values: Any, slots: Any, weights: Any, grad_output: Any) -> tuple[Array, Array]:
    """Gradients in values and weights of sum(grad_output * weighted_sum(...))."""
    values, slots, weights, grad_output = fp64(values), integers(slots), fp64(weights), fp64(grad_output)
    grad_values, grad_weights = np.zeros_like(values), np.zeros_like(weights)
    for n, b in np.ndindex(slots.shape):
        grad_values[slots[n, b]] += weights[n, b] * grad_output[n]
        grad_weights[n, b] = math.fsum(values[slots[n, b]] * grad_output[n])
    return grad_values, grad_weights


def row_products(table: Any, slots: Any, x: Any) -> Array:
    """Inner products (n, b) of x (n, d) with the rows `slots` (n, b) of a table (m, d)."""
    table, slots, x = fp64(table), integers(slots), fp64(x)
    products = np.zeros(slots.shape)
    for n, b in np.ndindex(slots.shape):
        products[n, b] = math.fsum(table[slots[n, b]] * x[n])
    return products


def row_products_gradients(table: Any, slots: Any, x: Any, grad_output: Any) -> tuple[Array, Array]:
    """Gradients in table and x of sum(grad_output * row_products(...))."""
    table, slots, x, grad_output = fp64(table), integers(slots), fp64(x), fp64(grad_output)
    grad_table, grad_x = np.zeros_like(table), np.zeros_like(x)
    for n, b in np.ndindex(slots.shape):
        grad_table[slots[n, b]] += grad_output[n, b] * x[n]
        grad_x[n] += grad_output[n, b] * table[slots[n, b]]
    return grad_table, grad_x


def group_reads(passes: list[tuple[Any, Any, Any]]) -> dict[int, list[tuple[int, float]]]:
    """For each row read, ascending: (token, weight) of its reads in order of reading.

    Args:
        passes: slots (n, b), weights (n, b) and grad_output (n, v) of each pass; tokens count through all.
    """
    reads: dict[int, list[tuple[int, float]]] = {}
    first_token = 0
    for pass_slots, pass_weights, _ in passes:
        slots, weights = integers(pass_slots), fp64(pass_weights)
        for n, b in np.ndindex(slots.shape):
            reads.setdefault(int(slots[n, b]), []).append((first_token + n, float(weights[n, b])))
        first_token += slots.shape[0]
    return dict(sorted(reads.items()))


def row_gradients(passes: list[tuple[Any, Any, Any]]) -> dict[int, Array]:
    """The gradient (v,) of each row that some pass read, ascending by row."""
    returned = np.concatenate([fp64(grad_output) for _, _, grad_output in passes])
    return {
        row: sum((weight * returned[token] for token, weight in reads), np.zeros(returned.shape[1]))
        for row, reads in group_reads(passes).items()
    }


def adam(
    values: Array,
    first_moment: Array,
    second_moment: Array,
    gradients: dict[int, Array],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """One step of Adam in place on the rows with a gradient; other rows and their moments stay as they are.

    Dense Adam is the case in which every row has a gradient. The bias is corrected by the global `step`.
    """
    for row, gradient in gradients.items():
        for column, g in enumerate(gradient):
            first = betas[0] * first_moment[row, column] + (1 - betas[0]) * g
            second = betas[1] * second_moment[row, column] + (1 - betas[1]) * g * g
            first_moment[row, column], second_moment[row, column] = first, second
            unbiased = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
            values[row, column] -= lr * unbiased[0] / (math.sqrt(unbiased[1]) + eps)


def adam_by_row(
    values: Array,
    first_moment: Array,
    second_moment: Array,
    gradients: dict[int, Array],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """The same with one second moment (m,) for each row, of the mean square of its gradient."""
    for row, gradient in gradients.items():
        square = math.fsum(float(g) ** 2 for g in gradient) / len(gradient)
        second_moment[row] = betas[1] * second_moment[row] + (1 - betas[1]) * square
        divisor = math.sqrt(second_moment[row] / (1 - betas[1] ** step)) + eps
        for column, g in enumerate(gradient):
            first_moment[row, column] = betas[0] * first_moment[row, column] + (1 - betas[0]) * g
            values[row, column] -= lr * first_moment[row, column] / (1 - betas[0] ** step) / divisor
