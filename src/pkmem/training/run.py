"""One training run: a recipe in, a run directory out, on Hugging Face's Trainer.

RUN/config.yaml       the recipe
RUN/tokenizer/        the byte-level BPE, also inside every model folder
RUN/metrics.jsonl     what was measured, a record a line; the same in RUN/tensorboard/
RUN/checkpoints/      step-N: model, optimizer, schedule, random states; complete or not there
RUN/model/            the trained model, for `from_pretrained`
RUN/summary.json      held-out figures of the trained model; of facts (synthetic:facts:NUM) what it recalls as well
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from pkmem.files.documents import save_json
from pkmem.layer.counting import count_parameters
from pkmem.layer.drawing import undrawn_tables
from pkmem.layer.sharding import shard_values
from pkmem.layer.usage import watching
from pkmem.layer.values import tables_in
from pkmem.lm.evaluation import evaluate
from pkmem.lm.recall import measure_recall
from pkmem.ops import prepare
from pkmem.text import TokenBlocks, TokenFile
from pkmem.text.synthetic import SYNTHETIC, SyntheticFacts
from pkmem.training.device import trains_on_cpu
from pkmem.training.export import export_checkpoint
from pkmem.training.journal import Journal
from pkmem.training.parallel import split_dense_part, table_mesh
from pkmem.training.prepare import make_run_directory, prepare_run, say
from pkmem.training.processes import ending_together, group_after_restart
from pkmem.training.recipe import Recipe
from pkmem.training.start import starting_model
from pkmem.training.trainer import MemoryTrainer

_LONGEST_WAIT = timedelta(days=1)  # for the process that reads the text, evaluates or saves

T = TypeVar("T")


def train(
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    change: Callable[[PreTrainedModel], object] | None = None,
) -> dict[str, Any]:
    """Trains one model and leaves everything about it in `recipe.out`.

    Ctrl-C or SIGTERM ends the run after the update in progress with a checkpoint; a second one ends it at once.

    Several processes (torchrun) share the batch of each update and the columns of the tables; they all see the run
    directory and the token cache, and the first one writes there. A run may be resumed on another number of them.

    Args:
        recipe: the run; when resuming, the one it was started with.
        resume: continue from the newest checkpoint, to the same losses, bit for bit on as many threads, as if never
            interrupted. Where there is none it is an error, but under a torchrun that restarts what failed the run
            starts: its command is the same each time.
        overwrite: replace the run directory if there is one.
        progress: show progress bars and say what is done, on stderr.
        change: puts parts of one's own into the model before it is trained, the same ones whenever the run is resumed;
            they train, whatever `training.train` says. RUN/model knows the recipe alone: to load it is then the
            caller's task. None leaves the model as its recipe says.

    Returns:
        the content of RUN/summary.json.

    Raises:
        ValueError: the data, the recipe or the run directory cannot be used; the message names the fix.
        NonFiniteLossError: the loss became NaN or infinite.
        KeyboardInterrupt: ended by Ctrl-C or SIGTERM, with a checkpoint.
        LostProcessError: another process of the run ended before its time, or its host is out of reach.
    """
    group = group_after_restart(_LONGEST_WAIT)
    processes = PartialState(cpu=trains_on_cpu(), timeout=_LONGEST_WAIT, **group)
    with ending_together():
        return _train(recipe, resume, overwrite, progress, processes, change)


def _train(
    recipe: Recipe,
    resume: bool,
    overwrite: bool,
    progress: bool,
    processes: PartialState,
    change: Callable[[PreTrainedModel], object] | None,
) -> dict[str, Any]:
    sequences = sequences_per_process(recipe, processes.num_processes)
    progress = progress and processes.is_main_process
    tokenizer, train_file, held_out_file, checkpoint = _by_first_process(
        lambda: prepare_run(recipe, resume, overwrite, progress)
    )
    blocks = TokenBlocks(
        train_file,
        recipe.model.context_tokens,
        recipe.training.num_steps * recipe.training.batch_tokens // recipe.model.context_tokens,
        recipe.training.seed,
    )
    held_out = TokenBlocks(held_out_file, recipe.model.context_tokens)
    mesh = table_mesh(recipe, processes.num_processes, processes.device)
    set_seed(recipe.training.seed)
    with contextlib.nullcontext() if mesh is None else undrawn_tables():
        model = starting_model(recipe, tokenizer, checkpoint)
        if change is not None:
            change(model)
    if mesh is not None:
        shard_values(model, mesh)
    if recipe.training.parallel == "fsdp" and processes.num_processes > 1:
        split_dense_part(model)
    if processes.is_main_process and checkpoint is None:
        make_run_directory(recipe, tokenizer)
    with watching(model) as usages:
        journal = Journal(
            recipe, progress, processes, held_out, train_file.bytes_per_token, held_out_file.bytes_per_token, usages
        )
        trainer = MemoryTrainer(recipe, sequences, model, blocks, tokenizer, journal)
        stop = _StopWhenAsked(loud=processes.is_main_process)
        trainer.add_callback(stop)
        for table in tables_in(model):
            prepare(table.weight.device, table.weight.dtype)
        with contextlib.closing(journal), trainer.saver, stop:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; continue with --resume")
    return _finish(recipe, model, tokenizer, held_out, held_out_file, journal, progress)


def sequences_per_process(recipe: Recipe, num_processes: int) -> int:
    """Sequences of one backward pass in each of several processes, which share `recipe.micro_batch_sequences`.

    Args:
        recipe: the run.
        num_processes: processes that train it together, >= 1.

    Returns:
        sequences, at least 1.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    sequences, rest = divmod(recipe.micro_batch_sequences, num_processes)
    if rest:
        unit = recipe.model.context_tokens * recipe.training.micro_batches * num_processes
        near = max(1, round(recipe.training.batch_tokens / unit)) * unit
        raise ValueError(
            f"training.batch_tokens is {recipe.training.batch_tokens} but must be a multiple of context_tokens * "
            f"micro_batches * {num_processes} processes = {unit}: try {near}, or another number of processes"
        )
    return sequences


def _by_first_process(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in all processes; the first one does it while the others wait."""
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


def _finish(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Dataset,
    held_out_file: TokenFile,
    journal: Journal,
    progress: bool,
) -> dict[str, Any]:
    """Evaluates and saves the trained model, all processes together; returns the summary."""
    together = PartialState().num_processes > 1
    train_tokens = recipe.training.num_steps * recipe.training.batch_tokens
    summary = {
        **count_parameters(model),
        **evaluate(model, held_out, held_out_file.bytes_per_token, progress=progress, together=together),
        "train_tokens": train_tokens,
        "train_seconds": journal.seconds,
        "train_tokens_per_s": train_tokens / journal.seconds,
    }
    final = recipe.out / "checkpoints" / f"step-{recipe.training.num_steps}"
    _by_first_process(lambda: export_checkpoint(final, recipe.out / "model", overwrite=True))
    if recipe.data.startswith(SYNTHETIC):
        try:
            summary |= measure_recall(model, tokenizer, SyntheticFacts.named(recipe.data), progress)
        except ValueError as error:  # such as a context too short for a fact: the model is trained all the same
            say(PartialState().is_main_process, f"what it recalls was not measured: {error}")
    _by_first_process(lambda: save_json(recipe.out / "summary.json", summary))
    return summary


class _StopWhenAsked(TrainerCallback):
    """Inside a `with` block, Ctrl-C or SIGTERM ends training after the update in progress, with a checkpoint.

    The second of a kind ends it at once. A signal may reach one process in an update and another in the next: they
    agree, so that all stop after the same one.
    """

    def __init__(self, loud: bool) -> None:
        self._loud = loud
        self._asked = False
        self._previous: dict[int, Callable[..., Any] | int | None] = {}
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopped = bool(reduce(torch.tensor(float(self._asked), device=args.device), "sum"))
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: signals never come here
                self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signum, signal.default_int_handler)
        say(self._loud, "stopping after this update, with a checkpoint; Ctrl-C again stops at once")

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
