"""What a run says while it goes on: losses, held-out figures, use of the memories, speed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from pkmem.files.documents import save_text
from pkmem.layer.usage import usage_figures
from pkmem.lm.evaluation import evaluate
from pkmem.training.recipe import Recipe


class Journal(TrainerCallback):
    """Measures a run: losses, held-out figures, use of the memories, speed; to a bar, a file and TensorBoard.

    Several processes measure together and the first one writes: losses are the mean over all of them, the use of the
    memories during training is that of its own share of the tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: bool,
        processes: PartialState,
        held_out: Dataset,
        train_bytes_per_token: float,
        held_out_bytes_per_token: float,
        usages: dict[str, Any],
    ) -> None:
        self.recipe, self.progress, self.held_out, self.usages = recipe, progress, held_out, usages
        self.processes = processes
        self.train_bytes_per_token, self.held_out_bytes_per_token = train_bytes_per_token, held_out_bytes_per_token
        self.path = recipe.out / "metrics.jsonl"
        self._open = contextlib.ExitStack()
        self.seconds = 0.0  # of training alone, over all sittings
        self._losses: list[float] = []  # of the updates since the last record
        self._step_loss = 0.0
        self._logged_seconds = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seconds": self.seconds, "losses": self._losses, "logged_seconds": self._logged_seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self.seconds, self._losses = state["seconds"], state["losses"]
        self._logged_seconds = state["logged_seconds"]

    def add_loss(self, loss: float) -> None:
        """Adds a micro-batch's share of the update's loss, the mean over all processes."""
        self._step_loss += loss

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.processes.is_main_process:
            return
        _drop_records_after(self.path, state.global_step)
        board = self.recipe.out / "tensorboard"
        _wait_for_a_later_name(board)
        self._board = SummaryWriter(str(board), purge_step=state.global_step + 1)
        self._bar = tqdm(
            total=self.recipe.training.num_steps * self.recipe.training.batch_tokens,
            initial=state.global_step * self.recipe.training.batch_tokens,
            desc=self.recipe.out.name,
            unit="tok",
            unit_scale=True,
            disable=not self.progress,
        )
        for opened in (self._board, self._bar):
            self._open.callback(opened.close)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_start = time.perf_counter()
        self._step_loss = 0.0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._step_start
        self._losses.append(self._step_loss)
        config, step = self.recipe.training, state.global_step
        if self.processes.is_main_process:
            self._bar.update(config.batch_tokens)
        is_last = step == config.num_steps
        if step % config.log_every_steps == 0 or is_last:
            self._record_training(step, kwargs["optimizer"])
        if step % config.eval_every_steps == 0 or is_last:
            self._record_held_out(step, kwargs["model"])

    def close(self) -> None:
        """Closes the bar and the TensorBoard file, however the run ended."""
        self._open.close()

    def _record_training(self, step: int, optimizer: Any) -> None:
        loss = sum(self._losses) / len(self._losses)
        seconds = self.seconds - self._logged_seconds
        record = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / self.train_bytes_per_token,
            "tokens_per_s": len(self._losses) * self.recipe.training.batch_tokens / max(seconds, 1e-9),
        }
        if self.recipe.training.train != "values":
            record["lr"] = optimizer.param_groups[0]["lr"]
        if self.usages:
            record["value_lr"] = optimizer.param_groups[-1]["lr"]
        record |= usage_figures(self.usages)
        self._reset()
        if self.processes.is_main_process:
            self._bar.set_postfix(loss=f"{loss:.3f}", bpb=f"{record['bits_per_byte']:.3f}")
        self._write(step, "train", record)

    def _record_held_out(self, step: int, model: nn.Module) -> None:
        config = self.recipe.training
        together = self.processes.num_processes > 1
        figures = evaluate(
            model, self.held_out, self.held_out_bytes_per_token, max_tokens=config.eval_tokens, together=together
        )
        for usage in self.usages.values():
            usage.reset()  # the evaluation's reads are not the training's
        self._write(step, "held_out", figures)

    def _reset(self) -> None:
        self._losses, self._logged_seconds = [], self.seconds
        for usage in self.usages.values():
            usage.reset()

    def _write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        if not self.processes.is_main_process:
            return
        tokens = step * self.recipe.training.batch_tokens
        record = {"kind": kind, "step": step, "tokens": tokens, "seconds": self.seconds, **figures}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, figure in figures.items():
            self._board.add_scalar(f"{kind}/{name}", figure, step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a half-written last line is left out."""
    records = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_records_after(path: Path, step: int) -> None:
    """Forgets what was recorded after the checkpoint a run goes on from."""
    if path.exists():
        kept = [json.dumps(record) for record in read_metrics(path.parent) if record["step"] <= step]
        save_text(path, "".join(line + "\n" for line in kept))  # at once: a kill here loses no record


def _wait_for_a_later_name(board: Path) -> None:
    """Sleeps while a file of this second is there.

    TensorBoard reads its files by name, which begins with the second they were made in: of two from one second the
    resumed run's could come first, and lose its own records.
    """
    now = time.time()
    if any(file.name.split(".")[3] == f"{int(now):010d}" for file in board.glob("events.out.tfevents.*.*")):
        time.sleep(1 - now % 1)
