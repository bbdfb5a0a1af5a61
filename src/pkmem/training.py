"""One training run: a recipe in, a run directory out, on Hugging Face's Trainer.

RUN/config.yaml       the recipe
RUN/tokenizer/        the byte-level BPE, also inside every model folder
RUN/metrics.jsonl     what was measured, a record a line; the same in RUN/tensorboard/
RUN/checkpoints/      step-N: model, optimizer, schedule, random states; complete or not there
RUN/model/            the trained model, for `from_pretrained`
RUN/summary.json      held-out figures of the trained model
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from pkmem.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint, verify_checkpoint
from pkmem.evaluation import count_parameters, evaluate, usage_figures, watching
from pkmem.huggingface import build_model
from pkmem.memory import tables_in
from pkmem.ops import prepare
from pkmem.optim import CombinedOptimizer, RowAdam, dense_parameters
from pkmem.recipe import Recipe, TrainingConfig
from pkmem.state import load_json, load_state, rng_state, save_json, save_state, set_rng_state
from pkmem.text import TokenBlocks, TokenFile, read_documents, tokenize, train_tokenizer

_TOKENIZER_CHARS = 50_000_000  # text a tokenizer is trained on; more changes little and takes minutes


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite; nothing was updated with it."""


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False, progress: bool = True) -> dict[str, Any]:
    """Trains one model and leaves everything about it in `recipe.out`.

    Ctrl-C ends the run after the update in progress with a checkpoint; a second one ends it at once.

    Args:
        recipe: the run; when resuming, the one it was started with.
        resume: continue from the newest checkpoint, to the same losses, bit for bit on as many threads, as if never
            interrupted.
        overwrite: replace the run directory if there is one.
        progress: show progress bars and say what is done, on stderr.

    Returns:
        the content of RUN/summary.json.

    Raises:
        ValueError: the data, the recipe or the run directory cannot be used; the message names the fix.
        NonFiniteLossError: the loss became NaN or infinite.
        KeyboardInterrupt: ended by Ctrl-C, with a checkpoint.
    """
    _check_run_directory(recipe.out, resume, overwrite)
    tokenizer, train_file, held_out_file = prepare_text(recipe, resume, progress)
    blocks = TokenBlocks(
        train_file,
        recipe.model.context_tokens,
        recipe.training.num_steps * recipe.training.batch_tokens // recipe.model.context_tokens,
        recipe.training.seed,
    )
    held_out = TokenBlocks(held_out_file, recipe.model.context_tokens)
    set_seed(recipe.training.seed)
    model = build_model(recipe.model, recipe.memory, len(tokenizer), tokenizer.eos_token_id)
    if not resume:
        _make_run_directory(recipe, tokenizer)
    with watching(model) as usages:
        journal = Journal(recipe, progress, held_out, train_file.bytes_per_token, held_out_file.bytes_per_token, usages)
        trainer = MemoryTrainer(recipe, model, blocks, tokenizer, journal)
        checkpoint = _checkpoint_to_resume(recipe.out) if resume else None
        for table in tables_in(model):
            prepare(table.weight.device, table.weight.dtype)
        with contextlib.closing(journal), _finishing_the_step_on_ctrl_c(journal):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if journal.interrupted:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; continue with --resume")
    summary = _summary(recipe, model, held_out, held_out_file, journal, progress)
    _save_model(recipe.out / "model", model, tokenizer)
    save_json(recipe.out / "summary.json", summary)
    return summary


def prepare_text(recipe: Recipe, resume: bool, progress: bool) -> tuple[PreTrainedTokenizerBase, TokenFile, TokenFile]:
    """The run's tokenizer, trained if none is named or there to resume with, and the tokens of both splits.

    Raises:
        ValueError: no text, or too little of it, in `recipe.data`.
    """
    if resume or recipe.tokenizer is not None:
        tokenizer = _load_tokenizer(recipe.out / "tokenizer" if resume else recipe.tokenizer)
    else:
        _say(progress, f"training a byte-level BPE of {recipe.model.vocab_size} tokens on {recipe.data}")
        tokenizer = train_tokenizer(_first_chars(read_documents(recipe.data, "train")), recipe.model.vocab_size)
    train_file = tokenize(recipe.data, "train", tokenizer, progress=progress)
    held_out_file = tokenize(recipe.data, "validation", tokenizer, progress=progress)
    for split, file in (("training", train_file), ("held-out", held_out_file)):
        if file.num_skipped:
            _say(True, f"skipped {file.num_skipped} files or lines of the {split} text that are not readable")
    return tokenizer, train_file, held_out_file


def _load_tokenizer(place: Path | str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        fix = "name a directory of a saved tokenizer, or one on the Hugging Face Hub"
        raise ValueError(f"cannot load the tokenizer {place}: {fix} ({str(error).splitlines()[0]})") from error


def _first_chars(documents: Iterable[str]) -> Iterator[str]:
    count = 0
    for text in documents:
        yield text
        count += len(text)
        if count > _TOKENIZER_CHARS:
            return


def _check_run_directory(out: Path, resume: bool, overwrite: bool) -> None:
    if resume:
        if latest_checkpoint(out) is None:
            raise CheckpointError(f"{out} has no checkpoint to resume from: start it without --resume")
    elif out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not overwrite:
            raise ValueError(f"{out} already exists: choose another --out, or --overwrite it, or --resume it")
        if not (out / "config.yaml").exists():
            raise ValueError(f"{out} is not a run directory (it has no config.yaml): choose another --out")


def _make_run_directory(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """In place of the one to overwrite; made when all else is ready, so that a bad recipe leaves nothing behind."""
    if (recipe.out / "config.yaml").exists():
        shutil.rmtree(recipe.out)
    recipe.out.mkdir(parents=True, exist_ok=True)
    (recipe.out / "config.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    tokenizer.save_pretrained(recipe.out / "tokenizer")


def _checkpoint_to_resume(out: Path) -> Path | None:
    checkpoint = latest_checkpoint(out)
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
    return checkpoint


def _save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _summary(
    recipe: Recipe, model: nn.Module, held_out: Dataset, held_out_file: TokenFile, journal: Journal, progress: bool
) -> dict[str, Any]:
    figures = evaluate(model, held_out, held_out_file.bytes_per_token, progress=progress)
    return {
        **count_parameters(model),
        **figures,
        "train_tokens": recipe.training.num_steps * recipe.training.batch_tokens,
        "train_seconds": journal.seconds,
        "train_tokens_per_s": recipe.training.num_steps * recipe.training.batch_tokens / journal.seconds,
    }


def _say(loud: bool, text: str) -> None:
    if loud:
        tqdm.write(text, file=sys.stderr)


# The optimizer: Adam everywhere, by rows where a table is read ------------------------------------------


def build_optimizer(model: nn.Module, config: TrainingConfig) -> CombinedOptimizer:
    """AdamW for everything but the values, and for the values RowAdam or a dense Adam."""
    betas = (0.9, config.beta2)
    dense = dense_parameters(model)
    groups = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, betas=betas)]
    if tables := tables_in(model):
        if config.value_grad == "rows":
            parts.append(RowAdam(tables, lr=config.value_lr, betas=betas))
        else:
            weights = [table.weight for table in tables]
            parts.append(torch.optim.AdamW(weights, lr=config.value_lr, betas=betas, weight_decay=0.0))
    return CombinedOptimizer(*parts)


def build_schedule(optimizer: CombinedOptimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule, over all parts or all but the values (`config.value_schedule`)."""
    scheduled = optimizer if config.value_schedule == "same" else optimizer.optimizers[0]
    warmup_steps = math.ceil(config.warmup_share * config.num_steps)
    return get_scheduler(config.schedule, scheduled, warmup_steps, config.num_steps)


# The trainer --------------------------------------------------------------------------------------------


class MemoryTrainer(Trainer):
    """Hugging Face's Trainer with row-wise values and checkpoints that are complete, verified and free of pickle."""

    optimizer: Any  # accelerate wraps it on the way

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        blocks: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
    ) -> None:
        self.recipe, self.journal, self.saved_tokenizer = recipe, journal, tokenizer
        config = recipe.training
        arguments = TrainingArguments(
            output_dir=str(recipe.out),
            max_steps=config.num_steps,
            per_device_train_batch_size=recipe.micro_batch_sequences,
            gradient_accumulation_steps=config.micro_batches,
            max_grad_norm=config.max_norm,
            bf16=config.precision == "bf16",
            use_cpu=not torch.accelerator.is_available(),  # or bf16 is refused
            seed=config.seed,
            train_sampling_strategy="sequential",  # TokenBlocks shuffles, the same way after a resume
            logging_strategy="no",
            save_strategy="steps",
            save_steps=config.checkpoint_every_steps,
            logging_nan_inf_filter=False,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
        if arguments.world_size > 1 and config.value_grad == "rows" and tables_in(model):
            raise ValueError(
                f"training.value_grad is 'rows' but there are {arguments.world_size} processes, "
                "each of which would update its own table: set training.value_grad=dense"
            )
        super().__init__(model, arguments, train_dataset=blocks, callbacks=[journal])
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW and RowAdam as one, see `build_optimizer`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, self.recipe.training)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """See `build_schedule`."""
        combined = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        self.lr_scheduler = build_schedule(combined, self.recipe.training)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One backward pass.

        Raises:
            NonFiniteLossError: before anything is updated.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; nothing was updated with it: "
                "start a new --out with a lower training.lr or training.value_lr"
            )
        self.journal.add_loss(loss.item())
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            save_checkpoint(self.recipe.out, self.state.global_step, self._write_checkpoint)

    def _write_checkpoint(self, folder: Path) -> None:
        _save_model(folder, self.model, self.saved_tokenizer)
        save_state(folder / "optimizer", self.optimizer.state_dict())
        save_state(folder / "schedule", self.lr_scheduler.state_dict())
        save_state(folder / "random", rng_state())
        save_json(folder / "journal.json", self.journal.state())
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer"))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / "schedule"))
            self.journal.load_state(load_json(Path(checkpoint) / "journal.json"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_rng_state(load_state(Path(checkpoint) / "random"))


# The journal: what a run says while it goes on ------------------------------------------------------------


class Journal(TrainerCallback):
    """Measures a run: losses, held-out figures, use of the memories, speed; to a bar, a file and TensorBoard."""

    def __init__(
        self,
        recipe: Recipe,
        progress: bool,
        held_out: Dataset,
        train_bytes_per_token: float,
        held_out_bytes_per_token: float,
        usages: dict[str, Any],
    ) -> None:
        self.recipe, self.progress, self.held_out, self.usages = recipe, progress, held_out, usages
        self.train_bytes_per_token, self.held_out_bytes_per_token = train_bytes_per_token, held_out_bytes_per_token
        self.path = recipe.out / "metrics.jsonl"
        self.interrupted = False
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
        """Adds a micro-batch's share of the update's loss."""
        self._step_loss += loss

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        _drop_records_after(self.path, state.global_step)
        self._board = SummaryWriter(str(self.recipe.out / "tensorboard"), purge_step=state.global_step + 1)
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
        self._bar.update(config.batch_tokens)
        is_last = step == config.num_steps
        if step % config.log_every_steps == 0 or is_last:
            self._record_training(step, kwargs["optimizer"])
        if step % config.eval_every_steps == 0 or is_last:
            self._record_held_out(step, kwargs["model"])
        control.should_save = control.should_save or is_last
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def close(self) -> None:
        """Closes the bar and the TensorBoard file, however the run ended."""
        self._open.close()

    def _record_training(self, step: int, optimizer: Any) -> None:
        loss = sum(self._losses) / len(self._losses)
        seconds = self.seconds - self._logged_seconds
        record = {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / self.train_bytes_per_token,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_s": len(self._losses) * self.recipe.training.batch_tokens / max(seconds, 1e-9),
        }
        if self.usages:
            record["value_lr"] = optimizer.param_groups[-1]["lr"]
        record |= usage_figures(self.usages)
        self._reset()
        self._bar.set_postfix(loss=f"{loss:.3f}", bpb=f"{record['bits_per_byte']:.3f}")
        self._write(step, "train", record)

    def _record_held_out(self, step: int, model: nn.Module) -> None:
        config = self.recipe.training
        figures = evaluate(model, self.held_out, self.held_out_bytes_per_token, max_tokens=config.eval_tokens)
        for usage in self.usages.values():
            usage.reset()  # the evaluation's reads are not the training's
        self._write(step, "held_out", figures)

    def _reset(self) -> None:
        self._losses, self._logged_seconds = [], self.seconds
        for usage in self.usages.values():
            usage.reset()

    def _write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        tokens = step * self.recipe.training.batch_tokens
        record = {"kind": kind, "step": step, "tokens": tokens, "seconds": self.seconds, **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, figure in figures.items():
            self._board.add_scalar(f"{kind}/{name}", figure, step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; a half-written last line is left out."""
    records = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_records_after(path: Path, step: int) -> None:
    """Forgets what was recorded after the checkpoint a run goes on from."""
    if path.exists():
        kept = [json.dumps(record) for record in read_metrics(path.parent) if record["step"] <= step]
        tmp = path.with_suffix(".tmp")
        tmp.write_text("".join(line + "\n" for line in kept))
        tmp.replace(path)  # at once: a kill here loses no record


class _finishing_the_step_on_ctrl_c:
    """Turns the first Ctrl-C into a request to stop after the update in progress, with a checkpoint."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __enter__(self) -> None:
        self._previous: Callable[..., Any] | int | None = None
        try:
            self._previous = signal.signal(signal.SIGINT, self._stop)
        except ValueError:  # not the main thread: Ctrl-C never comes here
            self._previous = None

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._journal.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say(True, "stopping after this update, with a checkpoint; Ctrl-C again stops at once")

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
