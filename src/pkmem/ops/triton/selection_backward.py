"""The gradient of the selected scores: sub-keys summed for the queries, queries summed for the sub-keys."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.triton.arithmetic import add_product, narrow
from pkmem.ops.triton.bag import sum_rows
from pkmem.ops.triton.device import on
from pkmem.ops.triton.launch import aligned, first_that_fits, num_parts, of_type, power_of_two

_TOKENS = 32  # of a block


def product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk_backward`; fp64 goes to the reference."""
    if grad_scores.dtype == torch.float64:
        return reference.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    num_sub_keys, half = sub_keys.shape[2:]
    chosen = torch.stack((slots // num_sub_keys, slots % num_sub_keys), 2).flatten(1, 2)  # (n, 2h, knn)
    grad_halves = grad_scores.repeat_interleave(2, 1)
    # The gradient of a query half is the weighted sum of its sub-keys: a bag over all sets as one table.
    sets = num_sub_keys * torch.arange(chosen.shape[1], device=slots.device)
    rows = (chosen + sets[:, None]).flatten(0, 1)
    grad_query = sum_rows(sub_keys.reshape(-1, half), rows, grad_halves.flatten(0, 1), query.dtype)
    return grad_query.view(query.shape), _grad_sub_keys(grad_halves, query, sub_keys, chosen)


def _grad_sub_keys(grad_halves: Tensor, query: Tensor, sub_keys: Tensor, chosen: Tensor) -> Tensor:
    """Per block of sub-keys the product of their score gradients, made on the fly, with the queries.

    Against sorting the reads by sub-key: a sub-key has about a thousand reads, so the product is dense enough for
    the matrix units, and neither a sort nor a (n, h, s) tensor is needed. Parts of the tokens are summed apart and
    then together in a fixed order.
    """
    num_tokens, sets, knn = chosen.shape
    num_sub_keys, half = sub_keys.shape[2:]
    if num_tokens == 0:
        return torch.zeros_like(sub_keys)
    query = aligned((query if query.dtype == torch.bfloat16 else query.to(torch.float32)).contiguous())
    with on(query):
        shape = _shape_of_sum(query.device, query.dtype, num_sub_keys, half, knn)
        tiles, column_blocks = triton.cdiv(num_sub_keys, shape["BLOCK_S"]), triton.cdiv(half, shape["BLOCK_D"])
        blocks = triton.cdiv(num_tokens, _TOKENS)
        part_size = triton.cdiv(blocks, num_parts(sets * tiles * column_blocks, blocks)) * _TOKENS
        parts, padded = triton.cdiv(num_tokens, part_size), blocks * _TOKENS
        sums = torch.empty(parts, *sub_keys.shape, device=query.device)
        _sum_queries[tiles * column_blocks, sets, parts](
            query, _tokens_last(chosen, padded, torch.int32, -1), _tokens_last(grad_halves, padded, torch.float32, 0),
            sums, num_tokens, padded, num_sub_keys, half, knn, part_size, column_blocks, **shape,
        )  # fmt: skip
    return sums.sum(0).to(sub_keys.dtype)


@lru_cache(maxsize=256)
def _shape_of_sum(device: torch.device, dtype: torch.dtype, num_sub_keys: int, half: int, knn: int) -> dict[str, Any]:
    """How `_sum_queries` is launched: with as few warps and as many sub-keys a program as registers allow."""
    is_bf16 = dtype == torch.bfloat16
    block_d = power_of_two(half, 16, 256 if is_bf16 else 128)  # what registers hold
    shape = {"IS_BF16": is_bf16, "BLOCK_N": _TOKENS, "BLOCK_S": power_of_two(num_sub_keys, 16, 64), "BLOCK_D": block_d}
    tensors = (of_type(dtype), of_type(torch.int32), of_type(torch.float32), of_type(torch.float32))
    numbers = (_TOKENS, _TOKENS, num_sub_keys, half, knn, _TOKENS, triton.cdiv(half, block_d))
    fewer = {**shape, "BLOCK_S": min(shape["BLOCK_S"], 32)}
    shapes = [{**shape, "num_warps": 4}, {**shape, "num_warps": 8}, {**fewer, "num_warps": 4}]
    return first_that_fits(_sum_queries, device, (*tensors, *numbers), shapes) or shapes[0]


def _tokens_last(numbers: Tensor, padded: int, dtype: torch.dtype, nothing: int) -> Tensor:
    """(n, 2h, knn) as (2h, knn, padded): a load takes neighbours, and needs no mask."""
    turned = torch.full((*numbers.shape[1:], padded), nothing, dtype=dtype, device=numbers.device)
    turned[..., : len(numbers)] = numbers.permute(1, 2, 0)
    return turned


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_queries(  # type: ignore[no-untyped-def]
    query, chosen, grad_halves, sums, num_tokens, padded, num_sub_keys, half, knn, part_size, column_blocks,
    IS_BF16: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of sub-keys and columns, set, part of the tokens) writes that block of sums[part, set]."""
    keys = tl.program_id(0) // column_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    set_number, part = tl.program_id(1), tl.program_id(2)
    sets = tl.num_programs(1)
    last = tl.minimum((part + 1) * part_size, padded)
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(part * part_size, last, BLOCK_N):
        tokens = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        slopes = tl.zeros((BLOCK_S, BLOCK_N), tl.float32)
        for neighbour in range(knn):
            place = (set_number * knn + neighbour).to(tl.int64) * padded + tokens
            key = tl.load(chosen + place)
            slope = tl.load(grad_halves + place)
            slopes += tl.where(keys[:, None] == key[None, :], slope[None, :], 0.0)
        tokens = tl.minimum(tokens, num_tokens - 1)  # what repeats the last one has no slope
        places = (tokens[:, None] * sets + set_number) * half + columns[None, :]
        queries = tl.load(query + places, mask=(columns < half)[None, :], other=0)
        if IS_BF16:  # two products on the matrix units keep 16 bits of each slope
            coarse = narrow(slopes, tl.bfloat16)
            total = add_product(coarse, queries, total)
            total = add_product(narrow(slopes - coarse.to(tl.float32), tl.bfloat16), queries, total)
        else:
            total = add_product(slopes, queries, total)
    places = ((part * sets + set_number).to(tl.int64) * num_sub_keys + keys[:, None]) * half + columns[None, :]
    tl.store(sums + places, total, mask=(keys < num_sub_keys)[:, None] & (columns < half)[None, :])
