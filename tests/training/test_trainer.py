"""The trainer: which optimizer and rate each parameter has, and that one process uses one GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from pkmem.layer.optim import RowAdam
from pkmem.lm.build import build_model
from pkmem.training.recipe import TrainingConfig
from pkmem.training.run import train
from pkmem.training.trainer import build_optimizer, build_schedule
from tiny import MEMORY, MODEL, TRAINING, tiny

pytest_plugins = "tiny"


@pytest.mark.parametrize("value_grad", ["rows", "dense"])
def test_values_have_their_own_rate_and_no_weight_decay(value_grad: Any) -> None:
    model = build_model(MODEL, MEMORY, 300, 0)
    config = TrainingConfig(lr=0.1, value_lr=0.2, weight_decay=0.3, beta2=0.9, value_grad=value_grad)
    dense, values = build_optimizer(model, config).optimizers
    assert isinstance(values, RowAdam) is (value_grad == "rows")
    (table,) = values.param_groups[0]["params"]
    assert table.shape == (64, 32)
    assert values.param_groups[0]["lr"] == 0.2
    assert values.param_groups[0].get("weight_decay", 0.0) == 0.0
    decayed, free = dense.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) + 1 == len(list(model.parameters()))
    for group in (decayed, free, values.param_groups[0]):
        assert group["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "row", "row_alone", "row_adagrad"])
def test_values_keep_the_moments_that_are_wanted(kind: Any) -> None:
    model = build_model(MODEL, MEMORY, 300, 0)
    config = TrainingConfig(value_moments=kind)
    optimizer = build_optimizer(model, config)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    ((table, state),) = optimizer.optimizers[1].state.items()
    kept = sum(part.nbytes for name, part in state.items() if name.startswith("exp_avg"))
    of_number, of_row = config.moment_bytes
    assert kept == table.numel() * of_number + len(table) * of_row


def test_a_dense_gradient_has_full_moments() -> None:
    with pytest.raises(
        ValueError, match=r"training\.value_moments is 'row' but must be fp32 with training\.value_grad=dense"
    ):
        TrainingConfig(value_moments="row", value_grad="dense")


@pytest.mark.parametrize("value_schedule", ["same", "constant"])
def test_schedule_warms_up_then_falls(value_schedule: Any) -> None:
    model = build_model(MODEL, MEMORY, 300, 0)
    config = replace(TRAINING, schedule="linear", warmup_share=0.2, lr=1.0, value_lr=0.5, value_schedule=value_schedule)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config)
    rates = []
    for _ in range(config.num_steps):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))
        optimizer.step()
        schedule.step()
    falling = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [lr for lr, _ in rates] == pytest.approx(falling)
    values = [0.5] * 10 if value_schedule == "constant" else [lr / 2 for lr in falling]
    assert [value_lr for _, value_lr in rates] == pytest.approx(values)


def test_one_process_uses_one_gpu(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's DataParallel would copy the model at every step, and its reading logs with it."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))

    class Refused(torch.nn.DataParallel):
        def __init__(self, *arguments: object) -> None:
            pytest.fail("wrapped in DataParallel")

    monkeypatch.setattr(torch.nn, "DataParallel", Refused)
    train(tiny(text, tmp_path / "run", training={"num_tokens": 128}), progress=False)
