"""What a model says where answers stand, and how far it has come from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pkmem.editing.questions import BATCH_QUESTIONS, NO_LABEL, Question, answer_logits, batches

_MOST_TOKENS = (
    64  # whose probabilities are kept one by one; the others count as one, which keeps large vocabularies small
)

_ASKED_AT_ONCE = 8


class _Said(NamedTuple):
    """At each of the k tokens of an answer: (k, c) the likeliest next tokens, (k, c + 1) log-probabilities of these and of all others."""

    tokens: Tensor
    logs: Tensor


class KeptAnswers:
    """What a model says where the answers of some questions stand, so that it can be held to it.

    Args:
        model: as it is now.
        questions: n of them.
    """

    def __init__(self, model: PreTrainedModel, questions: Sequence[Question]) -> None:
        self._questions = sorted(questions, key=lambda question: len(question.prompt))
        self._said: list[_Said] = []
        with torch.no_grad():
            for batch in batches(self._questions, BATCH_QUESTIONS):
                for logs in _log_probabilities(model, batch):
                    tokens = logs.topk(min(_MOST_TOKENS, logs.shape[-1])).indices
                    self._said.append(_Said(tokens, _of(logs, tokens)))

    def __len__(self) -> int:
        return len(self._questions)

    def divergence_of_some(self, model: PreTrainedModel, draw: torch.Generator) -> Tensor:
        """The divergence for a few of the questions, drawn; they are of a like length, so that little is padded."""
        num = len(self._questions)
        first = int(torch.randint(num, (), generator=draw))
        return self.divergence(model, [place % num for place in range(first, first + min(_ASKED_AT_ONCE, num))])

    def divergence(self, model: PreTrainedModel, places: Sequence[int]) -> Tensor:
        """How far what a model says is from what was said: KL in nats per answer, summed over its tokens, () differentiable.

        Args:
            model: the one before, changed.
            places: of the questions to ask, each in [0, n).
        """
        asked = [self._questions[place] for place in places]
        said = [self._said[place] for place in places]
        each = [
            (before.logs.exp() * (before.logs - _of(logs, before.tokens))).sum()
            for before, logs in zip(said, _log_probabilities(model, asked), strict=True)
        ]
        return torch.stack(each).mean()


def _log_probabilities(model: PreTrainedModel, questions: Sequence[Question]) -> list[Tensor]:
    """Of each question (k, vocabulary), at each token of its answer."""
    logits, labels = answer_logits(model, questions)
    return [own[counts].log_softmax(-1) for own, counts in zip(logits, labels != NO_LABEL, strict=True)]


def _of(logs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (k, c + 1) of tokens (k, c) and of all others together."""
    these = logs.gather(-1, tokens)
    others = (1 - these.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([these, others], -1)
