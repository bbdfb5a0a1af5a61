"""The best slots of each query (Lample et al. 2019, section 3.1), without a score tensor in memory.

Sorting is what costs, so few scores are sorted. A first kernel multiplies a block of queries with one block of sub-keys
after another and keeps, per query half, the best score at each place of the blocks: the knn-th best of those bounds
the knn-th best of all. It multiplies once more and writes down the few sub-keys that reach the bound, which are sorted;
where there is no room for all of them, as with many ties, a kernel that sorts every block takes over. That
one also serves small sets and few tokens, for which parts of the sub-keys go to different programs. A last kernel
looks at the pairs that can win.
A score and its index are packed into one int64, score first and the index upside down, so that falling integers are
falling scores with ties by lower index, whatever a kernel does.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.triton.arithmetic import add_product
from pkmem.ops.triton.device import on
from pkmem.ops.triton.launch import aligned, first_that_fits, num_parts, of_type, power_of_two

_LARGEST_KNN = 64
_LARGEST_SET = 1 << 16  # of sub-keys: a slot takes 32 bits
_FEWEST_PROGRAMS = 64  # for which bounding pays, and
_FEWEST_BLOCKS = 4  # of sub-keys too
_WIDEST_HALF = 256  # that stays where it is while sub-keys pass by
_TOKENS = 64  # of a program; half as many in fp32
_SUB_KEYS = 64  # of a block
_BOUNDING = ((128, 2), (64, 2), (64, 1), (32, 2), (32, 1), (16, 2), (16, 1))  # tokens of a program, stages: best first
_LOWEST = tl.constexpr(-(1 << 63))  # below every packed score
_LOWEST_ORDERED = tl.constexpr(-(1 << 31))
_COUNT = tl.constexpr(float(1 << 23))  # fp32 numbers from here on are integers in their bits
_COUNT_BITS = tl.constexpr(0x4B000000)
_INDEX = tl.constexpr(0xFFFFFFFF)


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk`; fp64 and large sets go to the reference.

    Two dtypes become the wider one: where autocast makes bf16 queries of a layer whose sub-keys are fp32, the scores are
    those of fp32, which the matrix units do not multiply. Sub-keys in bf16 take the fast way.
    """
    num_tokens, heads, _ = query.shape
    num_sub_keys = sub_keys.shape[2]
    if knn > _LARGEST_KNN or num_sub_keys > _LARGEST_SET or query.dtype == torch.float64:
        return reference.product_key_topk(query, sub_keys, knn)
    scores = torch.empty(num_tokens, heads, knn, device=query.device)
    slots = torch.empty(num_tokens, heads, knn, dtype=torch.int64, device=query.device)
    if num_tokens == 0:
        return scores, slots
    dtype = torch.promote_types(query.dtype, sub_keys.dtype)
    query, sub_keys = aligned(query.to(dtype).contiguous()), aligned(sub_keys.to(dtype).contiguous())
    kept = power_of_two(knn, 2, _LARGEST_KNN)
    pairs = power_of_two(sum(knn // (rank + 1) for rank in range(knn)), 2, 1 << 31)
    is_alone = num_tokens * heads < _FEWEST_PROGRAMS
    block_n = 1 if is_alone else max(1, min(4, 512 // pairs))  # what registers hold
    with on(query):
        found = _best_of_halves(query, sub_keys, kept)
        _best_pairs[triton.cdiv(num_tokens, block_n), heads](
            found, scores, slots, num_tokens, num_sub_keys,
            knn=knn, HOOKS=isqrt(knn), KNN=kept, PAIRS=pairs, BLOCK_N=block_n, num_warps=1,
        )  # fmt: skip
    return scores, slots


def _best_of_halves(query: Tensor, sub_keys: Tensor, kept: int) -> Tensor:
    """The `kept` best sub-keys of each query half, packed, best first: (n, 2h, kept)."""
    num_tokens, halves = query.shape[0], 2 * query.shape[1]
    num_sub_keys, half = sub_keys.shape[2:]
    room = 2 * kept
    is_enough = num_tokens * halves >= 2 * _TOKENS * _FEWEST_PROGRAMS
    most_tokens = power_of_two(num_tokens, 16, 2 * _TOKENS if is_enough else _TOKENS)
    shape = None
    if (
        query.dtype != torch.float32  # bounding multiplies twice, and has no matrix units for fp32
        and half <= _WIDEST_HALF
        and room <= _SUB_KEYS  # or most columns reach the bound, and more sub-keys than there is room for
        and triton.cdiv(num_tokens, most_tokens) * halves >= _FEWEST_PROGRAMS
        and num_sub_keys >= _FEWEST_BLOCKS * _SUB_KEYS
    ):
        shape = _shape_of_bounding(query.device, query.dtype, num_sub_keys, half, kept, most_tokens)
    if shape is None:
        return _best_of_parts(query, sub_keys, kept)
    blocks = triton.cdiv(num_tokens, shape["BLOCK_N"])
    padded = blocks * shape["BLOCK_N"]  # whole blocks are written, which spares every mask
    found = torch.empty(padded, halves, room, dtype=torch.int64, device=query.device)
    counts = torch.empty(padded, halves, dtype=torch.int32, device=query.device)
    given = (query, sub_keys, found, counts, num_tokens, num_sub_keys, half)
    _candidates[blocks, halves](*given, **shape)
    # Small programs: few are crowded, and what they take, all others have to wait for.
    shape = _shape_of_sorting(query.device, query.dtype, num_sub_keys, half, kept, 16, True)
    _best_sub_keys[triton.cdiv(num_tokens, 16), halves, 1](*given, num_sub_keys, **shape)
    return _sorted(found, num_tokens, kept)


@lru_cache(maxsize=256)
def _shape_of_bounding(
    device: torch.device, dtype: torch.dtype, num_sub_keys: int, half: int, kept: int, most_tokens: int
) -> dict[str, Any] | None:
    """How `_candidates` is launched: with as many tokens a program as the device has room for; None if it has none."""
    shapes = [
        {
            "KNN": kept, "ROOM": 2 * kept, "BLOCK_N": block_n, "BLOCK_S": _SUB_KEYS,
            "BLOCK_D": power_of_two(half, 16, _WIDEST_HALF), "num_warps": max(4, block_n // 16), "num_stages": stages,
        }
        for block_n, stages in _BOUNDING if block_n <= most_tokens
    ]  # fmt: skip
    found, counts = of_type(torch.int64), of_type(torch.int32)
    arguments = (of_type(dtype), of_type(dtype), found, counts, most_tokens, num_sub_keys, half)
    return first_that_fits(_candidates, device, arguments, shapes)


def _best_of_parts(query: Tensor, sub_keys: Tensor, kept: int) -> Tensor:
    """The same by sorting every block of sub-keys, which are split among programs where tokens are few."""
    num_tokens, halves = query.shape[0], 2 * query.shape[1]
    num_sub_keys, half = sub_keys.shape[2:]
    block_n = power_of_two(num_tokens, 16, _TOKENS // 2 if query.dtype == torch.float32 else _TOKENS)
    blocks = triton.cdiv(num_tokens, block_n)
    parts = num_parts(blocks * halves, triton.cdiv(num_sub_keys, _SUB_KEYS))
    part_size = triton.cdiv(triton.cdiv(num_sub_keys, parts), _SUB_KEYS) * _SUB_KEYS
    parts = triton.cdiv(num_sub_keys, part_size)  # none is empty
    found = torch.empty(blocks * block_n, halves, parts * kept, dtype=torch.int64, device=query.device)
    shape = _shape_of_sorting(query.device, query.dtype, num_sub_keys, half, kept, block_n, False)
    _best_sub_keys[blocks, halves, parts](
        query, sub_keys, found, None, num_tokens, num_sub_keys, half, part_size, **shape
    )
    return found if parts == 1 else _sorted(found, num_tokens, kept)


@lru_cache(maxsize=256)
def _shape_of_sorting(
    device: torch.device, dtype: torch.dtype, num_sub_keys: int, half: int, kept: int, block_n: int, redo: bool
) -> dict[str, Any]:
    """How `_best_sub_keys` is launched: with the usual number of stages, or with one if that spills registers."""
    shape = {
        "KNN": kept, "ROOM": 2 * kept if redo else kept, "BLOCK_N": block_n, "BLOCK_S": _SUB_KEYS,
        "BLOCK_D": power_of_two(half, 16, 64), "REDO": redo, "num_warps": max(4, block_n // 16),
    }  # fmt: skip
    found, counts = of_type(torch.int64), of_type(torch.int32) if redo else None
    arguments = (of_type(dtype), of_type(dtype), found, counts, block_n, num_sub_keys, half, _SUB_KEYS)
    return first_that_fits(_best_sub_keys, device, arguments, [shape, {**shape, "num_stages": 1}]) or shape


def _sorted(found: Tensor, num_tokens: int, kept: int) -> Tensor:
    """The `kept` best of each of the first `num_tokens` rows of (n, 2h, r), best first."""
    _, halves, size = found.shape
    best = found.new_empty(num_tokens, halves, kept)
    places = triton.next_power_of_2(size)
    block = max(1, 256 // places)
    warps = max(1, min(4, places // 256))
    grid = (triton.cdiv(num_tokens * halves, block),)
    _sort[grid](found, best, num_tokens * halves, size, KNN=kept, PLACES=places, BLOCK=block, num_warps=warps)
    return best


@triton.jit
def _ordered(score):  # type: ignore[no-untyped-def]
    """int32 numbers ordered like the scores; 0.0 and -0.0 are one score."""
    bits = tl.fma(score, 1.0, 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _packed(ordered, index):  # type: ignore[no-untyped-def]
    """int64 numbers in the same order, ties by lower index."""
    return (ordered.to(tl.int64) << 32) | (index.to(tl.int64) ^ _INDEX)


@triton.jit
def _score_of(packed):  # type: ignore[no-untyped-def]
    ordered = (packed >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(packed):  # type: ignore[no-untyped-def]
    return (packed & _INDEX) ^ _INDEX


@triton.jit
def _load_queries(query, columns, half):  # type: ignore[no-untyped-def]
    return tl.load(query + columns[None, :], mask=(columns < half)[None, :], other=0)


@triton.jit
def _load_sub_keys(sub_keys, keys, num_sub_keys, columns, half):  # type: ignore[no-untyped-def]
    inside = (keys < num_sub_keys)[None, :] & (columns < half)[:, None]
    return tl.load(sub_keys + keys[None, :] * half + columns[:, None], mask=inside, other=0)


@triton.jit
def _ordered_scores(left, sub_keys, keys, num_sub_keys, half, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of whole queries and a block of sub-keys; the lowest number where there is no sub-key."""
    right = _load_sub_keys(sub_keys, keys, num_sub_keys, tl.arange(0, BLOCK_D), half)
    scores = add_product(left, right, tl.zeros((left.shape[0], keys.shape[0]), tl.float32))
    return tl.where((keys < num_sub_keys)[None, :], _ordered(scores), _LOWEST_ORDERED)


@triton.jit(do_not_specialize=["num_tokens"])
def _candidates(  # type: ignore[no-untyped-def]
    query, sub_keys, found, counts, num_tokens, num_sub_keys, half,
    KNN: tl.constexpr, ROOM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, half of a head) writes the sub-keys that may be among the KNN best, and their counts.

    A last block that is not full repeats the last token.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.minimum(places, num_tokens - 1)
    half_head, halves = tl.program_id(1), tl.num_programs(1)
    query += (tokens[:, None] * halves + half_head) * half
    sub_keys += half_head.to(tl.int64) * num_sub_keys * half
    found += (tl.program_id(0).to(tl.int64) * BLOCK_N * halves + half_head) * ROOM
    rows = tl.arange(0, BLOCK_N)[:, None] * (halves * ROOM)
    left = _load_queries(query, tl.arange(0, BLOCK_D), half)
    highest = tl.full((BLOCK_N, BLOCK_S), _LOWEST_ORDERED + 1, tl.int32)  # what is no sub-key is below
    for start in range(0, num_sub_keys, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        highest = tl.maximum(highest, _ordered_scores(left, sub_keys, keys, num_sub_keys, half, BLOCK_D))
    bound = tl.min(tl.topk(highest, KNN), 1)[:, None]  # KNN scores reach it, each in another column
    columns = tl.arange(0, BLOCK_S)
    up_to = tl.where(columns[:, None] <= columns[None, :], 1.0, 0.0).to(left.dtype)  # a product with it counts
    count = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(0, num_sub_keys, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        ordered = _ordered_scores(left, sub_keys, keys, num_sub_keys, half, BLOCK_D)
        mark = tl.where(ordered >= bound, 1.0, 0.0)
        # From here the place of a marked one counts up, with _COUNT; no other has a place below ROOM.
        before = count + (_COUNT + ROOM) - mark * (ROOM + 1)
        place = add_product(mark.to(left.dtype), up_to, before).to(tl.int32, bitcast=True) - _COUNT_BITS
        tl.store(found + (rows + place), _packed(ordered, keys[None, :]), mask=place < ROOM)
        count += tl.sum(mark, 1)[:, None]
    rest = tl.arange(0, ROOM)[None, :]
    nothing = tl.full((BLOCK_N, ROOM), _LOWEST, tl.int64)
    tl.store(found + (rows + rest), nothing, mask=rest >= count)
    tl.store(counts + (places[:, None] * halves + half_head), count.to(tl.int32))


@triton.jit(do_not_specialize=["num_tokens", "part_size"])
def _best_sub_keys(  # type: ignore[no-untyped-def]
    query, sub_keys, found, counts, num_tokens, num_sub_keys, half, part_size, KNN: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, half of a head, part of the sub-keys) writes its KNN best, best first.

    With REDO only if `_candidates` counted more than ROOM for one of its tokens, or fewer than KNN, which would mean
    that it scored one way when it made the bound and another when it compared with it. A last block that is not full
    repeats the last token.
    """
    half_head, part = tl.program_id(1), tl.program_id(2)
    halves, parts = tl.num_programs(1), tl.num_programs(2)
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.minimum(places, num_tokens - 1)
    if REDO:
        count = tl.load(counts + tokens * halves + half_head)
        if (tl.max(count) <= ROOM) & (tl.min(count) >= KNN):
            return
    query += (tokens[:, None] * halves + half_head) * half
    sub_keys += half_head.to(tl.int64) * num_sub_keys * half
    best = tl.full((BLOCK_N, KNN), _LOWEST, tl.int64)
    last = tl.minimum((part + 1) * part_size, num_sub_keys)
    for start in range(part * part_size, last, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        scores = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
        for column in range(0, half, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            left = _load_queries(query, columns, half)
            scores = add_product(left, _load_sub_keys(sub_keys, keys, num_sub_keys, columns, half), scores)
        packed = tl.where((keys < num_sub_keys)[None, :], _packed(_ordered(scores), keys[None, :]), _LOWEST)
        # `best` rises and the block's best fall, so that the larger of each pair are the best of both.
        best = tl.bitonic_merge(tl.maximum(best, tl.topk(packed, KNN)), descending=False)
    best_first = KNN - 1 - tl.arange(0, KNN)
    found += ((places[:, None] * halves + half_head) * parts + part) * ROOM + best_first[None, :]
    tl.store(found, best)
    if REDO:  # the other half of the room
        tl.store(found + KNN, tl.full((BLOCK_N, KNN), _LOWEST, tl.int64))


@triton.jit(do_not_specialize=["num_rows"])
def _sort(found, best, num_rows, size, KNN: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (block of rows) writes the KNN best of the `size` numbers of each, best first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = (rows < num_rows)[:, None]
    places = tl.arange(0, PLACES)[None, :]
    numbers = tl.load(found + rows[:, None] * size + places, mask=is_row & (places < size), other=_LOWEST)
    tl.store(best + rows[:, None] * KNN + tl.arange(0, KNN)[None, :], tl.topk(numbers, KNN), mask=is_row)


@triton.jit
def _ranks(lanes, knn: tl.constexpr, HOOKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ranks (i, j) of the pair of each lane, and whether there is one: every pair with (i + 1)(j + 1) <= knn can win.

    Hook after hook: the pairs with m as their smaller rank, first (m, m), (m, m + 1), ..., then (m + 1, m), ...
    """
    smaller, place = tl.zeros_like(lanes), lanes
    arm = tl.full(lanes.shape, knn, tl.int32)  # pairs of its hook with i = m
    for hook in tl.static_range(HOOKS):
        size = 2 * (knn // (hook + 1) - hook) - 1
        is_past = (smaller == hook) & (place >= size)
        smaller = tl.where(is_past, hook + 1, smaller)
        place = tl.where(is_past, place - size, place)
        arm = tl.where(is_past, knn // (hook + 2) - hook - 1, arm)
    is_first = place < arm
    larger = smaller + tl.where(is_first, place, place - arm + 1)
    return tl.where(is_first, smaller, larger), tl.where(is_first, larger, smaller), smaller < HOOKS


@triton.jit(do_not_specialize=["num_tokens"])
def _best_pairs(  # type: ignore[no-untyped-def]
    found, scores, slots, num_tokens, num_sub_keys, knn: tl.constexpr, HOOKS: tl.constexpr,
    KNN: tl.constexpr, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head) writes scores and slots of the best pairs."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, heads = tl.program_id(1), tl.num_programs(1)
    rank1, rank2, is_pair = _ranks(tl.arange(0, PAIRS), knn, HOOKS)
    real = (tokens < num_tokens)[:, None] & is_pair[None, :]
    found += (tokens[:, None] * heads + head) * 2 * KNN
    one = tl.load(found + rank1[None, :], mask=real, other=0)
    two = tl.load(found + KNN + rank2[None, :], mask=real, other=0)
    # What is no packed score must not become a slot outside the table.
    index1 = tl.minimum(_index_of(one), num_sub_keys - 1)
    index2 = tl.minimum(_index_of(two), num_sub_keys - 1)
    packed = _packed(_ordered(_score_of(one) + _score_of(two)), index1 * num_sub_keys + index2)
    best = tl.topk(tl.where(real, packed, _LOWEST), KNN)
    places = (tokens[:, None] * heads + head) * knn + tl.arange(0, KNN)[None, :]
    wanted = (tokens < num_tokens)[:, None] & (tl.arange(0, KNN) < knn)[None, :]
    tl.store(scores + places, _score_of(best), mask=wanted)
    tl.store(slots + places, _index_of(best), mask=wanted)
