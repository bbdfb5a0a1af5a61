"""What having an edit does to the answers that others taught, to first order.

What an edit adds to what a question reads, times the gradient of the answer's loss there, is about what the loss gains by
it. A draw of edits seldom has all that harm an answer, and the sum of their small harms is what makes it wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pkmem import ops
from pkmem.editing.edit import Edit
from pkmem.editing.questions import Question, batches
from pkmem.editing.reads import tables_of
from pkmem.editing.sensitivity import Sensitivity, sensitivities
from pkmem.layer.memory import memories_in


class _Changes(NamedTuple):
    """What edits change in a table.

    Args:
        place: (m,) int64 of each of its rows among the t that change, -1 for the others.
        owner: (t,) int64, the edit that changes it.
        change: (t, v) fp32.
    """

    place: Tensor
    owner: Tensor
    change: Tensor


class Effects:
    """What having each of some edits does to the losses of answers, to first order.

    Args:
        model: whose memories read from their tables.
        edits: e >= 0 of them, with rows of their own.

    Raises:
        ValueError: the model's tables cannot be taught: see `pkmem.editing.reads.tables_of`.
    """

    def __init__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        self._num_edits = len(edits)
        tables = tables_of(model)
        of_tables = {
            name: _changes(name, len(table.weight), edits, table.weight.device) for name, table in tables.items()
        }
        self._of_memories = [
            next(of_tables[name] for name, table in tables.items() if table is memory.values)
            for memory in memories_in(model).values()
        ]

    def on(self, model: PreTrainedModel, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """The losses of answers as they are, and what each edit adds to them by being in rather than out.

        Args:
            model: the one of these edits, with some of them in.
            questions: q >= 1 of them.

        Returns:
            (q,) losses and (q, e) what is added, both in nats per token.
        """
        losses, effects = [], []
        for batch in batches(questions):
            of_batch, parts = sensitivities(model, batch)
            added = of_batch.new_zeros(len(batch) * self._num_edits)
            for part, changes in zip(parts, self._of_memories, strict=True):
                if len(changes.owner):
                    _add_effects(added, part, changes, self._num_edits)
            losses.append(of_batch)
            effects.append(added.view(len(batch), self._num_edits))
        return torch.cat(losses), torch.cat(effects)


def _changes(name: str, num_slots: int, edits: Sequence[Edit], device: torch.device) -> _Changes:
    having = [(owner, edit) for owner, edit in enumerate(edits) if name in edit.rows]
    place = torch.full((num_slots,), -1, dtype=torch.int64)
    if not having:
        return _Changes(place.to(device), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0))
    rows = torch.cat([edit.rows[name] for _, edit in having])
    place[rows] = torch.arange(len(rows))
    owner = torch.cat([torch.full((len(edit.rows[name]),), owner) for owner, edit in having])
    change = torch.cat([edit.new[name].float() - edit.old[name].float() for _, edit in having])
    return _Changes(place.to(device), owner.to(device), change.to(device))


def _add_effects(added: Tensor, part: Sensitivity, changes: _Changes, num_edits: int) -> None:
    """Adds to `added` (q * e) what each edit does through one memory."""
    places = changes.place[part.reads.slots]
    each = ops.row_products(changes.change, places.clamp_min(0), part.gradient)
    each = (each * part.reads.weights * (places >= 0)).to(added.dtype)
    at = part.questions[:, None] * num_edits + changes.owner[places]  # -1 takes any owner, and adds 0
    added.index_add_(0, at.flatten(), each.flatten())
