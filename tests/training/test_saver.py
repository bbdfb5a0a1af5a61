"""Saving in the background: what is saved is of its moment, and no failure is lost."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pkmem.files.documents import CheckpointError, load_json, save_json
from pkmem.training.checkpoint import latest_checkpoint, open_shards, verify_checkpoint
from pkmem.training.saver import CheckpointSaver


def full(_folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_training_goes_on_while_a_checkpoint_of_its_moment_is_written(tmp_path: Path) -> None:
    may_write, x = threading.Event(), torch.ones(3)

    def write(folder: Path) -> None:
        assert may_write.wait(60)
        save_json(folder / "loss.json", 1.5)

    with CheckpointSaver(tmp_path, in_background=True) as saver:
        saver.save(1, {"x": x}, write)
        assert latest_checkpoint(tmp_path) is None
        x.zero_()
        may_write.set()
        saver.save(2, {"x": x}, write)  # waits for the first
        assert latest_checkpoint(tmp_path) is not None
    for step, value in ((1, 1.0), (2, 0.0)):
        checkpoint = tmp_path / "checkpoints" / f"step-{step}"
        verify_checkpoint(checkpoint)
        read = {"x": torch.full((3,), 9.0)}
        open_shards(checkpoint).read_into(read)
        assert torch.equal(read["x"], torch.full((3,), value))
        assert load_json(checkpoint / "loss.json") == 1.5


def leave(saver: CheckpointSaver) -> None:
    with saver:
        pass


@pytest.mark.parametrize(
    "opportunity", [leave, CheckpointSaver.wait, lambda saver: saver.save(3, {"x": torch.ones(3)}, lambda folder: None)]
)
def test_a_failure_in_the_background_is_raised_at_the_next_opportunity(
    opportunity: Callable[[CheckpointSaver], None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saver = CheckpointSaver(tmp_path, in_background=True)
    saver.save(1, {"x": torch.ones(3)}, lambda folder: None)
    saver.save(2, {"x": torch.ones(3)}, full)
    with pytest.raises(CheckpointError, match=r"step-2: no space left.*the previous checkpoint step-1 is intact"):
        opportunity(saver)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-1"}
    assert "step-2 is not saved, training stops at the next save: " in capsys.readouterr().err
    saver.save(3, {"x": torch.ones(3)}, lambda folder: None)  # once is enough
    saver.wait()
    verify_checkpoint(tmp_path / "checkpoints" / "step-3")


def test_an_error_of_training_is_not_hidden_by_one_of_saving(tmp_path: Path) -> None:
    def fail(saver: CheckpointSaver) -> None:
        with saver:
            saver.save(1, {"x": torch.ones(3)}, full)
            raise ValueError("of training")

    with pytest.raises(ValueError, match="of training"):
        fail(CheckpointSaver(tmp_path, in_background=True))


def test_in_the_foreground_a_checkpoint_is_there_when_save_returns(tmp_path: Path) -> None:
    with CheckpointSaver(tmp_path) as saver:
        saver.save(1, {"x": torch.ones(3)}, lambda folder: None)
        verify_checkpoint(tmp_path / "checkpoints" / "step-1")
        with pytest.raises(CheckpointError, match=r"step-2: no space left.*step-1 is intact"):
            saver.save(2, {"x": torch.ones(3)}, full)
