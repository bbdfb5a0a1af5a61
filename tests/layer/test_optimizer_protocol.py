"""RowAdam and CombinedOptimizer do what torch's own optimizers do, for all who handle optimizers."""

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import dense_parameters
from pkmem.layer.values import tables_in

CONFIG = MemoryConfig(dim=8, num_sub_keys=2, heads=4, knn=2, query_dim=4, query_norm="layer")  # reads every row
KIND = "Optimizer protocol"
ADAM = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-2}  # with a tiny eps Adam hides the scale of its gradients


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), ProductKeyMemory(CONFIG), nn.Tanh(), ProductKeyMemory(CONFIG)).double()


def rows_for(model: nn.Module) -> RowAdam:
    return RowAdam(model, **ADAM)


def union_for(model: nn.Module) -> CombinedOptimizer:
    return CombinedOptimizer(torch.optim.Adam(dense_parameters(model), **ADAM), RowAdam(model, **ADAM))


def dense_for(model: nn.Module) -> torch.optim.Optimizer:
    """The truth: torch's Adam over dense gradients of every row, in fp64."""
    return torch.optim.Adam(model.parameters(), **ADAM)


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def pair() -> tuple[nn.Module, nn.Module]:
    """Two equal models."""
    model = make()
    return model, copy.deepcopy(model)


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=tolerance, atol=tolerance)


def values_of(model: nn.Module) -> list[Tensor]:
    return [table.weight.detach().clone() for table in tables_in(model)]


BOTH = pytest.mark.parametrize("optimizer_for", [rows_for, union_for])


# --- copies and state -------------------------------------------------------------------------------------


@pytest.mark.case(KIND, "`copy.deepcopy` and `pickle` of RowAdam and of CombinedOptimizer", "works", "")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@BOTH
def test_a_copy_has_the_same_state_and_options(optimizer_for, duplicate) -> None:
    model = make()
    optimizer = optimizer_for(model)
    loss_of(model).backward()
    optimizer.step()
    twin = duplicate(optimizer)
    assert type(twin) is type(optimizer)
    for ours, theirs in zip(optimizer.param_groups, twin.param_groups, strict=True):
        assert {**ours, "params": 0} == {**theirs, "params": 0}
        for one, other in zip(ours["params"], theirs["params"], strict=True):
            assert one is not other
            assert torch.equal(one, other)
            torch.testing.assert_close(optimizer.state[one], twin.state[other], rtol=0, atol=0)
    twin.zero_grad()
    twin.step()


@pytest.mark.case(KIND, "hooks before and after `step`, `state_dict` and `load_state_dict`", "works", "")
@BOTH
def test_every_hook_runs_and_may_change_the_state(optimizer_for) -> None:
    model = make()
    optimizer = optimizer_for(model)
    ran: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before step"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda _: ran.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "epoch": 3})
    optimizer.register_load_state_dict_post_hook(lambda _: ran.append("after load"))
    loss_of(model).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["epoch"] == 3

    def halved(_: torch.optim.Optimizer, state: dict) -> dict:
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        states = {i: {**one, "exp_avg": one["exp_avg"] / 2} for i, one in state["state"].items()}
        return {"state": states, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halved)
    weight = tables_in(model)[0].weight
    before = optimizer.state[weight]["exp_avg"].clone()
    optimizer.load_state_dict(saved)
    assert ran == ["before step", "after step", "before save", "after load"]
    assert {group["lr"] for group in optimizer.param_groups} == {ADAM["lr"] / 2}
    assert torch.equal(optimizer.state[weight]["exp_avg"], before / 2)


@pytest.mark.case(
    KIND, "the state of a union under the names of its parameters (`get_optimizer_state_dict`)", "works", ""
)
def test_the_state_of_a_union_is_found_by_the_names_of_parameters() -> None:
    model, twin = pair()
    ours, theirs = union_for(model), union_for(twin)
    loss_of(model).backward()
    ours.step()
    state = get_optimizer_state_dict(model, ours)
    names = {name for name, _ in model.named_parameters()}
    assert set(state["state"]) == names
    twin.load_state_dict(model.state_dict())
    loss_of(twin).backward()  # torch's function steps once to make the state
    set_optimizer_state_dict(twin, theirs, copy.deepcopy(state))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.state[one]["exp_avg"], theirs.state[other]["exp_avg"], rtol=0, atol=0)


def test_skipped_steps_and_the_seed_are_part_of_the_state() -> None:
    model, twin = pair()
    optimizer, other = RowAdam(model, seed=7), RowAdam(twin)
    (loss_of(model) * torch.nan).backward()
    optimizer.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (other.num_skipped, other.param_groups[0]["seed"]) == (1, 7)
    assert copy.deepcopy(optimizer).num_skipped == 1


# --- loss scaling and clipping ----------------------------------------------------------------------------


def scaled_run(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float, max_norm: float | None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    for seed in range(4):
        optimizer.zero_grad()
        for part in range(2):
            scaler.scale(loss_of(model, 2 * seed + part)).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.case(KIND, "`GradScaler.step` on RowAdam, and on a CombinedOptimizer, at scale 1 and 65,536", "works", "")
@pytest.mark.case(KIND, "`GradScaler.unscale_`, then `clip_grad_norm_` over tables and all else", "works", "")
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
@BOTH
def test_a_loss_scaler_gives_the_same_at_any_scale(optimizer_for, scale, max_norm) -> None:
    model, twin = pair()
    if optimizer_for is rows_for:
        for one in (model, twin):
            for parameter in dense_parameters(one):
                parameter.requires_grad_(False)
    scaled_run(model, optimizer_for(model), scale, max_norm)
    optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], **ADAM)
    scaled_run(twin, optimizer, 1.0, max_norm)
    assert_same(model, twin)


@pytest.mark.case(
    KIND, "a gradient that overflows under GradScaler", "works: no parameter moves and the scale falls", ""
)
@BOTH
def test_a_loss_scaler_skips_a_step_that_overflows(optimizer_for) -> None:
    model = make()
    optimizer = optimizer_for(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(loss_of(model) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    assert not torch.equal(values_of(model)[0], before["1.values.weight"])


@pytest.mark.case(KIND, "`clip_grad_norm_` over all parameters of a model whose tables RowAdam trains", "works", "")
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_all_parameters_clips_the_reads(foreach) -> None:
    model, twin = pair()
    ours, theirs = union_for(model), dense_for(twin)
    for seed in range(3):
        for one, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss_of(one, seed).backward()
            norm = nn.utils.clip_grad_norm_(one.parameters(), 0.05, foreach=foreach)
            optimizer.step()
            if one is model:
                our_norm = norm
    assert our_norm > 0.05
    torch.testing.assert_close(our_norm, norm, rtol=1e-10, atol=0)
    assert_same(model, twin)


@pytest.mark.case(KIND, "`clip_grad_value_` over all parameters", "refused: TypeError, leave the tables out", "")
def test_clipping_by_value_is_refused_for_reads() -> None:
    model = make()
    optimizer = union_for(model)
    loss_of(model).backward()
    with pytest.raises(TypeError, match="would write into the gradient of a table"):
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
    nn.utils.clip_grad_value_(dense_parameters(model), 0.1)
    optimizer.step()


# --- schedulers and groups --------------------------------------------------------------------------------

TORCHS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=8),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-3, anneal_epochs=3),
}
HUGGING_FACES = {
    name: lambda o, name=name: transformers.get_scheduler(name, o, 2, 8)
    for name in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
} | {"inverse_sqrt": lambda o: transformers.get_scheduler("inverse_sqrt", o, 2)}


@pytest.mark.case(
    KIND, "every learning-rate scheduler of torch, OneCycleLR and CyclicLR with their betas too", "works", ""
)
@pytest.mark.case(KIND, "the schedulers of `transformers.get_scheduler`", "works", "")
@pytest.mark.parametrize("scheduler", [*TORCHS, *HUGGING_FACES])
@BOTH
def test_a_scheduler_drives_rows_as_it_drives_torchs_adam(optimizer_for, scheduler) -> None:
    schedule_for = (TORCHS | HUGGING_FACES)[scheduler]
    model, twin = pair()
    if optimizer_for is rows_for:
        for one in (model, twin):
            for parameter in dense_parameters(one):
                parameter.requires_grad_(False)
    theirs = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], **ADAM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns of its own call of step(epoch)
        runs = [(one, o, schedule_for(o)) for one, o in ((model, optimizer_for(model)), (twin, theirs))]
        for seed in range(5):
            for one, optimizer, schedule in runs:
                optimizer.zero_grad()
                loss_of(one, seed).backward()
                optimizer.step()
                schedule.step()
    for group in runs[0][1].param_groups:
        assert group["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        assert group["betas"] == pytest.approx(theirs.param_groups[0]["betas"])
    assert_same(model, twin)


@BOTH
def test_a_scheduler_that_waits_for_a_plateau_lowers_every_lr(optimizer_for) -> None:
    optimizer = optimizer_for(make())
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {ADAM["lr"] / 4}


@pytest.mark.case(
    KIND, "OneCycleLR over a union whose parts share neither betas nor momentum", "refused: torch's own ValueError", ""
)
def test_a_union_has_the_options_that_all_parts_have() -> None:
    model = make()
    union = CombinedOptimizer(torch.optim.SGD(dense_parameters(model), 1e-2, momentum=0.9), RowAdam(model))
    assert set(union.defaults) == {"lr"}
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.OneCycleLR(union, 1e-2, total_steps=8)
    lr_scheduler.OneCycleLR(union, 1e-2, total_steps=8, cycle_momentum=False)


@pytest.mark.case(
    KIND, "groups of tables with learning rates of their own, at once or by `add_param_group`", "works", ""
)
@pytest.mark.parametrize("later", [False, True])
def test_groups_train_with_options_of_their_own(later) -> None:
    model, twin = pair()
    groups = [{"params": model[1], "lr": 1e-3}, {"params": [model[3].values], "betas": (0.8, 0.9)}]
    if later:
        ours = RowAdam(groups[:1], **ADAM)
        ours.add_param_group(groups[1])
    else:
        ours = RowAdam(groups, **ADAM)
    weights = [table.weight for table in tables_in(twin)]
    theirs = torch.optim.Adam([{**group, "params": [w]} for group, w in zip(groups, weights, strict=True)], **ADAM)
    for seed in range(3):
        for one, optimizer in ((model, ours), (twin, theirs)):
            one.zero_grad()
            loss_of(one, seed).backward()
            optimizer.step()
    assert_same(model, twin)


def test_a_group_added_to_a_part_is_the_unions_too() -> None:
    model = make()
    rows = RowAdam(model[1], **ADAM)
    union = CombinedOptimizer(torch.optim.Adam(dense_parameters(model), **ADAM), rows)
    rows.add_param_group({"params": model[3], "lr": 1e-3})
    assert [group["lr"] for group in union.param_groups] == [1e-2, 1e-2, 1e-3]


@pytest.mark.case(
    KIND, "`maximize`, `weight_decay`, `amsgrad` in a group of RowAdam", "refused: ValueError by name", ""
)
@pytest.mark.parametrize("option", ["maximize", "weight_decay", "amsgrad", "differentiable"])
def test_what_rows_do_not_do_is_refused_by_name(option) -> None:
    with pytest.raises(ValueError, match=f"RowAdam has no {option}, which was set to"):
        RowAdam([{"params": make(), option: True}])
    with pytest.raises(TypeError, match=option):
        RowAdam(make(), **{option: True})
    RowAdam([{"params": make(), option: False}])


@pytest.mark.case(KIND, "a learning rate given as a tensor", "works", "")
def test_a_learning_rate_may_be_a_tensor() -> None:
    model, twin = pair()
    optimizers = RowAdam(model, lr=torch.tensor(1e-2)), RowAdam(twin, lr=1e-2)
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        loss_of(one).backward()
        optimizer.step()
    assert_same(model, twin, 1e-8)


# --- accelerate -------------------------------------------------------------------------------------------


@pytest.mark.case(KIND, "`Accelerator.prepare`, `accumulate`, `clip_grad_norm_` and `step` (accelerate)", "works", "")
def test_accelerate_prepares_accumulates_and_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = pair()
    theirs = dense_for(twin)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, ours, schedule = accelerator.prepare(model, union := union_for(model), lr_scheduler.LinearLR(union, 0.5))
    dense_schedule = lr_scheduler.LinearLR(theirs, 0.5)
    for seed in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, seed))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.05)
            ours.step()
            schedule.step()
            ours.zero_grad()
        (loss_of(twin, seed) / 2).backward()
        if seed % 2:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            theirs.step()
            dense_schedule.step()
            theirs.zero_grad()
    assert ours.param_groups[-1]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
    assert_same(model, twin)


@pytest.mark.case(KIND, "`Accelerator.save_state` and `load_state` (accelerate)", "works", "")
def test_accelerate_saves_and_loads(tmp_path) -> None:
    model, twin = pair()
    for one in (model, twin):
        accelerator = Accelerator(cpu=True)
        prepared, optimizer = accelerator.prepare(one, union_for(one))
        if one is model:
            loss_of(prepared).backward()
            optimizer.step()
            optimizer.zero_grad()
            accelerator.save_state(tmp_path / "state")
        else:
            accelerator.load_state(tmp_path / "state")
        loss_of(prepared, 1).backward()
        optimizer.step()
    assert_same(model, twin, 0)
