"""What a training run is made of: the decoder, where its memories are, and how they are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pkmem.layer.config import MemoryConfig, require
from pkmem.lm.config import ModelConfig


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        num_tokens: training tokens in all.
        batch_tokens: tokens of one update, a multiple of model.context_tokens.
        micro_batches: backward passes an update is split into.
        lr: peak learning rate of everything but the values; bf16 weights are rounded to nearest, so that steps below
            about a thousandth of a weight are lost.
        value_lr: peak learning rate of the values (the paper's is 1e-3).
        schedule: "cosine", "linear", "inverse_sqrt" or "constant", after the warm-up.
        value_schedule: "same" as the rest, or "constant" as in the paper.
        warmup_share: share of the updates that warm up, in [0, 1).
        beta2: decay of Adam's second moment, in [0, 1).
        weight_decay: of matrices other than values, >= 0.
        max_norm: clip the gradient norm of everything but the values to this, > 0.
        value_grad: "rows" trains the read rows alone, at a cost that does not grow with the table; "dense"
            makes a gradient of the table's size.
        value_moments: what Adam keeps for the values: "fp32", both moments of each number, twice the table; "bf16", both
            in two bytes; "row", the first of each number and one second a row; "row_alone", one second moment a row;
            "row_adagrad", the sum of squares in its place, whatever beta2 is: a row's steps get shorter as it is read.
        columns: processes that share the columns of each value table; None: as many of a host's as divide its width.
        train: what moves: "values", the value tables alone; "memory", the memories' queries, keys and gates, too; or
            "all". What does not costs no gradient and no optimizer state.
        gradient_checkpointing: keep the hidden states between blocks alone, and compute what is inside again in the
            backward pass: less memory for a third more time.
        parallel: "ddp" holds everything but the tables on each process, "fsdp" splits it among them.
        precision: "fp32", or "bf16" autocast.
        seed: of weights, data order and dropout, >= 0.
        log_every_steps: updates from record to record, >= 1.
        eval_every_steps: updates from evaluation to evaluation, >= 1.
        checkpoint_every_steps: updates from checkpoint to checkpoint, >= 1.
        async_save: go on training while a checkpoint is written, from a copy of weights and optimizer in host memory.
        eval_tokens: held-out tokens of the evaluations during training, >= 1.
    """

    num_tokens: int = 3_000_000
    batch_tokens: int = 4096
    micro_batches: int = 1
    lr: float = 2e-3
    value_lr: float = 2e-3
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    value_schedule: Literal["same", "constant"] = "same"
    warmup_share: float = 0.05
    beta2: float = 0.98
    weight_decay: float = 0.0
    max_norm: float = 1.0
    value_grad: Literal["rows", "dense"] = "rows"
    value_moments: Literal["fp32", "bf16", "row", "row_alone", "row_adagrad"] = "fp32"
    train: Literal["values", "memory", "all"] = "all"
    gradient_checkpointing: bool = False
    columns: int | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    log_every_steps: int = 10
    eval_every_steps: int = 100
    checkpoint_every_steps: int = 500
    async_save: bool = False
    eval_tokens: int = 65_536

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_tokens", "micro_batches", "log_every_steps", "eval_every_steps"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), ">= 1")
        for name in ("checkpoint_every_steps", "eval_tokens"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), ">= 1")
        require(self.columns is None or self.columns >= 1, "training.columns", self.columns, "None or >= 1")
        for name in ("lr", "value_lr", "max_norm"):
            require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "> 0")
        for name in ("warmup_share", "beta2"):
            require(0 <= getattr(self, name) < 1, f"training.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), ">= 0")
        fits = self.value_grad == "rows" or self.value_moments == "fp32"
        require(fits, "training.value_moments", self.value_moments, "fp32 with training.value_grad=dense")

    @property
    def moment_bytes(self) -> tuple[int, int]:
        """What Adam keeps for the values: bytes of each number of a table, and of each row."""
        sizes = {"fp32": (8, 0), "bf16": (4, 0), "row": (4, 4), "row_alone": (0, 4), "row_adagrad": (0, 4)}
        return sizes[self.value_moments]

    @property
    def num_steps(self) -> int:
        """Updates in all, at least one."""
        return max(1, self.num_tokens // self.batch_tokens)


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        data: "python", "python+", a file, directory or glob, "hf:NAME", or "synthetic:facts:NUM".
        out: the run directory.
        tokenizer: a saved tokenizer's directory, or a name on the Hugging Face Hub; None trains a byte-level BPE, or
            takes that of model.pretrained.
        model: the decoder and where its memories are.
        memory: the shape and options of fresh memories; the width is the model's.
        training: how it is trained.
    """

    data: str = "python"
    out: Path = Path("runs/x")
    tokenizer: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        sequences, rest = divmod(self.training.batch_tokens, self.model.context_tokens)
        if rest or sequences % self.training.micro_batches:
            unit = self.model.context_tokens * self.training.micro_batches
            near = max(1, round(self.training.batch_tokens / unit)) * unit
            raise ValueError(
                f"training.batch_tokens is {self.training.batch_tokens} but must be a multiple of "
                f"context_tokens * micro_batches = {unit}: try {near}"
            )
        if self.model.pretrained is not None:
            for name, setting, default in (
                ("tokenizer", self.tokenizer, None),
                ("memory", self.memory, MemoryConfig()),
            ):
                if setting != default:
                    raise ValueError(
                        f"{name} cannot stand beside model.pretrained: leave it out, {self.model.pretrained} has its own "
                        "(`pkmem retrofit` makes memories)"
                    )
        elif self.training.train != "all" and not self.model.memory_layers:
            raise ValueError(
                f"training.train is {self.training.train!r} but model.memory_layers is empty: name a layer, or train 'all'"
            )
        for layer in self.model.memory_layers:
            if not 0 <= layer < self.model.num_layers:
                raise ValueError(
                    f"layer {layer} in model.memory_layers is outside [0, {self.model.num_layers}): "
                    "layers are counted from 0"
                )
            if self.model.memory_layers.count(layer) > 1:
                raise ValueError(f"layer {layer} is named twice in model.memory_layers")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, fit for YAML."""
        return asdict(self) | {"out": str(self.out)}

    @property
    def micro_batch_sequences(self) -> int:
        """Sequences of one backward pass."""
        return self.training.batch_tokens // self.model.context_tokens // self.training.micro_batches
