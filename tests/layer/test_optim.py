import copy
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import LambdaLR

import oracle
from optimizers import assert_same_bits, everything
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import _together
from pkmem.layer.values import ValueTable
from pkmem.ops.backends import backend_module
from pkmem.training.state import load_state, save_state

CONFIG = MemoryConfig(dim=8, num_sub_keys=8, heads=2, knn=3, query_dim=4, query_norm="layer")
ADAM = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def table_of(num_slots: int, width: int, dtype: torch.dtype = torch.float32, backend: str | None = None) -> ValueTable:
    table = ValueTable(num_slots, width).to(dtype)
    table.backend = backend
    return table


def read(*tables: ValueTable, seed: int) -> None:
    """One forward and backward pass over each table, of the same random reads by 5 tokens."""
    for table in tables:
        torch.manual_seed(seed)
        slots = torch.randint(len(table.weight), (5, 2, 3))
        weights, back = torch.rand(slots.shape), torch.randn(5, table.weight.shape[1])
        table(slots, weights.to(table.weight.dtype)).backward(back.to(table.weight.dtype))


def read_every_row(*tables: ValueTable, seed: int) -> None:
    """The same, each row read once by a token of its own."""
    for table in tables:
        torch.manual_seed(seed)
        slots = torch.randperm(len(table.weight))[:, None, None]
        weights, back = torch.rand(slots.shape), torch.randn(table.weight.shape)
        table(slots, weights.to(table.weight.dtype)).backward(back.to(table.weight.dtype))


# --- equal to Adam ----------------------------------------------------------------------------------------


def test_row_adam_is_sparse_adam_over_micro_batches_and_layers_that_share_a_table(backend) -> None:
    first = ProductKeyMemory(CONFIG)
    layers = nn.ModuleList([first, ProductKeyMemory(CONFIG, values=first.values)])
    for layer in layers:
        layer.backend = backend
    twin = copy.deepcopy(layers)  # with dense gradients
    ours = RowAdam(layers, **ADAM)
    theirs = torch.optim.SparseAdam([twin[0].values.weight], **ADAM)
    for _ in range(4):
        for _ in range(3):
            x = torch.randn(6, 8)
            for model in (layers, twin):
                (model[0](x) + model[1](x)).square().sum().backward()
        rows = torch.cat([slots.flatten() for slots, _, _ in first.values.log.entries]).unique()
        weight = twin[0].values.weight
        assert not weight.grad[~torch.isin(torch.arange(64), rows)].any()
        weight.grad = torch.sparse_coo_tensor(rows[None], weight.grad[rows], weight.shape, check_invariants=True)
        ours.step()
        theirs.step()
        theirs.zero_grad()
        assert first.values.weight.grad is None
        torch.testing.assert_close(first.values.weight, weight, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_slots=st.integers(1, 9), width=st.integers(1, 5), num_steps=st.integers(1, 3))
def test_row_adam_is_adam_written_as_loops_on_any_reads(backend, data, num_slots, width, num_steps) -> None:
    table = table_of(num_slots, width, torch.float64, backend)
    optimizer = RowAdam(table, **ADAM)
    values = oracle.fp64(table.weight)
    moments = np.zeros_like(values), np.zeros_like(values)
    for step in range(1, num_steps + 1):
        passes = []
        for _ in range(data.draw(st.integers(1, 3))):
            num_tokens, heads, knn = (data.draw(st.integers(0, 3)) for _ in range(3))
            slots = torch.randint(num_slots, (num_tokens, heads, knn))
            weights, back = torch.randn(slots.shape).double(), torch.randn(num_tokens, width).double()
            table(slots, weights).backward(back)
            passes.append((slots.flatten(1), weights.flatten(1), back))
        oracle.adam(values, *moments, oracle.row_gradients(passes), step=step, **ADAM)
        optimizer.step()
    np.testing.assert_allclose(oracle.fp64(table.weight), values, rtol=1e-9, atol=1e-9)


def test_rows_not_read_and_their_moments_stay_bitwise(backend) -> None:
    table = table_of(50, 8, backend=backend)
    optimizer = RowAdam(table, **ADAM)
    read(table, seed=0)
    optimizer.step()
    for seed in range(1, 4):
        before = everything(optimizer)
        read(table, seed=seed)
        untouched = torch.ones(50, dtype=torch.bool)
        untouched[table.log.entries[0][0]] = False
        optimizer.step()
        after = everything(optimizer)
        assert torch.equal(before[0][untouched], after[0][untouched])
        assert (before[0][~untouched] != after[0][~untouched]).any(1).all()
        for old, new in zip(before[2:], after[2:], strict=True):  # exp_avg and exp_avg_sq, after the step count
            assert torch.equal(old[untouched], new[untouched])
            assert (old[~untouched] != new[~untouched]).any(1).all()


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clipping_is_clip_grad_norm_over_all_tables_and_dense_adam(max_norm, backend) -> None:
    tables = [table_of(9, 4, torch.float64, backend), table_of(5, 7, torch.float64, backend)]
    twins = copy.deepcopy(tables)
    ours = RowAdam(tables, max_norm=max_norm, **(ADAM | {"eps": 1e-2}))  # with a tiny eps Adam hides the scale
    theirs = torch.optim.Adam([twin.weight for twin in twins], **(ADAM | {"eps": 1e-2}))
    for seed in range(3):
        read_every_row(*tables, *twins, seed=seed)
        norm = torch.nn.utils.clip_grad_norm_([twin.weight for twin in twins], max_norm)
        assert ours.grad_norm() == pytest.approx(norm.item(), rel=1e-12)
        assert 0.1 < norm < 1e3
        ours.step()
        theirs.step()
        theirs.zero_grad()
        for table, twin in zip(tables, twins, strict=True):
            torch.testing.assert_close(table.weight, twin.weight, rtol=1e-12, atol=1e-12)


def test_bias_correction_counts_the_steps_in_which_a_table_was_not_read(backend) -> None:
    table = table_of(1, 3, torch.float64, backend)
    optimizer = RowAdam(table, **ADAM)
    values = oracle.fp64(table.weight)
    optimizer.step()
    optimizer.step()
    read_every_row(table, seed=0)
    gradients = oracle.row_gradients(table.log.entries)
    oracle.adam(values, np.zeros_like(values), np.zeros_like(values), gradients, step=3, **ADAM)
    optimizer.step()
    np.testing.assert_allclose(oracle.fp64(table.weight), values, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_table_keeps_fp32_moments(dtype, backend) -> None:
    table = table_of(9, 4, dtype, backend)
    optimizer = RowAdam(table, **ADAM)
    read_every_row(table, seed=0)
    gradient = torch.zeros(9, 4)
    for slots, weights, back in table.log.entries:
        gradient[slots[:, 0]] = weights.float() * back.float()
    optimizer.step()
    state = optimizer.state[table.weight]
    torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(state["exp_avg_sq"], 0.02 * gradient.square(), rtol=1e-5, atol=1e-9)
    assert table.weight.dtype == dtype


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, max_norm, backend) -> None:
    tables = [table_of(9, 4, backend=backend), table_of(9, 4, backend=backend)]
    twins = copy.deepcopy(tables)
    ours, never_hit = RowAdam(tables, max_norm=max_norm), RowAdam(twins, max_norm=max_norm)
    for seed in range(3):
        read(*tables, *twins, seed=seed)
        ours.step()
        never_hit.step()
        before = everything(ours)
        read(tables[0], seed=9)
        tables[1](torch.tensor([[[2, 3]]]), torch.ones(1, 1, 2)).backward(torch.tensor([[0, bad, 0, 0]]))
        ours.step()
        assert_same_bits(everything(ours), before)
        assert ours.num_skipped == seed + 1
        assert tables[0].log.entries == tables[1].log.entries == []
    assert never_hit.num_skipped == 0
    assert_same_bits(everything(ours), everything(never_hit))  # later steps are not the wiser


# --- used as an optimizer ---------------------------------------------------------------------------------


def test_a_schedulers_lr_reaches_the_rows(backend) -> None:
    table = table_of(9, 4, torch.float64, backend)
    twin = copy.deepcopy(table)
    optimizers = RowAdam(table, **ADAM), torch.optim.Adam([twin.weight], **ADAM)
    schedules = [LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in optimizers]
    for seed in range(3):
        read_every_row(table, twin, seed=seed)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        optimizers[1].zero_grad()
    assert optimizers[0].param_groups[0]["lr"] == ADAM["lr"] / 8
    torch.testing.assert_close(table.weight, twin.weight, rtol=1e-12, atol=1e-12)


def test_a_closure_is_run_once_with_gradients_and_its_loss_returned() -> None:
    table = table_of(9, 4)
    optimizer = RowAdam(table)
    before, losses = table.weight.clone(), []

    def closure() -> float:
        optimizer.zero_grad()
        loss = table(torch.tensor([[[1]]]), torch.ones(1, 1, 1)).square().sum()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) == losses[0]
    assert len(losses) == 1
    assert (table.weight != before).any(1).tolist() == [False, True] + [False] * 7


def test_zero_grad_forgets_the_reads(backend) -> None:
    table = table_of(9, 4, backend=backend)
    optimizer = RowAdam(table)
    read(table, seed=0)
    assert optimizer.grad_norm() > 0
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0
    before = table.weight.clone()
    optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("through_files", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_training_resumes_bitwise(dtype, through_files, backend, tmp_path) -> None:
    table = table_of(9, 4, dtype, backend)
    optimizer = RowAdam(table, **ADAM)
    for seed in range(2):
        read(table, seed=seed)
        optimizer.step()
    resumed = copy.deepcopy(table)
    saved = copy.deepcopy(optimizer.state_dict())
    if through_files:
        save_state(tmp_path / "optimizer.json", saved)
        saved = load_state(tmp_path / "optimizer.json")
    other = RowAdam(resumed, lr=1.0)
    other.load_state_dict(saved)
    assert_same_bits(everything(optimizer), everything(other))
    for seed in range(2, 4):
        read(table, resumed, seed=seed)
        optimizer.step()
        other.step()
    assert_same_bits(everything(optimizer), everything(other))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {other.state[resumed.weight][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {wide}


def test_a_fresh_optimizers_state_can_be_loaded() -> None:
    tables = [table_of(9, 4), table_of(5, 4)]
    optimizer = RowAdam(tables)
    optimizer.load_state_dict(RowAdam(copy.deepcopy(tables), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(RowAdam(table_of(9, 4)).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0 but must be > 0"),
        ({"lr": float("nan")}, "lr is nan but must be > 0"),
        ({"betas": (1.0, 1.0)}, r"betas is \(1.0, 1.0\) but must be in \[0, 1\), or 1 for the second"),
        ({"betas": (0.9, 1.1)}, r"betas is \(0.9, 1.1\) but must be in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas is \(-0.1, 0.9\) but must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0 but must be > 0"),
        ({"max_norm": 0.0}, "max_norm is 0.0 but must be None or > 0"),
    ],
)
def test_a_number_outside_its_range_is_named(options, message) -> None:
    table = table_of(9, 4)
    with pytest.raises(ValueError, match=message):
        RowAdam(table, **options)
    assert table.log is None  # the table was left as it was


@pytest.mark.parametrize("tables", [nn.Linear(2, 2), [], [nn.Linear(2, 2)]])
def test_a_model_without_a_table_is_refused(tables) -> None:
    with pytest.raises(ValueError, match="no value table found: give RowAdam a ProductKeyMemory"):
        RowAdam(tables)


def test_a_table_named_twice_is_trained_once() -> None:
    memory = ProductKeyMemory(CONFIG)
    optimizer = RowAdam([memory, memory.values])
    assert [p is memory.values.weight for p in optimizer.param_groups[0]["params"]] == [True]


# --- the cost of a step -----------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import torch
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam

memory = ProductKeyMemory(MemoryConfig(dim=128, num_sub_keys=512, heads=2, knn=8, query_dim=32))
memory.backend = sys.argv[1]
optimizer = RowAdam(memory, max_norm=1.0)
x = torch.randn(64, 128)

def megabytes(line):
    status = Path("/proc/self/status").read_text()
    return int(status.split(line)[1].split()[0]) / 1024

def growth(step):
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS:")
    step()
    return megabytes("VmHWM:") - before

def rows():
    memory(x).square().sum().backward()
    optimizer.step()

rows()
state = optimizer.state[memory.values.weight]
state["exp_avg"].add_(0)  # in memory from here on, as after many steps
state["exp_avg_sq"].add_(0)
in_rows = growth(rows)
del optimizer
dense = growth(lambda: memory(x).square().sum().backward())
print(memory.values.weight.nbytes / 2**20, in_rows, dense)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_training_step_allocates_nothing_of_the_tables_size(backend) -> None:
    finished = subprocess.run([sys.executable, "-c", PEAK, backend], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    table, rows, dense = map(float, finished.stdout.split())
    assert table == 128
    assert rows < table / 16
    assert dense > 0.9 * table  # the measurement sees a tensor of the table's size where there is one


def test_one_dense_and_one_row_memory_train_side_by_side() -> None:
    dense, rows = ProductKeyMemory(CONFIG), ProductKeyMemory(dataclasses.replace(CONFIG, heads=1))
    optimizer = RowAdam(rows)
    x = torch.randn(5, 8)
    (dense(x) + rows(x)).sum().backward()
    assert dense.values.weight.grad.any()
    assert len(rows.values.log.entries) == 1
    assert optimizer.grad_norm() > 0


def test_row_adam_says_what_it_is() -> None:
    assert re.match(r"RowAdam \(\nParameter Group 0\n", repr(RowAdam(table_of(9, 4))))


def test_a_step_without_reads_on_a_device_whose_graphs_log_none_is_warned_of_once() -> None:
    with torch.device("meta"):
        memory = ProductKeyMemory(MemoryConfig(dim=4, num_sub_keys=3, heads=1, knn=2, query_dim=4))
    optimizer = RowAdam(memory)
    with pytest.warns(UserWarning, match="found no reads.*CUDA graph"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error


def test_the_scalars_of_tables_on_several_devices_meet_on_one() -> None:
    with FakeTensorMode():
        norms = [torch.zeros((), dtype=torch.float64, device=place) for place in ("cpu", "cuda:1", "cuda:0")]
        assert _together(norms).device == torch.device("cuda:1")
        assert _together(norms[:1]).device == torch.device("cpu")


@pytest.mark.parametrize("max_norm", [1e-3, 0.9, 1.0 + 1e-6, 1.1, 2.0, 1e3])
def test_rows_are_summed_for_the_norm_only_where_it_may_be_clipped(max_norm, backend, monkeypatch) -> None:
    """Halves of one vector, read by one row and by two: there the bound is the norm, but for a thousandth."""
    module, summed = backend_module(backend), []
    exact = module.row_gradient_norm
    monkeypatch.setattr(module, "row_gradient_norm", lambda reads: summed.append(1) or exact(reads))
    for slots, norm in (([[0, 0]], 1.0), ([[0, 1]], 0.5**0.5)):
        summed.clear()
        table = table_of(4, 2, backend=backend)
        optimizer, before = RowAdam([table], lr=1.0, betas=(0.0, 0.0), eps=1e3, max_norm=max_norm), table.weight.clone()
        table(torch.tensor([slots]), torch.full((1, 1, 2), 0.5)).backward(torch.tensor([[0.6, 0.8]]))
        optimizer.step()
        assert bool(summed) == (backend == "triton" or max_norm < 1.0011 * norm)
        gradient = torch.zeros(4, 2)
        gradient[slots[0]] = torch.tensor([0.6, 0.8]) * (1.0 if norm == 1.0 else 0.5)
        clipped = gradient * min(1.0, max_norm / (norm + 1e-6))
        torch.testing.assert_close(before - table.weight, clipped / (clipped.abs() + 1e3), rtol=1e-3, atol=1e-7)
