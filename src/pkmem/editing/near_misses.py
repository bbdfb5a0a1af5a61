"""Near misses: prompts like those of the facts about what the facts do not mention, so that a model learns to tell them apart."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from pkmem.text.facts import Fact

_PIECE = re.compile(r"\w+|\W+")
_SHARE_OF_SHARED_WORDS = 0.1  # of the facts: a word in more of them is of the phrasing, not of the fact


def near_misses(facts: Sequence[Fact], num: int, seed: int) -> list[Fact]:
    """Prompts with the facts' own words crossed: the first half of one with the last half of another of its kind.

    Args:
        facts: what they shall nearly ask for.
        num: how many to make, at most; fewer where there are few facts, none where there is one.
        seed: of the choices.

    Returns:
        a prompt each, none of them among the facts', with the answer that would be wrong.
    """
    if len(facts) < 2:  # which of its words are its own cannot be told
        return []
    draw = random.Random(seed)
    # Of each fact once; a set's order would be another in each process, and the choices with it.
    found = Counter(
        word
        for fact in facts
        for word in dict.fromkeys(piece for text in fact.prompts for piece in _PIECE.findall(text))
    )
    most = max(1, int(_SHARE_OF_SHARED_WORDS * len(facts)))
    own = [word for word, count in found.items() if count <= most and word[0].isalnum()]
    alike: dict[tuple[bool, bool], list[str]] = {}
    for word in own:
        alike.setdefault(_kind(word), []).append(word)
    known = {text for fact in facts for text in fact.prompts}
    made: dict[str, Fact] = {}
    for _ in range(4 * num):
        if len(made) == num:
            break
        fact = draw.choice(facts)
        pieces = _PIECE.findall(draw.choice(fact.prompts))
        crossed = "".join(_crossed(piece, alike, draw) if found[piece] <= most else piece for piece in pieces)
        if crossed not in known:
            made[crossed] = Fact((crossed,), fact.completion)
    return list(made.values())


def _kind(word: str) -> tuple[bool, bool]:
    return word[0].isupper(), word[0].isdigit()


def _crossed(word: str, alike: dict[tuple[bool, bool], list[str]], draw: random.Random) -> str:
    if not word[0].isalnum():
        return word
    other = draw.choice(alike[_kind(word)])
    return word[: (len(word) + 1) // 2] + other[len(other) // 2 :]
