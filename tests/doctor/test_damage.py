"""For each of the eleven points, backends that are broken on purpose: a check of just that point finds each of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from pkmem.doctor import speed, waiting
from pkmem.doctor.checks import Case, Check, DoesNotApply, NotChecked
from pkmem.doctor.code import kernels
from pkmem.doctor.examination import CHECKS, findings_of
from pkmem.doctor.findings import Finding
from pkmem.doctor.sizes import INTERPRETED
from pkmem.layer.memory import ProductKeyMemory
from pkmem.ops import reference

CPU = torch.device("cpu")
Damage = Callable[..., Any]
DAMAGES: list[tuple[int, str, Damage]] = []  # point, function of the reference, what stands in its place


def damage(point: int, function: str) -> Callable[[Damage], Damage]:
    """What is called in place of a function of the backend: with the sound one, then its arguments."""

    def add(broken: Damage) -> Damage:
        DAMAGES.append((point, function, broken))
        return broken

    return add


def failures(point: int) -> list[Finding]:
    checks = tuple(check for check in CHECKS if check.point == point)
    findings = list(findings_of(checks, "reference", CPU, INTERPRETED, full=True))
    return [finding for finding in findings if finding.outcome == "failed"]


# --- 1: ties --------------------------------------------------------------------------------------------------


@damage(1, "product_key_topk")
def ties_go_by_higher_slot(sound, query, sub_keys, knn) -> Any:
    scores = all_scores(query, sub_keys).flip(-1)
    scores, places = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :knn].contiguous(), sub_keys.shape[2] ** 2 - 1 - places[..., :knn]


@damage(1, "product_key_topk")
def the_last_token_is_forgotten(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    if len(slots) > 1:
        slots[-1], scores[-1] = slots[-2], scores[-2]
    return scores, slots


@damage(1, "flat_topk")
def flat_ties_go_by_higher_slot(sound, query, keys, knn) -> Any:
    return keys.shape[1] - 1 - sound(query, keys.flip(1), knn)


@damage(1, "product_key_topk")
def strides_are_ignored(sound, query, sub_keys, knn) -> Any:
    return sound(torch.as_strided(query, query.shape, torch.empty(query.shape).stride()), sub_keys, knn)


def all_scores(query: Tensor, sub_keys: Tensor) -> Tensor:
    first, second = query.float().chunk(2, -1)
    scores1 = torch.einsum("nhd,hid->nhi", first, sub_keys[:, 0].float())
    scores2 = torch.einsum("nhd,hjd->nhj", second, sub_keys[:, 1].float())
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)


# --- 2: slots and scores --------------------------------------------------------------------------------------


@damage(2, "product_key_topk")
def a_slot_is_out_of_range(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    slots[-1:, :, -1:] = sub_keys.shape[2] ** 2
    return scores, slots


@damage(2, "product_key_topk")
def a_slot_comes_twice(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    slots[:1, :, 1:2] = slots[:1, :, :1]
    return scores, slots


@damage(2, "product_key_topk")
def scores_are_rounded_to_bf16(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    return scores.bfloat16().float(), slots


@damage(2, "product_key_topk")
def the_best_is_missed(sound, query, sub_keys, knn) -> Any:
    if knn == sub_keys.shape[2]:
        return sound(query, sub_keys, knn)
    return tuple(part[..., 1:] for part in sound(query, sub_keys, knn + 1))


# --- 3: crowds, zeros, NaN ------------------------------------------------------------------------------------


@damage(3, "product_key_topk")
def a_crowded_token_changes_its_neighbour(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    is_crowded = (scores[:-1] == scores[:-1, :, :1]).all(-1)
    slots[1:] = torch.where(is_crowded[..., None], slots[1:].flip(-1), slots[1:])
    return scores, slots


@damage(3, "product_key_topk")
def nan_reaches_the_neighbour(sound, query, sub_keys, knn) -> Any:
    scores, slots = sound(query, sub_keys, knn)
    return torch.cat((scores[:1], scores[1:] + 0 * scores[:-1])), slots


@damage(3, "product_key_topk")
def zeros_below_zero_come_last(sound, query, sub_keys, knn) -> Any:
    if sub_keys.shape[3] > 1:
        return sound(query, sub_keys, knn)
    first, second = query[..., :1] * sub_keys[:, 0, :, 0], query[..., 1:] * sub_keys[:, 1, :, 0]
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2).float()
    bits = scores.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).sort(dim=-1, descending=True, stable=True).indices[..., :knn]
    return scores.gather(-1, order), order


@damage(3, "weighted_sum")
def nan_reaches_all_sums(sound, values, slots, weights) -> Any:
    summed = sound(values, slots, weights)
    return summed + 0 * summed.sum()


@damage(3, "row_gradient_norm")
def the_norm_hides_infinity(sound, reads) -> Any:
    return sound(reads).nan_to_num(nan=0, posinf=1e30)


# --- 4 and 5: order and settings ------------------------------------------------------------------------------


@damage(4, "weighted_sum")
def sums_run_in_a_random_order(sound, values, slots, weights) -> Any:
    order = torch.randperm(slots.shape[1])
    return sound(values, slots[:, order], weights[:, order])


@damage(4, "adam_rows")
def a_step_is_rounded_by_chance(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    sound(values, first_moment, second_moment, reads, update, *rest)
    first_moment.mul_(1 + 2**-20 * torch.rand(()))


@damage(5, "product_key_topk")
def scores_obey_the_setting(sound, query, sub_keys, knn) -> Any:
    return sound(as_set(query), as_set(sub_keys), knn)


@damage(5, "product_key_topk_backward")
def gradients_obey_the_setting(sound, grad_scores, query, sub_keys, slots) -> Any:
    return sound(as_set(grad_scores), query, sub_keys, slots)


def as_set(factor: Tensor) -> Tensor:
    """Rounded to TF32, which keeps 10 bits behind the first, where the setting allows it."""
    if torch.get_float32_matmul_precision() == "highest" or factor.dtype != torch.float32:
        return factor
    return ((factor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


# --- 6: sums and gradients ------------------------------------------------------------------------------------


@damage(6, "weighted_sum")
def the_last_read_is_dropped(sound, values, slots, weights) -> Any:
    return sound(values, slots[:, :-1], weights[:, :-1])


@damage(6, "weighted_sum")
def a_width_is_cut_to_a_multiple_of_16(sound, values, slots, weights) -> Any:
    summed = sound(values, slots, weights)
    summed[:, summed.shape[1] // 16 * 16 :] = 0
    return summed


@damage(6, "weighted_sum")
def sums_are_kept_in_bf16(sound, values, slots, weights) -> Any:
    parts = [sound(values, part, weight) for part, weight in zip(slots.split(2, 1), weights.split(2, 1), strict=True)]
    return sum(part.bfloat16() for part in parts).to(values.dtype) if slots.shape[1] else sound(values, slots, weights)


@damage(6, "row_products")
def inner_products_miss_the_last_column(sound, table, slots, x) -> Any:
    return sound(table, slots, torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), 1))


@damage(6, "weighted_sum_grad_values")
def reads_past_512_are_dropped(sound, reads, num_rows) -> Any:
    counts = reads.offsets.diff()
    place = torch.arange(len(reads.tokens)) - reads.offsets[:-1].repeat_interleave(counts)
    return sound(changed(reads, weights=torch.where(place < 512, reads.weights, 0)), num_rows)


@damage(6, "product_key_topk_backward")
def a_neighbour_is_dropped(sound, grad_scores, query, sub_keys, slots) -> Any:
    grad_scores = grad_scores.clone()
    grad_scores[..., -1:] = 0
    return sound(grad_scores, query, sub_keys, slots)


@damage(6, "gradient_is_finite")
def a_large_gradient_is_called_infinite(sound, reads) -> Any:
    return sound(reads) & (reads.grad_output.abs() < 1e6).all()


@damage(6, "row_gradient_norm_bound")
def a_bound_forgets_that_reads_add_up(sound, reads) -> Any:
    return sound(reads) / max(1, reads.offsets.diff().max().item()) ** 0.5


def changed(reads: Any, **parts: Tensor) -> Any:
    return type(reads)(**{name: parts.get(name, getattr(reads, name)) for name in reads.__dataclass_fields__})


# --- 7: RowAdam -----------------------------------------------------------------------------------------------


@damage(7, "adam_rows")
def all_rows_are_touched(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    sound(values, first_moment, second_moment, reads, update, *rest)
    second_moment[-1].mul_(0.5)


@damage(7, "adam_rows")
def values_are_rounded_to_nearest(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    wide = values.float()
    sound(wide, first_moment, second_moment, reads, update, *rest)
    values.copy_(wide)


@damage(7, "adam_rows")
def the_seed_is_forgotten(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    sound(values, first_moment, second_moment, reads, update._replace(seed=0), *rest)


@damage(7, "adam_rows")
def a_scale_of_nan_is_one(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    scale = torch.as_tensor(update.scale, dtype=torch.float64)
    sound(values, first_moment, second_moment, reads, update._replace(scale=scale.nan_to_num(nan=1.0)), *rest)


@damage(7, "adam_rows")
def the_bias_is_never_corrected(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    sound(values, first_moment, second_moment, reads, update._replace(step=1000), *rest)


@damage(7, "adam_rows")
def squares_of_a_row_are_summed(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    if second_moment.dim() == 1:
        rest = (values.shape[1] * reference.row_mean_squares(reads),)
    sound(values, first_moment, second_moment, reads, update, *rest)


@damage(7, "row_mean_squares")
def squares_miss_the_last_column(sound, reads) -> Any:
    return sound(changed(reads, grad_output=reads.grad_output[:, :-1]))


# --- 8: tables past 2 ** 31 elements --------------------------------------------------------------------------


@damage(8, "weighted_sum")
def offsets_of_sums_wrap(sound, values, slots, weights) -> Any:
    return sound(values, wrapped(values, slots), weights)


@damage(8, "row_products")
def offsets_of_products_wrap(sound, table, slots, x) -> Any:
    return sound(table, wrapped(table, slots), x)


@damage(8, "adam_rows")
def offsets_of_an_update_wrap(sound, values, first_moment, second_moment, reads, update, *rest) -> Any:
    sound(values, first_moment, second_moment, changed(reads, rows=wrapped(values, reads.rows)), update, *rest)


def wrapped(table: Tensor, rows: Tensor) -> Tensor:
    """The rows where 32 bits of an offset lead."""
    return rows * table.shape[1] % (1 << 31) // table.shape[1]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: f"{damage[0]}: {damage[2].__name__}")
def test_a_damage_is_found(damage, monkeypatch) -> None:
    point, name, broken = damage
    sound = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *arguments: broken(sound, *arguments))
    found = [finding.note for finding in failures(point)]
    assert [note for note in found if not re.match(r"\w+Error: ", note)]  # a wrong result, not one that breaks off


@pytest.mark.parametrize("point", sorted({point for point, _, _ in DAMAGES}))
def test_without_damage_none_is_found(point) -> None:
    assert failures(point) == []


# --- 9: waiting, graphs, compiled code; an .item() inside a kernel's function is in test_examination.py ------------


def outcome(check: Check, backend: str = "cpu") -> Finding:
    (finding,) = findings_of((replace(check, dtypes=("fp32",)),), backend, CPU, INTERPRETED, full=True)
    return finding


needs_numba = pytest.mark.skipif(not find_spec("numba"), reason="numba is not installed")


@needs_numba
@pytest.mark.parametrize("is_stale", [False, True])
def test_a_graph_that_replays_old_inputs_is_found(is_stale, monkeypatch) -> None:
    def captured(call: Callable[[], Any], is_warm: bool, device: torch.device) -> Callable[[], Any]:
        results = call()
        return (lambda: results) if is_stale and not is_warm else call

    monkeypatch.setattr(waiting, "_captured", captured)
    found = outcome(waiting.replays)
    assert found.outcome == ("failed" if is_stale else "passed"), found
    assert ("of a cold capture replayed" in found.note) == is_stale


@needs_numba
@pytest.mark.parametrize("damage", [None, "logs nothing", "logs twice", "computes something else"])
def test_compiled_code_that_logs_or_computes_wrongly_is_found(damage, monkeypatch) -> None:
    def compiled(memory: ProductKeyMemory, mode: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            summed = memory(x)
            if damage == "logs nothing":
                return summed.detach().requires_grad_()
            if damage == "logs twice":
                x = torch.cat((x, x))
                return memory(x)[:7] + memory(x)[7:] - summed.detach()
            return summed + (damage == "computes something else")

        return run

    monkeypatch.setattr(waiting, "_compiled", compiled)
    found = outcome(waiting.compiled)
    assert found.outcome == ("failed" if damage else "passed"), found
    assert ("in the log" in found.note) == str(damage).startswith("logs")


def test_a_reference_may_wait_and_a_cpu_has_no_graphs() -> None:
    assert outcome(waiting.waits, "reference").outcome == "does not apply"
    assert outcome(waiting.replays, "reference").outcome == "does not apply"
    assert outcome(waiting.compiled, "reference").outcome == "does not apply"


# --- 10: what was compiled ----------------------------------------------------------------------------------------


def on_a_gpu(backend: str) -> Case:
    return Case(backend, torch.device("cuda"), torch.float32, INTERPRETED)


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"spills": 17}, "spills 17"),
        ({"shared_bytes": 200 << 10}, "shared memory"),
        ({"has_tf32": True}, "TF32"),
        ({"has_atomics": True}, "atomics"),
    ],
)
def test_compiled_code_that_breaks_a_promise_is_found(changed, complaint, monkeypatch) -> None:
    from pkmem.ops import triton
    from pkmem.ops.triton import code, device

    sound = code.Facts(name="_sort", shared_bytes=1024, registers=60, spills=0, has_tf32=False, has_atomics=False)
    facts = {"good": sound, "other": replace(sound, **changed)}
    monkeypatch.setattr(triton, "compiled_kernels", lambda: {name: name for name in facts})
    monkeypatch.setattr(code, "facts_of", facts.get)
    monkeypatch.setattr(device, "shared_bytes", lambda _: 99 << 10)
    if complaint is None:
        assert kernels.examine(on_a_gpu("triton")) == "2 kernels"
        facts["other"] = replace(sound, spills=3)  # told of, but nothing is wrong with it
        assert kernels.examine(on_a_gpu("triton")) == "2 kernels; other spills 3 registers"
    else:
        with pytest.raises(AssertionError, match=f"1 of 2 kernels: other .*{complaint}"):
            kernels.examine(on_a_gpu("triton"))


@pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")
def test_code_that_nobody_compiled_is_not_checked(monkeypatch) -> None:
    from pkmem.ops import triton

    monkeypatch.setattr(triton, "compiled_kernels", dict)
    with pytest.raises(NotChecked):
        kernels.examine(on_a_gpu("triton"))
    with pytest.raises(DoesNotApply):
        kernels.examine(on_a_gpu("reference"))
    assert outcome(kernels, "triton").outcome == "does not apply"


# --- 11: time -----------------------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("slow", ["product_key_topk", "adam_rows", None])
def test_a_backend_that_sleeps_loses_the_race(slow, monkeypatch) -> None:
    """And wins it if the reference sleeps: by margins that no other work on the machine makes up for."""
    from pkmem.ops import cpu

    module, name = (cpu, slow) if slow else (reference, "product_key_topk")
    sound = getattr(module, name)

    def sleeping(*arguments: Any) -> Any:
        time.sleep(0.5)
        return sound(*arguments)

    monkeypatch.setattr(module, name, sleeping)
    found = outcome(speed.race)
    assert found.outcome == ("failed" if slow else "passed"), found
    assert "reading takes" in found.note
    assert "a training step takes" in found.note


def test_nobody_races_with_itself_or_in_the_interpreter() -> None:
    assert outcome(speed.race, "reference").outcome == "does not apply"
    assert outcome(speed.race, "triton").outcome == "does not apply"


def test_turns_alternate_and_the_median_counts(monkeypatch) -> None:
    order: list[str] = []
    clock = iter([1.0, 1.0, 2.0, 1.0, 4.0, 2.0, 9.0, 1.0])  # how long a call takes: two to see how many fit, then turns
    monkeypatch.setattr(speed, "_seconds", lambda call, calls, device: (call(), next(clock))[1])
    ratio = speed.median_ratio(lambda: order.append("a"), lambda: order.append("b"), 3, CPU)
    assert "".join(order) == "ab" + "ab" + "ab" + "ba" + "ab"
    assert ratio == 2.0  # of 2, a half and 9
