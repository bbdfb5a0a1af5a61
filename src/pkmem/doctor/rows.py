"""Checks of RowAdam: point 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pkmem.doctor import truth
from pkmem.doctor.checks import ROUNDING, Case, assert_same, assert_within, check
from pkmem.doctor.tables import gradient_of, many_passes, sorted_reads
from pkmem.layer.optim import RowAdam
from pkmem.layer.values import ValueTable
from pkmem.ops.arguments import AdamStep

_ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "step": 3}
_ROWS, _SCALE = 40, 0.5


@check(7, "updates, with moments in fp32 and in bf16")
def updates(case: Case) -> None:
    """Values and moments of all rows, some read very often, some not at all."""
    for moments in (torch.float32, torch.bfloat16):
        for width in {37, case.sizes.step_width}:
            passes, tables = many_passes(case, width), _tables(case, width, moments)
            there = [case.there(table) for table in tables]
            update = AdamStep(**_ADAM, scale=_SCALE, seed=5)
            case.module.adam_rows(there[0], there[1], there[2], sorted_reads(case, passes, _ROWS), update)
            assert_updated(f"width {width}, moments {moments},", there, tables, passes, truth.Adam(**_ADAM), _SCALE)


@check(7, "updates with one second moment a row, without a first moment, and with the sum of squares")
def updates_with_less_state(case: Case) -> None:
    """In fp32, of all rows."""
    for has_first, is_by_row, beta2 in (
        (True, True, 0.98),
        (False, True, 0.98),
        (False, False, 0.98),
        (False, True, 1.0),
    ):
        for width in {37, case.sizes.step_width}:
            passes, (values, first, second) = many_passes(case, width), _tables(case, width, torch.float32)
            tables = [values, first if has_first else None, second[:, 0].clone() if is_by_row else second]
            there = [None if table is None else case.there(table) for table in tables]
            adam = {**_ADAM, "betas": (0.9 if has_first else 0.0, beta2)}
            reads = sorted_reads(case, passes, _ROWS)
            for squares in (None, case.module.row_mean_squares(reads)) if is_by_row else (None,):
                after = [None if table is None else table.clone() for table in there]
                assert after[0] is not None
                assert after[2] is not None
                case.module.adam_rows(
                    after[0], after[1], after[2], reads, AdamStep(**adam, scale=_SCALE, seed=5), squares
                )
                what = (
                    f"width {width}, {'first moments' if has_first else 'none'}, {'rows' if is_by_row else 'elements'},"
                )
                assert_updated(what, after, tables, passes, truth.Adam(**adam), _SCALE)


@check(7, "an update of a table in fp64, which no kernel takes", ("",))
def updates_in_fp64(case: Case) -> None:
    """With moments in fp64."""
    wide = replace(case, dtype=torch.float64)
    passes, tables = many_passes(wide, 5), _tables(wide, 5, torch.float64)
    there = [case.there(table) for table in tables]
    case.module.adam_rows(
        there[0], there[1], there[2], sorted_reads(wide, passes, _ROWS), AdamStep(**_ADAM, scale=_SCALE)
    )
    assert_updated("in fp64", there, tables, passes, truth.Adam(**_ADAM), _SCALE)


@check(7, "bf16 values and moments rounded by seed, step, row and column alone", ("bf16",))
def rounding(case: Case) -> None:
    """Of a first step without memory, every number is known but for a last bit of fp32."""
    num_rows, width = 70_000, 33
    rows = torch.cat((torch.arange(4), case.below(num_rows - 8, 12) + 4, torch.arange(num_rows - 4, num_rows))).unique()
    values, back = case.normal(len(rows), width), case.normal(len(rows), width)
    weights = 1 + torch.rand(len(rows), 1, generator=case.random, device="cpu")
    back[back == 0] = 1
    adam: dict[str, Any] = {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-30}
    gradient = (weights * back.float()).double()
    expected = values.double() - adam["lr"] * gradient.sign(), gradient, gradient.float().square().double()
    for seed, step, first in ((5, 1, 0), ((7 << 32) + 5, 1, 64), (5, 1001, 1)):
        tables = [torch.zeros(num_rows, width, dtype=torch.bfloat16, device=case.device) for _ in range(3)]
        there = case.there(rows)
        tables[0][there] = case.there(values)
        reads = sorted_reads(case, [(rows[:, None], weights, back)], num_rows)
        update = AdamStep(**adam, step=step, scale=1.0, seed=seed, first_column=first)
        case.module.adam_rows(tables[0], tables[1], tables[2], reads, update)
        for name, table, numbers in zip(("values", "first moments", "second moments"), tables, expected, strict=True):
            known = truth.rounded_by_key(numbers, rows, seed, step, first, high=name != "values")
            share = (table[there].cpu() == known).double().mean().item()
            assert share >= 0.999, (
                f"{name}: {share:.1%} are rounded as by the key, seed {seed}, step {step}, column {first}"
            )
            assert_within(name, table[there], known.double(), 2**-6 * known.double().abs())


@check(7, "a scale that is not finite, numbers as tensors, no reads")
def scales(case: Case) -> None:
    """What may be a number may be a tensor on the device."""
    tables, reads = _tables(case, 37, torch.float32), sorted_reads(case, many_passes(case, 37), _ROWS)

    def after(reads: Any, **numbers: Any) -> list[Tensor]:
        there = [case.there(table) for table in tables]
        update = AdamStep(**{**_ADAM, "scale": _SCALE, **numbers})
        case.module.adam_rows(there[0], there[1], there[2], reads, update)
        return there

    in_tensors = {
        name: torch.tensor(number, dtype=torch.float64, device=case.device)
        for name, number in (("lr", _ADAM["lr"]), ("step", _ADAM["step"]), ("scale", _SCALE))
    }
    for one, other in zip(after(reads, **in_tensors), after(reads), strict=True):
        assert_same("with numbers as tensors", one, other.cpu())
    for scale in (torch.nan, torch.inf, torch.tensor(torch.nan, device=case.device)):
        for one, before in zip(after(reads, scale=scale), tables, strict=True):
            assert_same(f"with a scale of {float(scale)}", one, before)
    no_reads = sorted_reads(
        case, [(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), case.normal(0, 37))], _ROWS
    )
    for one, before in zip(after(no_reads), tables, strict=True):
        assert_same("without reads", one, before)


@check(7, "steps of RowAdam, one of them with a gradient that is not finite")
def steps_of_row_adam(case: Case) -> None:
    """With a clipped norm and without."""
    for max_norm in (None, 1.0):
        table = ValueTable(_ROWS, 5).to(case.device, case.dtype)
        table.backend = case.backend
        optimizer = RowAdam(table, lr=0.01, max_norm=max_norm)
        moments = [torch.zeros(_ROWS, 5) for _ in range(2)]
        for number, factor in enumerate((1.0, torch.nan, 1.0)):
            slots, weights, back = case.below(30, 6, 4), case.normal(6, 4), factor * case.normal(6, 5)
            before = [table.weight.detach().cpu().clone(), *moments]
            summed = table(case.there(slots)[:, None], case.there(weights)[:, None])
            summed.backward(case.there(back))
            optimizer.step()
            state = optimizer.state[table.weight]
            assert optimizer.num_skipped == (number > 0), f"{optimizer.num_skipped} steps count as left out"
            step = (1, 1, 2)[number]
            assert state["step"] == step, f"{state['step']} steps are counted, not {step}"
            after = [table.weight.detach().cpu(), state["exp_avg"].cpu(), state["exp_avg_sq"].cpu()]
            if factor == 1:
                passes = [(slots, weights, back)]
                norm = torch.linalg.vector_norm(gradient_of(passes, _ROWS)[0]).item()
                clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
                adam = truth.Adam(0.01, (0.9, 0.98), 1e-8, step)
                assert_updated(f"step {step}, max_norm {max_norm},", after, before, passes, adam, clip)
            else:
                for one, other in zip(after, before, strict=True):
                    assert_same("after a gradient of NaN", one, other)
            moments = [table.clone() for table in after[1:]]


def assert_updated(
    what: str,
    after: Sequence[Tensor | None],
    before: Sequence[Tensor | None],
    passes: list[tuple[Tensor, Tensor, Tensor]],
    adam: truth.Adam,
    scale: float,
) -> None:
    """Values and moments became what Adam makes of them, as exactly as sums in fp32 allow; rows not read keep their bits."""
    values = before[0]
    assert values is not None
    num_rows = len(values)
    gradient, magnitudes = (scale * part for part in gradient_of(passes, num_rows))
    is_read = torch.zeros(num_rows, dtype=torch.bool)
    for slots, _, _ in passes:
        is_read[slots.flatten()] = True
    per_term = ROUNDING * (2.0**-29 if values.dtype == torch.float64 else 1)
    # Sums of a row's squares are most wrong where all of it is too large, or too small.
    offs = [side * per_term * magnitudes for side in (1, -1)]
    offs += [off * gradient.sign() for off in offs]
    expected = adam.after(list(before), gradient, is_read)
    others = [adam.after(list(before), gradient + off, is_read) for off in offs]
    names = ("values", "first moments", "second moments")
    for place, (name, one, other, wanted) in enumerate(zip(names, before, after, expected, strict=True)):
        if one is None or other is None or wanted is None:
            assert one is other is wanted is None, f"{what} {name} are missing"
            continue
        limits = torch.finfo(one.dtype)
        moved = [(moved_to - wanted).abs() for off in others if (moved_to := off[place]) is not None]
        largest = wanted.abs() + adam.lr
        tolerance = torch.stack(moved).amax(0) + (per_term + limits.eps) * largest + limits.smallest_normal
        assert other.dtype == one.dtype, f"{what} {name} became {other.dtype}"
        assert_within(f"{what} {name}", other, wanted, tolerance)
        assert_same(f"{what} {name} of rows not read", other.cpu()[~is_read], one[~is_read])


def _tables(case: Case, width: int, moments: torch.dtype) -> list[Tensor]:
    """Values, and moments that are not small."""
    first, second = (torch.rand(_ROWS, width, generator=case.random, device="cpu") for _ in range(2))
    return [case.normal(_ROWS, width), (first - 0.5).to(moments), (second + 0.1).to(moments)]


CHECKS = (updates, updates_with_less_state, updates_in_fp64, rounding, scales, steps_of_row_adam)
