"""Which questions a model answers by now, and which to ask next."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from pkmem.editing.questions import BATCH_QUESTIONS, Question, answer_losses
from pkmem.lm.evaluation import in_eval_mode

_SURE = 0.03  # nats per token, below which an answer needs no more teaching
_REVISITED = 0.15  # share of the questions with such an answer that an epoch asks again


class Progress:
    """Asks a model questions, and remembers how each was answered last.

    Args:
        questions: n of them.
        batch_size: questions of a batch, >= 1.
        seed: of the order.
        firm: where circumstances change, nats per token, below which a right answer counts as learned; and as sure it counts
            only after a check. None where they do not.

    Attributes:
        hard: the numbers of the circumstances of the last check, from 0, in which an answer was not learned.
    """

    def __init__(self, questions: Sequence[Question], batch_size: int, seed: int, firm: float | None = None) -> None:
        self._questions, self._batch_size = questions, batch_size
        self._firm = firm
        self.hard: list[int] = []
        self._draw = random.Random(seed)
        self._right: set[int] = set()
        self._learned: set[int] = set()
        self._sure: set[int] = set()

    @property
    def num(self) -> int:
        """How many questions."""
        return len(self._questions)

    @property
    def share(self) -> float:
        """The share of questions that were answered right when they were last asked, in [0, 1]."""
        return len(self._right) / len(self._questions)

    @property
    def share_learned(self) -> float:
        """The share of questions whose answers were right, and firm where circumstances change, in [0, 1]."""
        return len(self._learned) / len(self._questions)

    def epoch(self) -> Iterator[list[int]]:
        """The places of the questions of each batch: those without a sure answer, and some of the others again."""
        asked = [
            place
            for place in range(len(self._questions))
            if place not in self._sure or self._draw.random() < _REVISITED
        ]
        self._draw.shuffle(asked)
        for first in range(0, len(asked), self._batch_size):
            yield asked[first : first + self._batch_size]

    @property
    def right(self) -> frozenset[int]:
        """The places of the questions that were answered right when they were last asked."""
        return frozenset(self._right)

    def next(self, among: Sequence[int], most_unsure: int, most_sure: int) -> list[int]:
        """Some of these places, drawn: so many at most of those without a sure answer, and of the others."""
        drawn = self._draw.sample(among, len(among))
        unsure = [place for place in drawn if place not in self._sure]
        return unsure[:most_unsure] + [place for place in drawn if place in self._sure][:most_sure]

    def ask(self, model: Any, places: Sequence[int], instead: Sequence[Question] | None = None) -> Tensor:
        """Asks some questions; returns their answers' losses, nats per token, differentiable.

        Args:
            model: to be asked.
            places: of the questions.
            instead: what to ask instead of each, for the same answer; None asks as it stands.
        """
        losses, is_right = answer_losses(model, instead or [self._questions[place] for place in places])
        for place, loss, right in zip(places, losses.tolist(), is_right.tolist(), strict=True):
            learned = right and (self._firm is None or loss < self._firm)
            (self._right.add if right else self._right.discard)(place)
            (self._learned.add if learned else self._learned.discard)(place)
            if not (right and loss < _SURE):
                self._sure.discard(place)
            elif self._firm is None:
                self._sure.add(place)
        return losses

    def check(
        self,
        model: Any,
        circumstances: Iterable[Collection[int] | None] = (None,),
        least: float = 0.0,
        goes_on: bool = False,
    ) -> float:
        """Asks all questions, so that what was forgotten meanwhile is taught again; returns the share of right answers.

        Args:
            model: to be asked.
            circumstances: brings them about one after another, each with the places that are asked in it, None for all;
                an answer is right if it is wherever it is asked.
            least: the check ends once it is clear that a smaller share than this is learned, in [0, 1].
            goes_on: an answer must have been right in the check before, too, since when nothing was learned.
        """
        order = sorted(range(len(self._questions)), key=lambda place: len(self._questions[place].prompt))
        right, learned, sure = set(order), set(order), set(order)
        if goes_on:
            right, learned, sure = set(self._right), set(self._learned), set(self._sure)
        self.hard = []
        for number, wanted in enumerate(circumstances):
            asked = order if wanted is None else [place for place in order if place in wanted]
            self._sure.update(asked)  # until an answer is not
            with in_eval_mode(model):
                for first in range(0, len(asked), BATCH_QUESTIONS):
                    self.ask(model, asked[first : first + BATCH_QUESTIONS])
            if not self._learned.issuperset(asked):
                self.hard.append(number)
            right.difference_update(set(asked) - self._right)
            learned.difference_update(set(asked) - self._learned)
            sure.difference_update(set(asked) - self._sure)
            if len(learned) < least * len(order):
                if self._firm is not None:
                    sure.clear()  # nothing was tried in all circumstances
                break
        self._right, self._learned, self._sure = right, learned, sure
        return self.share
