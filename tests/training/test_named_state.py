"""Model and optimizer under names: whatever the order, the ties or the number of processes, each state finds its own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.files.documents import CheckpointError
from pkmem.layer.optim import dense_parameters
from pkmem.lm.build import build_model
from pkmem.training.checkpoint import open_shards, save_checkpoint
from pkmem.training.named_state import load_model, load_optimizer, model_tensors, optimizer_state
from pkmem.training.shards import plan_shard
from pkmem.training.state import load_state, save_state
from pkmem.training.together import Together
from saving_together import SHARDED_STEPS, dense_model, save_sharded, trained
from tiny import MEMORY, MODEL

CONFIG = MemoryConfig(dim=8, num_sub_keys=4, heads=2, knn=3, query_dim=4, query_norm="batch")


def model_and_optimizer(order: int = 1) -> tuple[nn.Module, CombinedOptimizer]:
    """A model with a memory; its parameters given to the optimizer in this or the opposite order."""
    model = nn.Sequential(nn.Linear(8, 8), ProductKeyMemory(CONFIG), nn.Linear(8, 2))
    parameters = dense_parameters(model)[::order]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ][::order]
    return model, CombinedOptimizer(torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9)), RowAdam(model, lr=1e-2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    tensors, others = optimizer_state(model, optimizer)
    named = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    named |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    return save_checkpoint(
        run, 1, lambda folder: save_state(folder / "optimizer.json", others), plan_shard(named, Together())
    )


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    load_model(model, open_shards(checkpoint))
    load_optimizer(model, optimizer, open_shards(checkpoint), load_state(checkpoint / "optimizer.json"))


@pytest.mark.parametrize("order", [1, -1])
def test_state_is_found_by_name_in_any_order(order: int, tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 3e-3  # as a schedule would
    checkpoint = save(tmp_path, model, optimizer)
    names = set(open_shards(checkpoint).shapes)
    assert {"model.1.values.weight", "optimizer.1.values.weight.exp_avg", "optimizer.1.values.weight.step"} <= names
    assert {"optimizer.0.weight.exp_avg_sq", "optimizer.0.weight.step", "model.1.query.norm.running_mean"} <= names
    torch.manual_seed(9)
    resumed, its_optimizer = model_and_optimizer(order)
    load(checkpoint, resumed, its_optimizer)
    for m, o in ((model, optimizer), (resumed, its_optimizer)):
        train(m, o, 2)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    assert optimizer_state(resumed, its_optimizer)[0].keys() == optimizer_state(model, optimizer)[0].keys()


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    checkpoint = save(tmp_path, model, optimizer)
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="is of another optimizer: it has no group of"):
        load_optimizer(model, other, open_shards(checkpoint), load_state(checkpoint / "optimizer.json"))
    with pytest.raises(CheckpointError, match=r"is of another model"):
        load_model(nn.Linear(8, 8), open_shards(checkpoint))


@pytest.mark.parametrize(
    "changes", [{}, {"family": "llama"}, {"memory_layers": [0, 1], "share_values": True}, {"memory_layers": []}]
)
def test_ties_have_the_name_that_save_pretrained_keeps(changes: dict, tmp_path: Path) -> None:
    model = build_model(MODEL.__class__(**(vars(MODEL) | changes)), MEMORY, 300, 0)
    model.save_pretrained(tmp_path)
    saved, tensors = load_file(tmp_path / "model.safetensors"), model_tensors(model)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in saved.items())


def test_what_two_processes_of_fsdp_save_one_goes_on_with(tmp_path: Path) -> None:
    """Found by name; the same numbers, up to the order of sums."""
    torch.multiprocessing.spawn(save_sharded, (str(tmp_path),), nprocs=2)
    model, optimizer = dense_model()
    load(tmp_path / "run" / "checkpoints" / "step-1", model, optimizer)
    straight, its_optimizer = dense_model()
    trained(straight, its_optimizer, range(SHARDED_STEPS))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, straight.state_dict()[name], rtol=0, atol=1e-12)
    for m, o in ((model, optimizer), (straight, its_optimizer)):
        trained(m, o, range(SHARDED_STEPS, 2 * SHARDED_STEPS))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, straight.state_dict()[name], rtol=0, atol=1e-12)
