"""Which rows of a model's tables to teach: those that the answers depend on and that other text reads least."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pkmem.editing.edit import Edit
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.questions import Question, answer_losses, batches
from pkmem.editing.reads import Reads, reading, rows_to_teach, tables_of, weight_of_rows
from pkmem.layer.memory import memories_in

_BESIDE_OTHERS = 100.0  # sharpness: edits whose rows other edits' questions read hang on each other


def choose_rows(
    model: PreTrainedModel, questions: Sequence[Question], elsewhere: Elsewhere, others: Iterable[Edit], most: int
) -> dict[str, Tensor]:
    """The rows to teach, by table: see `rows_to_teach`.

    A row matters as much as its weight times the gradient of the answers' losses in what the memory gives there.

    Args:
        model: with memories, nothing of which trains.
        questions: to be answered.
        elsewhere: whose reads count against a row.
        others: edits whose rows are not taken.
        most: how many rows to take in all, >= 1.

    Raises:
        ValueError: every row that the questions read belongs to another edit.
    """
    tables = tables_of(model)
    memories = list(memories_in(model).values())
    matter = [torch.zeros(len(memory.values.weight), dtype=torch.float64, device=model.device) for memory in memories]
    for batch in batches(sorted(questions, key=lambda question: len(question.prompt)), 32):
        found: dict[int, Reads] = {}
        with reading(model, found.__setitem__), _probing(memories) as probes:
            answer_losses(model, batch)[0].sum().backward()
        for place, (probe, mask) in probes.items():
            assert probe.grad is not None
            strength = probe.grad.flatten(0, -2).float().norm(dim=-1)
            strength = strength if mask is None else strength[mask.flatten()]
            read = Reads(found[place].slots, found[place].weights * strength[:, None])
            matter[place] += weight_of_rows(read, len(matter[place]))
    names = [next(name for name, table in tables.items() if table is memory.values) for memory in memories]
    background = [elsewhere.weight_of_rows(place, len(matter[place])) for place in range(len(memories))]
    others = list(others)
    sharpness = _BESIDE_OTHERS if others else 1.0
    rows = rows_to_teach(matter, background, names, [edit.rows for edit in others], most, sharpness)
    if not rows:
        raise ValueError(
            "every row that these facts read belongs to another edit: forget one, or retrofit with more sub-keys"
        )
    return rows


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
