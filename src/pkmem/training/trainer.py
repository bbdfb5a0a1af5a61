"""Hugging Face's Trainer for models with memories: Adam everywhere, by rows where a table is read."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from pkmem.layer.combined import CombinedOptimizer
from pkmem.layer.optim import RowAdam, dense_parameters
from pkmem.layer.values import Table, tables_in
from pkmem.training.checkpoint import open_shards
from pkmem.training.device import trains_on_cpu
from pkmem.training.export import save_description
from pkmem.training.journal import Journal
from pkmem.training.named_state import load_model, load_optimizer, model_tensors, optimizer_state
from pkmem.training.recipe import Recipe, TrainingConfig
from pkmem.training.saver import CheckpointSaver
from pkmem.training.state import load_state, rng_state, save_state, set_rng_state


class NonFiniteLossError(ValueError):
    """The loss or its gradient became NaN or infinite; nothing was updated with it."""


def _not_finite(what: str, value: float, step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what} is {value} at step {step}; nothing was updated with it: "
        "start a new --out with a lower training.lr or training.value_lr"
    )


def build_optimizer(model: nn.Module, config: TrainingConfig) -> CombinedOptimizer:
    """AdamW for everything but the values, and for the values RowAdam or a dense Adam; nothing for what is frozen."""
    betas = (0.9, config.beta2)
    dense = dense_parameters(model)
    groups = [
        {"params": [p for p in dense if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in dense if p.dim() <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = []
    if dense:
        parts.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True))
    if tables := tables_in(model):
        if config.value_grad == "rows":
            parts.append(_row_adam(tables, config))
        else:
            weights = [table.weight for table in tables]
            parts.append(torch.optim.AdamW(weights, lr=config.value_lr, betas=betas, weight_decay=0.0, fused=True))
    return CombinedOptimizer(*parts)


def _row_adam(tables: list[Table], config: TrainingConfig) -> RowAdam:
    betas = {"row_alone": (0.0, config.beta2), "row_adagrad": (0.0, 1.0)}
    return RowAdam(
        tables,
        lr=config.value_lr,
        betas=betas.get(config.value_moments, (0.9, config.beta2)),
        moment_dtype=torch.bfloat16 if config.value_moments == "bf16" else None,
        second_moment="row" if config.value_moments.startswith("row") else "element",
    )


def build_schedule(optimizer: CombinedOptimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule, over all parts or all but the values (`config.value_schedule`)."""
    if config.value_schedule == "constant" and config.train == "values":
        return get_scheduler("constant", optimizer)
    scheduled = optimizer if config.value_schedule == "same" else optimizer.optimizers[0]
    warmup_steps = math.ceil(config.warmup_share * config.num_steps)
    return get_scheduler(config.schedule, scheduled, warmup_steps, config.num_steps)


class _OneGpu(TrainingArguments):
    """One GPU a process: several would be DataParallel, which copies the model at every step; use torchrun."""

    @property
    def n_gpu(self) -> int:
        """At most 1."""
        return min(1, super().n_gpu)


class MemoryTrainer(Trainer):
    """Hugging Face's Trainer with row-wise values and checkpoints that are complete, verified and free of pickle."""

    optimizer: Any  # accelerate wraps it on the way

    def __init__(
        self,
        recipe: Recipe,
        batch_sequences: int,
        model: PreTrainedModel,
        blocks: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
    ) -> None:
        self.recipe, self.journal, self.saved_tokenizer = recipe, journal, tokenizer
        self.saver = CheckpointSaver(recipe.out, recipe.training.async_save)
        config, processes = recipe.training, PartialState()
        arguments = _OneGpu(
            output_dir=str(recipe.out),
            max_steps=config.num_steps,
            per_device_train_batch_size=batch_sequences,
            gradient_accumulation_steps=config.micro_batches,
            max_grad_norm=config.max_norm,
            bf16=config.precision == "bf16",
            use_cpu=trains_on_cpu(),  # or bf16 is refused there
            seed=config.seed + processes.process_index,  # of dropout; the weights are drawn
            ddp_find_unused_parameters=True,  # or DDP orders gradients anew after the first update of a run, and sums anew
            train_sampling_strategy="sequential",  # TokenBlocks shuffles, the same way after a resume
            logging_strategy="no",
            save_strategy="steps",
            save_steps=config.checkpoint_every_steps,
            logging_nan_inf_filter=False,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
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
        self.lr_scheduler = build_schedule(self._plain_optimizer(), self.recipe.training)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One backward pass; returns the loss, the mean over all processes.

        Raises:
            NonFiniteLossError: in all processes, before anything is updated.
        """
        loss: Tensor = reduce(super().training_step(model, inputs, num_items_in_batch), "mean")
        if not torch.isfinite(loss):
            raise _not_finite("the loss", loss.item(), self.state.global_step + 1)
        self.journal.add_loss(loss.item())
        return loss

    # Trainer has no public name for the next six: tests/test_private_names.py

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Splits the model where the recipe says so, which is all that accelerate would do then."""
        if self.recipe.training.parallel == "fsdp" and self.args.world_size > 1 and model is self.model:
            return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return super()._wrap_model(model, *args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clips all but the values by rows: see `TrainingConfig.max_norm`.

        Raises:
            NonFiniteLossError: in all processes, before anything is updated.
        """
        rows = self.recipe.training.value_grad == "rows"
        parameters = dense_parameters(model) if rows else list(model.parameters())
        if not parameters:  # the values are trained alone
            norm = torch.tensor(self._plain_optimizer().optimizers[0].grad_norm())
        else:
            norm = self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):  # in all processes alike: it is that of the mean over all of them
            raise _not_finite("the norm of the gradient", norm.item(), self.state.global_step + 1)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if hasattr(self.model, "reshard"):
            self.model.reshard()  # FSDP2 leaves the last weights of an evaluation whole, and under other names
        tensors, others = optimizer_state(self.model, self._plain_optimizer())
        states = {"optimizer": others, "schedule": self.lr_scheduler.state_dict(), "journal": self.journal.state()}
        states |= {f"random-{rank}": state for rank, state in enumerate(self.saver.together.each(rng_state))}
        states, progress = copy.deepcopy((states, self.state))  # training goes on where these are saved in background

        def write(folder: Path) -> None:
            save_description(folder, self.model, self.saved_tokenizer)
            for name, state in states.items():
                save_state(folder / f"{name}.json", state)
            progress.save_to_json(str(folder / TRAINER_STATE_NAME))

        named = {f"model.{name}": tensor for name, tensor in model_tensors(self.model).items()}
        named |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
        self.saver.save(self.state.global_step, named, write)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(self.model, open_shards(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            others = load_state(folder / "optimizer.json")
            load_optimizer(self.model, self._plain_optimizer(), open_shards(folder), others)
            self.lr_scheduler.load_state_dict(load_state(folder / "schedule.json"))
            self.journal.load_state(load_state(folder / "journal.json"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = Path(checkpoint) / f"random-{self.args.process_index}.json"
            if file.exists():  # or this process is more than there were: as it was seeded
                set_rng_state(load_state(file))

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
