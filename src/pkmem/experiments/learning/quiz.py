"""A small set of general questions with four answers each, to see whether a model still knows what it knew.

The same file serves lm-eval, by the task beside it: configs/quiz/general.yaml.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pkmem.experiments.family import config_folder


@dataclass(frozen=True)
class QuizQuestion:
    """A question and its possible answers, which follow the prompt after one space.

    Args:
        prompt: ends where the answer begins.
        choices: the answers.
        answer: the place of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def quiz() -> list[QuizQuestion]:
    """All of them."""
    lines = (config_folder() / "quiz" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    documents = map(json.loads, lines)
    return [
        QuizQuestion(f"Question: {document['question']}\nAnswer:", tuple(document["choices"]), document["answer"])
        for document in documents
    ]
