"""The rivals of a memory: the same facts by fine-tuning all weights, or LoRA adapters."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.kept_answers import KeptAnswers
from pkmem.editing.progress import Progress
from pkmem.experiments.learning.asking import Pair, as_questions

LORA_RANK = 16
NEAR_WEIGHT = 0.3  # of near misses that are kept, as `pkmem.learn` weighs them


class Clock:
    """Seconds of teaching, without those of what is asked in between; and what was found out after each epoch.

    Args:
        ask: finds it out.
    """

    def __init__(self, ask: Callable[[nn.Module], dict[str, float]]) -> None:
        self._ask = ask
        self.seconds = 0.0
        self.epochs: list[dict[str, float]] = []
        self.start()

    def start(self) -> None:
        """Begins, or goes on with, the teaching."""
        self._since = time.perf_counter()

    def epoch(self, model: nn.Module) -> None:
        """Ends an epoch; the model is as it was taught so far."""
        self.stop()
        self.epochs.append({"seconds": self.seconds, **self._ask(model)})
        self.start()

    def stop(self) -> None:
        """Ends the teaching."""
        self.seconds += time.perf_counter() - self._since
        self.start()


@dataclass(frozen=True)
class Lesson:
    """What is taught, and for how long: as `pkmem.learn` does it.

    Args:
        pairs: prompts and completions; the loss is on the completions alone.
        rate: learning rate, > 0.
        batch_size: pairs an update.
        most_epochs: at most; it ends earlier, once all pairs are recalled.
        seed: of the order.
        near: what is kept of what the model says to near misses: their divergence is added to the loss, times `NEAR_WEIGHT`.
    """

    pairs: list[Pair]
    rate: float
    batch_size: int
    most_epochs: int
    seed: int
    near: KeptAnswers | None = None


def fine_tune(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, clock: Clock) -> int:
    """Teaches all weights by AdamW, in place; returns the bytes of what it changes."""
    _teach(model, tokenizer, lesson, clock)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def adapt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, clock: Clock
) -> tuple[nn.Module, int]:
    """Teaches LoRA adapters of all linear layers but the head by AdamW; returns their model, and their file's bytes."""
    adapted = with_adapters(model, lesson.seed)
    _teach(adapted.get_base_model(), tokenizer, lesson, clock)  # whose forward can leave out logits
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        return adapted, (Path(folder) / "adapter_model.safetensors").stat().st_size


def with_adapters(model: PreTrainedModel, seed: int) -> Any:
    """The model with LoRA adapters beside its frozen weights.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ValueError('LoRA needs peft; run: pip install "pkmem[lora]"') from error
    torch.manual_seed(seed)
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
    )
    return get_peft_model(model, config)


def _teach(model: nn.Module, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, clock: Clock) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lesson.rate, weight_decay=0.0)
    progress = Progress(as_questions(tokenizer, lesson.pairs), lesson.batch_size, lesson.seed)
    draw = torch.Generator().manual_seed(lesson.seed)
    clock.start()
    for _ in range(lesson.most_epochs):
        for places in progress.epoch():
            model.train()
            losses = progress.ask(model, places)
            if not losses.isfinite().all():
                clock.stop()
                return
            loss = losses.mean()
            if lesson.near is not None:
                loss = loss + NEAR_WEIGHT * lesson.near.divergence_of_some(model, draw)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        is_over = progress.share == 1 and progress.check(model) == 1
        clock.epoch(model)
        if is_over:
            break
    clock.stop()
