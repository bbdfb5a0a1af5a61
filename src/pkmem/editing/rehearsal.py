"""What other edits taught is asked again while another is learned, so that it stays."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.progress import Progress
from pkmem.editing.questions import BATCH_QUESTIONS, Question, answer_losses, as_questions, batches
from pkmem.text.facts import Fact

_QUESTIONS = 400  # of all other edits together
_ASKED_AT_ONCE = 8


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
        asked.sort(key=lambda pair: len(pair[1].prompt))
        with torch.no_grad():
            right = [
                is_right
                for batch in batches([question for _, question in asked], BATCH_QUESTIONS)
                for is_right in answer_losses(model, batch)[1].tolist()
            ]
        kept = [pair for pair, is_right in zip(asked, right, strict=True) if is_right]
        self._lessons = [lesson for lesson, _ in kept]
        self._progress = Progress([question for _, question in kept], _ASKED_AT_ONCE, seed)

    def __len__(self) -> int:
        return len(self._lessons)

    def ask_some(self, model: PreTrainedModel, inside: Sequence[int]) -> Tensor | float:
        """The mean loss of a few answers that edits taught which are in, those first that are not sure.

        Args:
            model: to be asked.
            inside: which of the edits it has.
        """
        asked = [place for place, lesson in enumerate(self._lessons) if lesson in inside]
        places = self._progress.next(asked, _ASKED_AT_ONCE)
        return self._progress.ask(model, places).mean() if places else 0.0

    def check(self, model: PreTrainedModel) -> float:
        """Asks everything; returns the share that is right still, 1 where there is nothing."""
        return self._progress.check(model) if self._lessons else 1.0
