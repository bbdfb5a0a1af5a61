"""Which rows of a model's tables to teach: those that the answers depend on and that other text reads least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pkmem.editing.edit import Edit
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.questions import Question, batches
from pkmem.editing.reads import Reads, rows_to_teach, tables_of, weight_of_rows
from pkmem.editing.sensitivity import sensitivities
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
        for weight_of, part in zip(matter, sensitivities(model, batch), strict=True):
            weights = part.reads.weights * part.gradient.norm(dim=-1, keepdim=True)
            weight_of += weight_of_rows(Reads(part.reads.slots, weights), len(weight_of))
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
