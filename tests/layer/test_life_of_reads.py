"""Who owns the reads of a table: a living RowAdam, and nobody else."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import processes
from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import dense_parameters
from pkmem.layer.values import ValueTable, tables_in

CONFIG = MemoryConfig(dim=8, num_sub_keys=8, heads=2, knn=3, query_dim=4, query_norm="layer")
KIND = "Life of the reading log"
ADAM = {"lr": 1e-2, "betas": (0.9, 0.98)}


def make() -> ProductKeyMemory:
    return ProductKeyMemory(CONFIG).double()


def backward(*models: nn.Module, seed: int = 0) -> None:
    for model in models:
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()


def assert_trains_with(optimizer: torch.optim.Optimizer, memory: ProductKeyMemory) -> None:
    """A step of a torch optimizer moves the values, by a dense gradient that an untouched memory has as well."""
    twin = ProductKeyMemory(CONFIG).double()
    twin.load_state_dict(memory.state_dict())
    memory.zero_grad()
    backward(memory, twin)
    assert type(memory.values.weight.grad) is Tensor
    assert torch.equal(memory.values.weight.grad, twin.values.weight.grad)
    before = memory.values.weight.clone()
    optimizer.step()
    assert not torch.equal(memory.values.weight, before)


# --- what forgets the reads -------------------------------------------------------------------------------


def by_module(model: nn.Module, _: RowAdam) -> RowAdam | None:
    model.zero_grad()
    return None


def by_module_in_place(model: nn.Module, _: RowAdam) -> RowAdam | None:
    model.zero_grad(set_to_none=False)
    return None


def by_optimizer(_: nn.Module, optimizer: RowAdam) -> RowAdam | None:
    optimizer.zero_grad()
    return None


def by_another_optimizer(model: nn.Module, _: RowAdam) -> RowAdam | None:
    torch.optim.AdamW(model.parameters()).zero_grad()
    return None


def by_a_union(model: nn.Module, optimizer: RowAdam) -> RowAdam | None:
    CombinedOptimizer(torch.optim.AdamW(dense_parameters(model)), optimizer).zero_grad()
    return None


def by_a_new_one(model: nn.Module, _: RowAdam) -> RowAdam | None:
    return RowAdam(model, **ADAM)


@pytest.mark.case(
    KIND, "`module.zero_grad()` of the model, which Trainer calls, between backward and step", "works", ""
)
@pytest.mark.case(KIND, "a new `RowAdam` after a backward pass, then `step()`: nothing left to train on", "works", "")
@pytest.mark.parametrize(
    "forget", [by_module, by_module_in_place, by_optimizer, by_another_optimizer, by_a_union, by_a_new_one]
)
def test_forgotten_reads_train_nothing(forget) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make()).double()
    optimizer = RowAdam(model, **ADAM)
    backward(model)
    assert optimizer.grad_norm() > 0
    optimizer = forget(model, optimizer) or optimizer
    assert optimizer.grad_norm() == 0
    before = model[1].values.weight.clone()
    optimizer.step()
    assert torch.equal(model[1].values.weight, before)
    backward(model)
    optimizer.step()  # and what is read from now on trains
    assert not torch.equal(model[1].values.weight, before)


@pytest.mark.case(KIND, "a forward pass, then a new `RowAdam`, then backward and its step", "works", "")
def test_a_pass_begun_before_the_optimizer_was_made_trains_by_it() -> None:
    memory = make()
    twin = copy.deepcopy(memory)
    x = torch.randn(5, 8, dtype=torch.float64)
    first = RowAdam(memory, **ADAM)
    loss = memory(x).square().sum()
    second = RowAdam(memory, **ADAM)
    del first
    loss.backward()
    second.step()
    other = RowAdam(twin, **ADAM)
    twin(x).square().sum().backward()
    other.step()
    assert torch.equal(memory.values.weight, twin.values.weight)


# --- copies, reloads and orphans --------------------------------------------------------------------------


def deepcopied(memory: nn.Module) -> nn.Module:
    return copy.deepcopy(memory)


def pickled(memory: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(memory))


def saved_whole(memory: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(memory: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(memory).module


@pytest.mark.case(
    KIND,
    "a deep copy (`copy.deepcopy`, EMA, `AveragedModel`) of a memory that RowAdam trains, trained with AdamW",
    "works",
    "",
)
@pytest.mark.case(
    KIND, "a memory that RowAdam trains, pickled or saved whole and loaded, trained with AdamW", "works", ""
)
@pytest.mark.parametrize("duplicate", [deepcopied, pickled, saved_whole, averaged])
def test_a_copy_trains_with_a_torch_optimizer(duplicate) -> None:
    memory = make()
    optimizer = RowAdam(memory, **ADAM)
    backward(memory)
    twin = duplicate(memory)
    assert torch.equal(twin.values.weight, memory.values.weight)
    norm = optimizer.grad_norm()
    assert_trains_with(torch.optim.AdamW(twin.parameters()), twin)
    assert optimizer.grad_norm() == norm  # the original's reads are its own
    before = memory.values.weight.clone()
    optimizer.step()
    assert not torch.equal(memory.values.weight, before)


@pytest.mark.case(KIND, "a memory whose RowAdam is gone, trained with AdamW", "works", "")
def test_a_table_whose_optimizer_is_gone_trains_with_a_torch_optimizer() -> None:
    memory = make()
    optimizer = RowAdam(memory)
    backward(memory)
    del optimizer
    gc.collect()
    assert memory.values.weight.grad is None
    assert_trains_with(torch.optim.AdamW(memory.parameters()), memory)


@pytest.mark.case(KIND, "a model and its RowAdam copied or pickled together, both pairs trained on", "works", "")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_and_its_optimizer_copied_together_train_on_together(duplicate) -> None:
    memory = make()
    optimizer = RowAdam(memory, **ADAM)
    backward(memory)
    optimizer.step()
    twin, its_optimizer = duplicate((memory, optimizer))
    for seed in range(2):
        backward(memory, twin, seed=seed)
        optimizer.step()
        its_optimizer.step()
    assert torch.equal(memory.values.weight, twin.values.weight)
    assert its_optimizer.state[twin.values.weight]["step"] == 3


@pytest.mark.case(
    KIND,
    "all parameters, tables included, handed to AdamW while a RowAdam lives",
    "works: by the dense gradient, and a warning says that both would train the table",
    "",
)
@pytest.mark.parametrize("foreach", [False, True])
def test_a_torch_optimizer_steps_by_the_numbers_of_the_reads(foreach) -> None:
    memory = make()
    twin = copy.deepcopy(memory)
    rows = RowAdam(memory)
    optimizers = [torch.optim.AdamW(model.parameters(), foreach=foreach) for model in (memory, twin)]
    backward(memory, twin)
    with pytest.warns(UserWarning, match="another optimizer steps by the gradient of a table"):
        optimizers[0].step()
    optimizers[1].step()
    torch.testing.assert_close(memory.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)
    assert rows.grad_norm() > 0


@pytest.mark.case(
    KIND, "a fused AdamW over a table while a RowAdam lives", "refused: TypeError names dense_parameters", ""
)
def test_a_fused_optimizer_over_the_tables_is_refused() -> None:
    memory = make()
    rows = RowAdam(memory)
    optimizer = torch.optim.AdamW(memory.parameters(), fused=True)
    backward(memory)
    with pytest.raises(TypeError, match="pkmem's dense_parameters lists all else"):
        optimizer.step()
    assert rows.grad_norm() > 0


# --- what cannot train is refused -------------------------------------------------------------------------


@pytest.mark.case(KIND, "`RowAdam` over a frozen table", "refused: ValueError, unfreeze it or leave it out", "")
def test_a_frozen_table_is_refused() -> None:
    memories = nn.ModuleList([make(), make()])
    memories[1].values.requires_grad_(False)
    with pytest.raises(ValueError, match=r"a table is frozen .* unfreeze it"):
        RowAdam(memories)
    assert [table.log for table in tables_in(memories)] == [None, None]
    optimizer = RowAdam(memories[0])
    backward(memories[0])
    assert optimizer.grad_norm() > 0


@pytest.mark.case(KIND, "a table frozen after its RowAdam was made", "works: it stays as it is", "")
def test_a_table_frozen_later_stays() -> None:
    memory = make()
    optimizer = RowAdam(memory)
    memory.values.requires_grad_(False)
    before = memory.values.weight.clone()
    backward(memory)
    optimizer.step()
    assert torch.equal(memory.values.weight, before)


@pytest.mark.case(
    KIND, "`add_param_group` of a parameter that is no table", "refused: ValueError names CombinedOptimizer", ""
)
@pytest.mark.parametrize("foreign", [nn.Parameter(torch.ones(3)), [nn.Parameter(torch.ones(3))]])
def test_a_parameter_that_is_no_table_is_refused(foreign) -> None:
    optimizer = RowAdam(make())
    with pytest.raises(ValueError, match="RowAdam trains value tables but was given a Parameter"):
        optimizer.add_param_group({"params": foreign})
    with pytest.raises(ValueError, match="RowAdam trains value tables but was given a Parameter"):
        RowAdam([foreign] if isinstance(foreign, Tensor) else foreign)
    with pytest.raises(ValueError, match="no value table found"):
        optimizer.add_param_group({"params": nn.Linear(2, 2)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.case(
    KIND, "two RowAdams over one table, both stepped", "refused: RuntimeError on the older one's step", ""
)
def test_the_older_of_two_optimizers_says_that_the_table_is_not_its_own() -> None:
    memory = make()
    older, newer = RowAdam(memory), RowAdam(memory)
    backward(memory)
    with pytest.raises(RuntimeError, match="another RowAdam was made for this table"):
        older.step()
    del older
    gc.collect()
    before = memory.values.weight.clone()
    newer.step()
    assert not torch.equal(memory.values.weight, before)


@pytest.mark.case(
    KIND,
    "`load_state_dict(assign=True)` after RowAdam was made, which gives the table a new weight",
    "refused: RuntimeError on step, make RowAdam anew",
    "",
)
def test_a_table_with_a_new_weight_is_not_left_untrained_in_silence() -> None:
    memory = make()
    optimizer = RowAdam(memory)
    memory.load_state_dict(make().state_dict(), assign=True)
    backward(memory)
    assert type(memory.values.weight.grad) is Tensor
    with pytest.raises(RuntimeError, match="make the RowAdam anew"):
        optimizer.step()


@pytest.mark.case(
    KIND, "reads that nobody ever takes (a loop without `step()`)", "works: one warning says what to do", ""
)
def test_reads_that_nobody_takes_warn_once() -> None:
    table = ValueTable(4, 2)
    optimizer = RowAdam(table)
    slots, weights = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(1100):
            table(slots, weights).sum().backward()
    assert len(told) == 1
    assert "wait for RowAdam.step()" in str(told[0].message)
    assert optimizer.grad_norm() == pytest.approx(1100 * 2**0.5)


# --- weights put in the table's place ---------------------------------------------------------------------


@pytest.mark.case(
    KIND, "`torch.func.functional_call` with other weights while a RowAdam lives, then backward", "works", ""
)
def test_weights_given_for_a_call_have_their_own_gradient() -> None:
    memory = make()
    optimizer = RowAdam(memory)
    others = {name: p.detach().clone().requires_grad_() for name, p in make().named_parameters()}
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.func.functional_call(memory, others, (x,)).square().sum().backward()
    plain = make()
    plain.load_state_dict(others, strict=False)
    plain(x).square().sum().backward()
    torch.testing.assert_close(others["values.weight"].grad, plain.values.weight.grad)
    assert optimizer.grad_norm() == 0


@pytest.mark.case(
    KIND,
    "a parametrization of a table (`weight_norm` and the like) and RowAdam",
    "refused: ValueError, use torch.optim.Adam",
    "",
)
def test_a_parametrized_table_trains_by_a_dense_gradient_alone() -> None:
    memory = make()
    torch.nn.utils.parametrizations.weight_norm(memory.values, "weight")
    with pytest.raises(ValueError, match="computed from other tensors"):
        RowAdam(memory)
    backward(memory)
    assert all(p.grad is not None and p.grad.any() for p in memory.values.parameters())


@pytest.mark.case(KIND, "a penalty on the table itself beside its reads (`weight.square().sum()`)", "works", "")
def test_a_penalty_on_the_table_adds_to_its_reads() -> None:
    memory = make()
    twin = copy.deepcopy(memory)
    optimizer, dense = RowAdam(memory, **ADAM), torch.optim.Adam([twin.values.weight], **ADAM)
    for seed in range(2):
        for model in (memory, twin):
            backward(model, seed=seed)
            model.values.weight.square().sum().backward()
        optimizer.step()
        dense.step()
        dense.zero_grad()
    torch.testing.assert_close(memory.values.weight, twin.values.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.case(KIND, "two modules with one weight (`a.weight = b.weight`)", "works: one table", "")
def test_tables_that_share_a_weight_are_one_table() -> None:
    memories = nn.ModuleList([make(), make()])
    memories[1].values.weight = memories[0].values.weight
    twins = copy.deepcopy(memories)
    optimizer = RowAdam(memories, **ADAM)
    assert len(optimizer.param_groups[0]["params"]) == 1
    backward(*memories, *twins)
    optimizer.step()
    dense = torch.optim.Adam([twins[0].values.weight], **ADAM)
    dense.step()
    was_read = (twins[0].values.weight.grad != 0).any(1)
    torch.testing.assert_close(
        memories[0].values.weight[was_read], twins[0].values.weight[was_read], rtol=1e-10, atol=0
    )


@pytest.mark.case(KIND, "`model.to(...)` between backward and step", "works", "")
def test_a_table_moved_between_backward_and_step_keeps_its_gradient() -> None:
    memory = make()
    twin = copy.deepcopy(memory)
    optimizer, its_optimizer = RowAdam(memory, **ADAM), RowAdam(twin, **ADAM)
    backward(memory, twin)
    memory.float()
    optimizer.step()
    its_optimizer.step()
    torch.testing.assert_close(memory.values.weight, twin.values.weight.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.case(
    KIND,
    "a gradient penalty (`torch.autograd.grad(..., create_graph=True)`) on a model that RowAdam trains",
    "works",
    "",
)
def test_a_gradient_penalty_trains_the_rows() -> None:
    memory = make()
    twin = copy.deepcopy(memory)
    optimizer = RowAdam(memory)
    for one in (memory, twin):
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (slope,) = torch.autograd.grad(one(x).square().sum(), x, create_graph=True)
        (one(x).square().sum() + slope.square().sum()).backward()
    for (name, one), other in zip(memory.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad.to_dense(), other.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert optimizer.grad_norm() == pytest.approx(twin.values.weight.grad.norm().item())


# --- several processes ------------------------------------------------------------------------------------


@pytest.mark.case(
    KIND,
    "`DistributedDataParallel` over a model whose table RowAdam trains, two processes",
    "works: as one process with both batches, at the cost of exchanging a dense gradient",
    "",
)
def test_processes_train_the_rows_that_any_of_them_read(tmp_path) -> None:
    torch.multiprocessing.spawn(processes.train_together, (str(tmp_path),), nprocs=2)
    expected = processes.trained(lambda model: model, slice(None))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-8, atol=1e-9)
