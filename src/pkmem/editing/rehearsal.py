"""What other edits taught is asked again while another is learned, so that it stays."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.progress import Progress
from pkmem.editing.questions import BATCH_QUESTIONS, Question, as_questions
from pkmem.text.facts import Fact

_QUESTIONS = 400  # of all other edits together
_FIRM = 0.1  # nats per token, below which an answer stays right beside others than those that were tried
_UNSURE_AT_ONCE, _SURE_AT_ONCE = 8, 4  # answers of an update


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
            taught = as_questions(facts, tokenizer) if facts else []
            asked += [(lesson, question) for question in draw.sample(taught, min(most, len(taught)))]
        questions = [question for _, question in asked]
        at_first = Progress(questions, BATCH_QUESTIONS, seed)
        if questions:
            at_first.check(model)
        kept = sorted(at_first.right)
        self._lessons = [asked[place][0] for place in kept]
        self._questions = [questions[place] for place in kept]
        self._progress = Progress(self._questions, BATCH_QUESTIONS, seed, firm=_FIRM)
        self.check(model, [range(len(kept))])

    def __len__(self) -> int:
        return len(self._lessons)

    @property
    def share_learned(self) -> float:
        """The share that was right and firm when it was last asked, 1 where there is nothing."""
        return self._progress.share_learned if self._lessons else 1.0

    @property
    def hard(self) -> list[int]:
        """The numbers of the circumstances of the last check in which something was not right and firm."""
        return self._progress.hard

    def ask_some(self, model: PreTrainedModel, inside: Sequence[int]) -> Tensor | float:
        """The mean loss of a few answers that edits taught which are in, most of them not sure.

        Args:
            model: to be asked.
            inside: which of the edits it has.
        """
        places = self._progress.next(self.places_of(inside), _UNSURE_AT_ONCE, _SURE_AT_ONCE)
        return self._progress.ask(model, places).mean() if places else 0.0

    def check(self, model: PreTrainedModel, circumstances: Iterable[Sequence[int]], least: float = 0.0) -> float:
        """Asks what was taught; returns the share that is right still, 1 where there is nothing: see `Progress.check`."""
        return self._progress.check(model, circumstances, least) if self._lessons else 1.0

    def places_of(self, inside: Sequence[int]) -> list[int]:
        """The places of the questions about what some edits taught."""
        return [place for place, lesson in enumerate(self._lessons) if lesson in inside]
