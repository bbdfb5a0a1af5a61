"""How much the losses of answers depend on what memories give: to first order, on each row that was read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pkmem.editing.questions import Question, answer_losses
from pkmem.editing.reads import Reads, reading
from pkmem.layer.memory import memories_in


class Sensitivity(NamedTuple):
    """Of one memory, for n tokens of some questions.

    Args:
        reads: what it read there.
        gradient: (n, v) of the questions' losses in what it gave.
    """

    reads: Reads
    gradient: Tensor


def sensitivities(model: PreTrainedModel, questions: Sequence[Question]) -> list[Sensitivity]:
    """What each memory has to do with the losses of some answers.

    Args:
        model: with memories, all of which it reads.
        questions: q >= 1 of them, in one batch.

    Returns:
        of each memory, in the order of `memories_in`, its reads and the gradient there.
    """
    found: dict[int, Reads] = {}
    memories = list(memories_in(model).values())
    with torch.enable_grad(), reading(model, found.__setitem__), _probing(memories) as probes:
        losses, _ = answer_losses(model, questions)
        gradients = torch.autograd.grad(losses.sum(), [probes[place][0] for place in range(len(memories))])
    made = []
    for place, gradient in enumerate(gradients):
        mask = probes[place][1]
        flat = gradient.flatten(0, -2).float()
        made.append(Sensitivity(found[place], flat if mask is None else flat[mask.flatten()]))
    return made


@contextlib.contextmanager
def _probing(memories: Sequence[nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor | None]]]:
    """Within the block each memory adds zeros to what it gives, whose gradient is that of its output; and its mask."""
    probes: dict[int, tuple[Tensor, Tensor | None]] = {}

    def probed(place: int, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        probes[place] = probe, args[1] if len(args) > 1 else None
        return out + probe

    hooks = [
        memory.register_forward_hook(lambda _, args, out, place=place: probed(place, args, out))
        for place, memory in enumerate(memories)
    ]
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()
