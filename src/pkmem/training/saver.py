"""Saves a run's checkpoints one after the other, while training waits or in the background."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from pkmem.training.checkpoint import save_checkpoint
from pkmem.training.shards import plan_shard
from pkmem.training.together import Together


class CheckpointSaver:
    """Saves the checkpoints of one run.

    Args:
        run: folder of the training run.
        in_background: training goes on while a checkpoint is written, from a copy in host memory as large as what the
            process holds of the model and its optimizer.

    Attributes:
        together: the processes of the run, in a group of their own, so that they can talk beside the training.
    """

    def __init__(self, run: Path, in_background: bool = False) -> None:
        self.run, self.in_background = run, in_background
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.together = Together(dist.new_group(backend="gloo") if several else None)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], write: Callable[[Path], None]) -> None:
        """Saves `RUN/checkpoints/step-N`, see `save_checkpoint`, once the one before is there.

        Args:
            step: N.
            tensors: by name, plain or DTensors, the same names in all processes.
            write: writes everything else; in the background, of a state that training does not change.

        Raises:
            CheckpointError: this one was not saved, or the one before in the background.
        """
        self.wait()
        shard = plan_shard(tensors, self.together)
        if not self.in_background:
            save_checkpoint(self.run, step, write, shard, together=self.together)
            return
        shard = shard.copied()

        def save() -> None:
            try:
                save_checkpoint(self.run, step, write, shard, together=self.together)
            except BaseException as error:
                self._failure = error
                print(f"step-{step} is not saved, training stops at the next save: {error}", file=sys.stderr)

        self._thread = threading.Thread(target=save, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is there.

        Raises:
            CheckpointError: it could not be saved.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Waits for the checkpoint that is being written; not where training is to end at once, by a second Ctrl-C."""
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()
