"""Tables whose columns several processes share: the same numbers as on one process, whatever the batches."""

import functools

import pytest
import torch

import sharded
from pkmem import RowAdam
from processes import together


@functools.cache
def results(kind: str, dtype: torch.dtype, shape: tuple[int, int], idle: bool = False, clips: bool = False):
    """One process with all tokens; several with their own."""
    world = shape[0] * shape[1]
    return (
        sharded.whole(kind, dtype, world, idle, clips),
        together(world, sharded.sharded, kind, dtype, shape, idle, clips),
    )


@pytest.mark.case(
    "Several devices",
    "split a table by columns over processes: `pkmem.shard_values(model, mesh)`",
    "works: outputs, table and moments have the bits of one process",
    "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_columns", [2, 4])
def test_columns_give_the_bits_of_one_process(num_columns, dtype) -> None:
    one, many = results("values", dtype, (1, num_columns))
    for rank, ours in enumerate(many):
        assert ours["held"] == (sharded.NUM_SLOTS, sharded.WIDTH // num_columns)
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[name], one[name]), name
        for (out, grad), (outs, grads) in zip(ours["outs"], one["outs"], strict=True):
            assert torch.equal(out, outs[rank])
            # One process's loss is the mean of all: d(weights) of each is its own loss's.
            scale = grads[rank].abs().max().item()
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * scale
            torch.testing.assert_close(grad, num_columns * grads[rank], rtol=0, atol=num_columns * tolerance)


@pytest.mark.case(
    "Several devices",
    "batches of other sizes on every process, one of them without a token",
    "works: rows that nobody read stay as they are, bit for bit",
    "",
)
@pytest.mark.parametrize("kind", ["values", "neurons"])
@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 3)], ids=str)
def test_replicas_and_a_process_without_tokens_give_the_numbers_of_one(shape, kind) -> None:
    one, many = results(kind, torch.float64, shape, idle=True)
    untouched = slice(sharded.NUM_SLOTS // 2, None)
    first = sharded.table_of(kind, torch.float64).weight
    for rank, ours in enumerate(many):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[name], one[name], rtol=0, atol=1e-13)
            assert torch.equal(ours[name], many[0][name]), name
        assert torch.equal(ours["weight"][untouched], first[untouched])
        assert not ours["exp_avg"][untouched].any()
        for (out, _), (outs, _) in zip(ours["outs"], one["outs"], strict=True):
            torch.testing.assert_close(out, outs[rank], rtol=0, atol=1e-13)


@pytest.mark.case(
    "Several devices",
    'one second moment a row, `RowAdam(second_moment="row")`, for a table that is split by columns',
    "works: the numbers of one process to 1e-13 in fp64",
    "",
)
@pytest.mark.parametrize("has_first", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)], ids=str)
def test_second_moments_of_rows_are_of_all_columns(shape, has_first) -> None:
    one = sharded.lean_whole(shape[0] * shape[1], has_first)
    for ours in together(shape[0] * shape[1], sharded.lean_sharded, shape, has_first):
        converted, mean = ours.pop("converted")
        torch.testing.assert_close(converted, mean, rtol=1e-12, atol=0)
        assert set(ours) == set(one)
        assert ("exp_avg" in ours) == has_first
        for name, tensor in one.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-13)


def test_the_clipping_norm_is_of_all_columns_and_replicas() -> None:
    one, many = results("values", torch.float64, (2, 2), clips=True)
    free, _ = results("values", torch.float64, (2, 2), idle=True)
    assert not torch.allclose(free["exp_avg"], one["exp_avg"], rtol=1e-3)
    for ours in many:
        torch.testing.assert_close(ours["exp_avg"], one["exp_avg"], rtol=0, atol=1e-14)


@pytest.mark.case(
    "Several devices",
    "`DistributedDataParallel` around a model with sharded tables, padding, batch norm, gradient accumulation",
    "works: equals one process with all tokens to 1e-12 in fp64",
    "",
)
@pytest.mark.parametrize(
    ("experts", "real", "shape"), [(False, True, (1, 2)), (True, False, (2, 2)), (False, False, (1, 4))], ids=str
)
@pytest.mark.parametrize("undrawn", [True])
def test_models_with_shared_tables_batch_norm_and_micro_batches_train_as_on_one_process(
    experts, real, shape, undrawn
) -> None:
    world = shape[0] * shape[1]
    one = sharded.whole_model(experts, world, real)
    for ours in together(world, sharded.sharded_model, experts, shape, real, undrawn):
        assert ours.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(
                ours[name], one[name], rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.case(
    "Several devices",
    "load a whole state dict, copy, assign or draw anew a model with sharded tables",
    "works: each process takes its columns",
    "",
)
@pytest.mark.case(
    "Several devices",
    "pickle a model with sharded tables, or `save_pretrained` it on one process",
    "refused: the error names torch.distributed.checkpoint and `pkmem export`",
    "",
)
@pytest.mark.case(
    "Several devices",
    "`DistributedDataParallel` around a wrapper of the model that `shard_values` was given",
    "refused: RuntimeError says what to give it; it would have copied the first process's columns to all",
    "",
)
@pytest.mark.case(
    "Several devices",
    "`fully_shard` without `ignored_params`, or another weight in place of a sharded one",
    "refused: RuntimeError names `ignored_params`",
    "",
)
@pytest.mark.case(
    "Several devices",
    "train replicas of a sharded table without a `RowAdam`",
    "refused: RuntimeError; nothing would exchange their gradients",
    "",
)
def test_everyday_use() -> None:
    for ours in together(4, sharded.everyday, (2, 2)):
        assert all(ours["held"].values()), ours["held"]
        errors = ours["errors"]
        assert "torch.distributed.checkpoint" in errors["pickle"]
        assert "call shard_values once" in errors["twice"]
        assert "no table found" in errors["no table"]
        assert "make a pkmem.RowAdam" in errors["no replicas' gradient"]
        assert "ignored_params=" in errors["another weight"]
        assert "pkmem export" in errors["saved by one process"]
        assert "the very module that shard_values was given" in errors["wrapped around"]


def test_what_cannot_be_sharded_is_refused() -> None:
    for uneven, trained, mesh in together(2, sharded.refused, 5):
        assert "2 processes cannot share 5 columns evenly" in uneven
        assert "such as 1" in uneven
        assert "make the RowAdam after it" in trained
        assert "('tensor',)" in mesh
        assert "('replicate', 'columns')" in mesh


@pytest.mark.case(
    "Several devices",
    "`clip_grad_norm_` over the parameters of a model with sharded tables",
    "works: the norm is of all columns, the same on every process",
    "",
)
def test_the_norm_that_others_clip_by_is_of_the_whole_table() -> None:
    model = sharded.model_of(False)
    optimizer = RowAdam(model)
    given = [sharded.batch(0, rank, True)[0] for rank in range(4)]
    (sharded.losses_of(model, torch.cat(given), None) / 4).backward()
    for first, second, third in together(4, sharded.clipped, (2, 2)):
        assert first == pytest.approx(optimizer.grad_norm(), rel=1e-12)
        assert second == pytest.approx(first, rel=1e-12)
        assert third == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.case(
    "Several devices",
    "a compiled model under `DistributedDataParallel`, without `shard_values`",
    "refused: RuntimeError names `shard_values`",
    "",
)
def test_whole_tables_of_several_processes_are_not_trained_apart_by_compiled_code() -> None:
    assert all("would drift apart: call pkmem.shard_values" in said for said in together(2, sharded.compiled_apart))


@pytest.mark.slow
@pytest.mark.case(
    "Several devices",
    "`torch.compile` of a model with sharded tables",
    "works: compiles the parts around each table; `fullgraph=True` is refused by torch",
    "",
)
def test_what_is_around_a_sharded_table_is_compiled() -> None:
    for ours, theirs in zip(together(2, sharded.compiled, "compiled"), together(2, sharded.compiled, ""), strict=True):
        for out, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
