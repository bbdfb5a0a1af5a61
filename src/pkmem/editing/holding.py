"""What holds a model to what it was while it is taught."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.reads import RowsInTraining
from pkmem.layer.memory import memories_in

_RELAXED = 0.85  # per epoch: facts that are hard to tell from near misses are learned later, with less of a hold
_TOKENS = 1024  # of the background, and of near misses, whose reads an update looks at
_NATS = 0.03  # a nat by which an answer to a near miss has changed, in units of what near misses read added


class Hold:
    """A loss that grows as a model changes elsewhere than it shall.

    Args:
        elsewhere: what shall stay.
        keep_background: what the rows add to the background weighs at first, >= 0; less every epoch.
        keep_near: what they add to near misses weighs at first, and what the model says to these always, >= 0.
    """

    def __init__(self, elsewhere: Elsewhere, keep_background: float, keep_near: float) -> None:
        self._reads = [(keep_background, elsewhere.background)]
        if elsewhere.near is not None:
            self._reads.append((keep_near, elsewhere.near))
        self._energy = elsewhere.energy
        self._keep_near, self._near_answers = keep_near, elsewhere.near_answers

    def loss(self, model: PreTrainedModel, num_epochs: int, draw: torch.Generator) -> Tensor | float:
        """How far a model has come from what it was, as some tokens and near misses show, () differentiable.

        Args:
            model: whose memories read through `RowsInTraining`.
            num_epochs: that were taught before.
            draw: of tokens and near misses.
        """
        return self._added(model, _RELAXED**num_epochs, draw) + self._changed(model, draw)

    def _added(self, model: PreTrainedModel, relaxed: float, draw: torch.Generator) -> Tensor | float:
        """The energy of what the rows add to what is read, over that of what is there."""
        added: Tensor | float = 0.0
        parts = [memory.values for memory in memories_in(model).values()]
        for weight, of_memories in self._reads:
            for part, reads, energy in zip(parts, of_memories, self._energy, strict=True):
                if weight and isinstance(part, RowsInTraining):
                    some = torch.randint(len(reads.slots), (_TOKENS,), generator=draw).to(reads.slots.device)
                    there = part.changed(reads.slots[some], reads.weights[some])
                    added = added + weight * relaxed * there.square().sum(-1).mean() / energy
        return added

    def _changed(self, model: PreTrainedModel, draw: torch.Generator) -> Tensor | float:
        """How far what the model says to some near misses is from what it said."""
        if self._near_answers is None or not self._keep_near:
            return 0.0
        return _NATS * self._keep_near * self._near_answers.divergence_of_some(model, draw)
