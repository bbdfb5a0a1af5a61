"""Interrupts training runs, and compares them bit by bit; shared by the tests of training and of the command line."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pkmem.files.documents import load_json
from pkmem.training.checkpoint import open_shards
from pkmem.training.journal import Journal, read_metrics


@contextmanager
def before_update(step: int, act: Callable[[Any], object]) -> Iterator[None]:
    """Calls `act` with the model right before an update, counted from 1."""
    begin = Journal.on_step_begin

    def acting(self: Journal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            act(kwargs["model"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "on_step_begin", acting)
        yield


def ctrl_c(_model: object) -> None:
    signal.raise_signal(signal.SIGINT)


def losses(run: Path) -> list[tuple]:
    return [(r["kind"], r["step"], r["loss"], r["lr"] if r["kind"] == "train" else None) for r in read_metrics(run)]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    shards = open_shards(checkpoint)
    tensors = {name: torch.empty(shape, dtype=shards.dtype(name)) for name, shape in shards.shapes.items()}
    shards.read_into(tensors)
    return tensors


def assert_same_run(left: Path, right: Path) -> None:
    """Bitwise: losses, weights, optimizer, schedule, random generators."""
    assert losses(left) == losses(right)
    checkpoints = [run / "checkpoints" / "step-10" for run in (left, right)]
    pairs = [[tensors_of(checkpoint) for checkpoint in checkpoints]]
    pairs.append([load_file(run / "model" / "model.safetensors") for run in (left, right)])
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ("optimizer", "schedule", "random-0"):
        ours, theirs = ((checkpoint / f"{name}.json").read_text() for checkpoint in checkpoints)
        assert ours == theirs, name
    figures = [load_json(run / "summary.json") for run in (left, right)]
    assert figures[0]["loss"] == figures[1]["loss"]
