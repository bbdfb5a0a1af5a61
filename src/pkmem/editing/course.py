"""The course of a lesson: epochs of updates until the answers are right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pkmem.editing.averaging import RunningMean
from pkmem.editing.holding import Hold
from pkmem.editing.others import Others
from pkmem.editing.progress import Progress
from pkmem.editing.questions import Question
from pkmem.editing.reads import RowsInTraining
from pkmem.editing.rehearsal import Rehearsal
from pkmem.editing.rounding import rounded

_FEWEST_UPDATES = 6  # of an epoch: a short lesson is gone through several times
_CALMED = 0.95  # per epoch, the learning rate: late steps shall not undo what was learned before
_IN_TEXT = 0.5  # of the time
_FEWEST_DRAWN, _MOST_DRAWN = 4, 64  # times that some of the other edits are drawn to see whether answers hold
_ASKED_BESIDE_DRAWN, _ASKED_AT_LAST = 160, 640  # about so many answers, where the times are between those
_KNOWN_DRAWN = 4  # times that what others taught is asked beside some
_FIRM = 0.05  # nats per token, below which a right answer stays right beside others than those that were tried
_BESIDE_OTHERS = 4.0  # what answers weigh then against the hold, or it is long before they are firm
_MEAN_KEEPS = 0.9  # at an update, beside others: single updates make one answer or another infirm by chance
_HARD_KEPT = 8  # of several checks: what was mended for the last one alone is soon lost for the one before


class Course:
    """Updates the rows in training of a model.

    Args:
        model: whose memories read through `RowsInTraining`.
        questions: n, to be answered.
        in_text: by the place of a question the same in other text, one or more.
        hold: what holds the model to what it was.
        others: edits with and without which the questions shall be answered.
        known: what these taught and shall stay, None for nothing.
        lr, batch_size, seed: see `pkmem.learn`.

    Attributes:
        num_epochs, num_updates: so far.
        progress: which questions are answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        questions: Sequence[Question],
        in_text: dict[int, list[Question]],
        hold: Hold,
        others: Others,
        known: Rehearsal | None,
        lr: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.num_epochs = self.num_updates = 0
        self.progress = Progress(questions, batch_size, seed, firm=_FIRM if others.num else None)
        self._model, self._in_text, self._lr = model, in_text, lr
        self._hold, self._others, self._known = hold, others, known
        self._times = -(-_FEWEST_UPDATES // -(-len(questions) // batch_size))
        self._most_texts = max(map(len, in_text.values()), default=0)
        self._draw = torch.Generator().manual_seed(seed)
        # Edits beside which an answer did not hold when all were checked, latest first.
        self._hard: list[list[int]] = []
        self._asked_beside: list[list[int]] = []  # in the check that was made since the last update
        self._changes = [part.change for part in model.modules() if isinstance(part, RowsInTraining)]
        self._optimizer = torch.optim.Adam(self._changes, lr=lr, betas=(0.9, 0.98))
        self._mean = RunningMean(self._changes, _MEAN_KEEPS) if others.num else None

    def epoch(self) -> None:
        """An update for each batch of what is still to be learned; beside others the model then has the mean of the latest."""
        if self._mean is not None:
            self._mean.leave()
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * _CALMED**self.num_epochs
        for _ in range(self._times):
            for places in self.progress.epoch():
                inside = self._others.hold_some(self._draw, self._hard)
                loss = self._ask(places).mean()
                if self._known is not None:
                    loss = loss + self._known.ask_some(self._model, inside)
                if self._others.num:
                    loss = _BESIDE_OTHERS * loss
                (loss + self._hold.loss(self._model, self.num_epochs, self._draw)).backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                self.num_updates += 1
                if self._mean is not None:
                    self._mean.count()
        if self._mean is not None:
            self._mean.enter()
        self.num_epochs += 1

    def check(self, least: float = 0.0, at_last: bool = False) -> float:
        """Rounds the change as it will be kept, a byte for each number; returns the share of answers that are right then.

        Right is what is so whichever of the other edits are in, as far as was tried.

        Args:
            least: the check ends once it is clear that a smaller share than this is learned, in [0, 1].
            at_last: goes on with the check before, and tries more of them, as for what will not be learned any more.
        """
        if at_last and not self._others.num:
            return self.progress.share  # there is nothing else to try
        for change in self._changes:
            change.data = rounded(change.data)
        asked = _ASKED_AT_LAST if at_last else _ASKED_BESIDE_DRAWN
        times = min(max(asked // self.progress.num, _FEWEST_DRAWN), _MOST_DRAWN)
        before = self._asked_beside if at_last else []
        tried: list[list[int]] = []
        share = self.progress.check(self._model, (None for _ in self._in_turn(times, before, tried)), least, at_last)
        self._found_hard(tried, self.progress.hard)
        self._asked_beside = before + tried
        return share

    def _in_turn(self, times: int, before: Sequence[list[int]], tried: list[list[int]]) -> Iterator[list[int]]:
        """Beside what was hard, which is likeliest to be hard still, and then beside others; but for those of before."""
        for inside in [inside for inside in self._hard if inside not in before]:
            self._others.hold_only(inside)
            tried.append(inside)
            yield inside
        for inside in self._others.in_turn(self._draw, times, [*before, *tried]):
            tried.append(inside)
            yield inside

    @property
    def share_learned(self) -> float:
        """The least of the shares learned: of the questions, and of what the other edits taught."""
        known = 1.0 if self._known is None else self._known.share_learned
        return min(self.progress.share_learned, known)

    def check_known(self, least: float = 0.0) -> float:
        """The share that is right still of what the other edits taught, wherever they are in; `least` as for `check`."""
        if self._known is None:
            return 1.0
        tried: list[list[int]] = []
        share = self._known.check(self._model, self._known_in_turn(self._known, tried), least)
        self._found_hard(tried, self._known.hard)
        return share

    def _found_hard(self, tried: Sequence[list[int]], numbers: Sequence[int]) -> None:
        if not self._others.num:
            return  # a question is answered or not
        latest: list[list[int]] = []
        for inside in [*(tried[number] for number in reversed(numbers)), *self._hard]:
            if inside not in latest:
                latest.append(inside)
        self._hard = latest[:_HARD_KEPT]

    def _known_in_turn(self, known: Rehearsal, tried: list[list[int]]) -> Iterator[list[int]]:
        """Beside what was hard, where a check ends soonest; each edit alone; and then beside some and all of the others."""
        for inside in list(self._hard):
            self._others.hold_only(inside)
            tried.append(inside)
            yield known.places_of(inside)
        some = self._others.in_turn(self._draw, _KNOWN_DRAWN, tried)  # looks at those tried when it begins
        for inside in itertools.chain(self._others.one_by_one(), some):
            if inside not in tried:
                tried.append(inside)
                yield known.places_of(inside)

    def _ask(self, places: Sequence[int]) -> Tensor:
        """The losses of some questions: some as they stand, some in other text, which are longer."""
        alone: list[int] = []
        behind: list[int] = []
        for place, chance in zip(places, torch.rand(len(places), generator=self._draw).tolist(), strict=True):
            (behind if place in self._in_text and chance < _IN_TEXT else alone).append(place)
        losses = [self.progress.ask(self._model, alone)] if alone else []
        if behind:
            number = int(torch.randint(self._most_texts, (), generator=self._draw))
            asked = [self._in_text[place][number % len(self._in_text[place])] for place in behind]
            losses.append(self.progress.ask(self._model, behind, asked))
        return torch.cat(losses)
