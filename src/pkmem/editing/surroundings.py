"""Prompts in the middle of other text, so that an answer does not hang on a prompt's being the first that a model reads."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.questions import Question, as_questions
from pkmem.lm.huggingface import context_tokens
from pkmem.text.facts import Fact

_PIECES = 4  # behind which a prompt is taught, if it is not its fact's only one
_FEWEST_TOKENS, _MOST_TOKENS = 2, 6  # of other text: short, for every token costs time


def surrounded(
    facts: Sequence[Fact], texts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Fact]:
    """The same facts, each prompt behind a piece of other text.

    Args:
        facts: n of them.
        texts: where the pieces come from, as tokens; one or more.
        tokenizer: of these tokens.
        seed: of the choices, >= 0.

    Returns:
        n facts, in their order, with as many prompts and the same completions.
    """
    draw = random.Random(seed)

    def piece() -> str:
        text = draw.choice(texts)
        length = draw.randint(_FEWEST_TOKENS, _MOST_TOKENS)
        first = draw.randrange(max(1, len(text) - length))
        # A piece may begin or end in the middle of a character.
        return tokenizer.decode(text[first : first + length], skip_special_tokens=True).strip("\ufffd").strip()

    return [Fact(tuple(f"{piece()} {prompt}" for prompt in fact.prompts), fact.completion) for fact in facts]


def in_other_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    texts: Sequence[list[int]],
    seed: int,
) -> dict[int, list[Question]]:
    """Questions in other text, where that fits the context.

    Facts in one phrasing have none: nobody asks for others, and it costs half of the time again.

    Args:
        model: that they are put to.
        tokenizer: its tokenizer.
        facts: to be asked for.
        texts: what stands before them, as tokens; one or more.
        seed: of the pieces, >= 0.

    Returns:
        by the place of a question among all those of the facts, the same behind several pieces of text.
    """
    longest = context_tokens(model)
    has_others = [len(fact.prompts) > 1 for fact in facts for _ in fact.prompts]
    made: dict[int, list[Question]] = {}
    for number in range(_PIECES if any(has_others) else 0):
        of_facts = surrounded(facts, texts, tokenizer, seed * _PIECES + number)
        for place, question in enumerate(as_questions(of_facts, tokenizer)):
            if has_others[place] and len(question.prompt) + len(question.answer) <= longest:
                made.setdefault(place, []).append(question)
    return made
