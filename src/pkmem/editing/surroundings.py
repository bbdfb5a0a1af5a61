"""Prompts in the middle of other text, so that an answer does not hang on a prompt's being the first that a model reads."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pkmem.text.facts import Fact

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
