"""Several optimizers that step as one."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optimizers import assert_same_bits, everything
from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import dense_parameters
from pkmem.training.state import load_state, save_state

CONFIG = MemoryConfig(dim=8, num_sub_keys=8, heads=2, knn=3, query_dim=4, query_norm="layer")


def model_with_two_memories() -> nn.Sequential:
    first = ProductKeyMemory(CONFIG)
    return nn.Sequential(nn.Linear(8, 8), first, nn.Tanh(), ProductKeyMemory(CONFIG, values=first.values))


def parts_for(model: nn.Module) -> tuple[torch.optim.AdamW, RowAdam]:
    return torch.optim.AdamW(dense_parameters(model), lr=1e-2, weight_decay=0.1), RowAdam(model, lr=1e-1)


def backward(*models: nn.Module, seed: int) -> None:
    for model in models:
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def test_a_combined_step_is_the_steps_of_its_parts() -> None:
    together = model_with_two_memories()
    apart = copy.deepcopy(together)
    combined, parts = CombinedOptimizer(*parts_for(together)), parts_for(apart)
    for seed in range(3):
        backward(together, apart, seed=seed)
        combined.step()
        combined.zero_grad()
        for part in parts:
            part.step()
            part.zero_grad()
    assert_same_bits(list(together.parameters()), list(apart.parameters()))
    assert set(combined.state) == set(together.parameters())


def test_dense_parameters_are_all_that_train_but_the_tables() -> None:
    model = model_with_two_memories()
    model[0].bias.requires_grad_(False)
    named = dict(model.named_parameters())
    left_out = {"0.bias", "1.values.weight"}
    assert {id(p) for p in dense_parameters(model)} == {id(p) for name, p in named.items() if name not in left_out}


def test_a_scheduler_of_the_union_sets_the_lr_of_its_parts_before_and_after_loading() -> None:
    adamw, rows = parts_for(model_with_two_memories())
    combined = CombinedOptimizer(adamw, rows)
    schedule = LambdaLR(combined, [lambda step: 0.5**step, lambda step: 0.1**step])
    combined.step()
    schedule.step()
    assert (adamw.param_groups[0]["lr"], rows.param_groups[0]["lr"]) == pytest.approx((0.5e-2, 1e-2))
    combined.load_state_dict(copy.deepcopy(combined.state_dict()))
    combined.step()
    schedule.step()
    assert (adamw.param_groups[0]["lr"], rows.param_groups[0]["lr"]) == pytest.approx((0.25e-2, 1e-3))


@pytest.mark.parametrize("through_files", [False, True])
def test_a_union_resumes_bitwise(through_files, tmp_path) -> None:
    model = model_with_two_memories()
    combined = CombinedOptimizer(*parts_for(model))
    for seed in range(2):
        backward(model, seed=seed)
        combined.step()
        combined.zero_grad()
    resumed = copy.deepcopy(model)
    saved = copy.deepcopy(combined.state_dict())
    if through_files:
        save_state(tmp_path / "optimizer.json", saved)
        saved = load_state(tmp_path / "optimizer.json")
    other = CombinedOptimizer(*parts_for(resumed))
    other.load_state_dict(saved)
    assert_same_bits(everything(combined), everything(other))
    backward(model, resumed, seed=2)
    combined.step()
    other.step()
    assert_same_bits(everything(combined), everything(other))


def test_a_union_refuses_the_state_of_another_number_of_parts() -> None:
    model = model_with_two_memories()
    adamw, rows = parts_for(model)
    combined = CombinedOptimizer(adamw, rows)
    for other in ({"parts": [adamw.state_dict()]}, adamw.state_dict()):
        with pytest.raises(ValueError, match="different number of parameter groups"):
            combined.load_state_dict(other)


def test_a_union_loads_what_an_earlier_version_saved() -> None:
    model = model_with_two_memories()
    combined = CombinedOptimizer(*parts_for(model))
    backward(model, seed=0)
    combined.step()
    parts = [copy.deepcopy(part.state_dict()) for part in combined.optimizers]
    for state in parts[1]["state"].values():
        del state["num_skipped"]
    for group in parts[1]["param_groups"]:
        del group["seed"]
    other = CombinedOptimizer(*parts_for(copy.deepcopy(model)))
    other.load_state_dict({"parts": parts})
    assert_same_bits(everything(combined), everything(other))


def test_zero_grad_of_a_union_clears_every_part() -> None:
    model = model_with_two_memories()
    combined = CombinedOptimizer(*parts_for(model))
    backward(model, seed=0)
    assert model[0].weight.grad is not None
    assert len(model[1].values.log.entries) == 2  # both layers read the table
    combined.zero_grad()
    assert model[0].weight.grad is None
    assert model[1].values.log.entries == []


def test_the_closure_of_a_union_runs_once() -> None:
    model = model_with_two_memories()
    combined, losses = CombinedOptimizer(*parts_for(model)), []

    def closure() -> float:
        loss = model(torch.ones(5, 8)).square().mean()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    with torch.no_grad():
        assert combined.step(closure) == losses[0]
    assert len(losses) == 1


def test_a_parameter_in_two_parts_is_refused() -> None:
    model = model_with_two_memories()
    with pytest.raises(ValueError, match="two of the optimizers train the same parameter"):
        CombinedOptimizer(torch.optim.AdamW(model.parameters()), RowAdam(model))


def test_a_combined_optimizer_refuses_a_group_no_part_would_step() -> None:
    parts = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2)]
    combined = CombinedOptimizer(*parts)
    assert len(combined.param_groups) == 2
    with pytest.raises(ValueError, match="one of its parts"):
        combined.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1})
