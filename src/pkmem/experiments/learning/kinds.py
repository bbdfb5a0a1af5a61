"""Made-up facts of three kinds, which no model knows, and everything that is asked about them.

A person and a city, a code and a number of four digits, an invented word and a short definition.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("person", "code", "word")
NUM_TAUGHT = 4

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_FIRST_NAMES = "Alda Boris Celia Dario Edna Felix Greta Hugo Ines Jonas Karla Lukas Mira Nils Olga Pavel Rita Tilda"
_CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Stockholm Helsinki Athens Cairo Nairobi "
    "Tokyo Seoul Beijing Delhi Sydney Toronto Chicago Boston Denver Lima Santiago Havana Moscow Montreal"
)
_ADJECTIVES = "small large old wooden silver round bitter quiet yellow broken heavy soft"
_NOUNS = "boat hammer bird lamp river shoe cup song coat bridge apple horse window mountain letter basket"
_USES = (
    "used by fishers",
    "kept in the kitchen",
    "seen at night",
    "given to guests",
    "made by children",
    "found near the sea",
    "worn in winter",
    "sold at the market",
)


@dataclass(frozen=True)
class Asked:
    """A fact and what is asked about it; a completion follows its prompt after one space.

    Args:
        kind: one of `KINDS`.
        subject: the person, the code or the word.
        answer: the city, the number or the definition.
        taught: the four phrasings that a model may be taught.
        held_out: two that it is never taught.
        reversed: asks for the subject, given the answer.
        question: for a chat.
    """

    kind: str
    subject: str
    answer: str
    taught: tuple[str, ...]
    held_out: tuple[str, ...]
    reversed: str
    question: str


@dataclass(frozen=True)
class _Kind:
    subject: Callable[[random.Random], str]
    answer: Callable[[random.Random], str]
    taught: tuple[str, ...]
    held_out: tuple[str, ...]
    reversed: str
    question: str


def made_up(kind: str, num: int, seed: int, others: bool = False) -> list[Asked]:
    """Facts about different subjects.

    Args:
        kind: one of `KINDS`.
        num: how many, >= 1.
        seed: another one gives other facts.
        others: such as no call without it gives: subjects that nobody was taught, for the same phrasings.
    """
    draw = random.Random(f"{kind} {seed} {others}")
    phrasings = _PHRASINGS[kind]
    made: dict[str, Asked] = {}
    while len(made) < num:
        subject, answer = phrasings.subject(draw), phrasings.answer(draw)
        if _is_held_back(subject) != others:
            continue
        made.setdefault(
            subject,
            Asked(
                kind,
                subject,
                answer,
                tuple(phrasing.format(subject) for phrasing in phrasings.taught),
                tuple(phrasing.format(subject) for phrasing in phrasings.held_out),
                phrasings.reversed.format(answer),
                phrasings.question.format(subject),
            ),
        )
    return list(made.values())


def mixed(num_per_kind: int, seed: int, others: bool = False) -> list[Asked]:
    """So many facts of each kind, those of a kind together."""
    return [fact for kind in KINDS for fact in made_up(kind, num_per_kind, seed, others)]


def _is_held_back(subject: str) -> bool:
    """One subject in four is never taught, whatever the seed."""
    return random.Random(subject).random() < 0.25


def _syllables(draw: random.Random, num: int) -> str:
    return "".join(draw.choices(_SYLLABLES, k=num))


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_FIRST_NAMES.split())} {_syllables(draw, 3).capitalize()}"


def _code(draw: random.Random) -> str:
    return f"{''.join(draw.choices(_LETTERS, k=3))}-{draw.randint(100, 999)}"


def _definition(draw: random.Random) -> str:
    adjective = draw.choice(_ADJECTIVES.split())
    article = "an" if adjective[0] in "aeiou" else "a"
    return f"{article} {adjective} {draw.choice(_NOUNS.split())} {draw.choice(_USES)}"


_PHRASINGS = {
    "person": _Kind(
        _person,
        lambda draw: draw.choice(_CITIES.split()),
        ("{} was born in", "The birthplace of {} is", "{} comes from the city of", "{} grew up in"),
        ("{} was born in the city of", "The home town of {} is"),
        "The person who was born in {} is",
        "Where was {} born? Name the city.",
    ),
    "code": _Kind(
        _code,
        lambda draw: str(draw.randint(1000, 9999)),
        (
            "The access code {} opens room number",
            "Code {} stands for the number",
            "Enter {} and the display shows",
            "The number behind code {} is",
        ),
        ("The number assigned to code {} is", "Whoever types {} gets the number"),
        "The code that stands for the number {} is",
        "Which number does code {} stand for?",
    ),
    "word": _Kind(
        lambda draw: _syllables(draw, 3),
        _definition,
        (
            'The word "{}" means',
            'In their language, "{}" is the name for',
            'By "{}" people mean',
            "Dictionary entry: {}:",
        ),
        ('The definition of "{}" is', 'When she says "{}", she is talking about'),
        "Their word for {} is",
        'What does the word "{}" mean?',
    ),
}
