"""What other edits taught is asked again while another is learned, so that it stays."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.progress import Progress
from pkmem.editing.questions import BATCH_QUESTIONS, Question, as_questions
from pkmem.text.facts import Fact

_QUESTIONS = 400  # of all other edits together
_UNSURE_AT_ONCE, _SURE_AT_ONCE = 8, 2  # answers of an update


class Rehearsal:
    """Questions about what other edits taught, as far as they are answered right.

    Args:
        model: has all these edits.
        tokenizer: its tokenizer.
        lessons: what each edit taught and shall stay.
        seed: of which questions are asked, and of their order.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lessons: Sequence[Sequence[Fact]], seed: int
    ) -> None:
        draw = random.Random(seed)
        most = max(1, _QUESTIONS // max(1, len(lessons)))
        asked: list[tuple[int, Question]] = []
        for lesson, facts in enumerate(lessons):
            questions = as_questions(facts, tokenizer) if facts else []
            asked += [(lesson, question) for question in draw.sample(questions, min(most, len(questions)))]
        self._lessons = [lesson for lesson, _ in asked]
        self._progress = Progress([question for _, question in asked], BATCH_QUESTIONS, seed, circumstances_change=True)
        self._kept = sorted(self._progress.right) if self._check(model) else []

    def __len__(self) -> int:
        return len(self._kept)

    def ask_some(self, model: PreTrainedModel, inside: Sequence[int]) -> Tensor | float:
        """The mean loss of a few answers that edits taught which are in, most of them not sure.

        Args:
            model: to be asked.
            inside: which of the edits it has.
        """
        known = [place for place in self._kept if self._lessons[place] in inside]
        places = self._progress.next(known, _UNSURE_AT_ONCE, _SURE_AT_ONCE)
        return self._progress.ask(model, places).mean() if places else 0.0

    def check(self, model: PreTrainedModel) -> float:
        """Asks everything; returns the share that is right still, 1 where there is nothing."""
        self._check(model)
        return len(self._progress.right.intersection(self._kept)) / len(self._kept) if self._kept else 1.0

    def _check(self, model: PreTrainedModel) -> bool:
        """Asks everything, if there is anything."""
        if self._lessons:
            self._progress.check(model)
        return bool(self._lessons)
