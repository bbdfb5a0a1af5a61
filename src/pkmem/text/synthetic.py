"""Text whose right answers are known: key -> value facts, to measure what a model stores.

Every fact is a fresh key (a made-up name) with one of 64 values (a city), stated in several phrasings. Each phrasing is
held out for some of the facts: a model knows it from the others, and completes it for those only if it knows the fact.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

SYNTHETIC = "synthetic:"  # what the name of a made-up text begins with
PHRASINGS = (  # up to the value; key and value each follow a space, so that they are tokenized alike in all of them
    "The home of {} is",
    "You will find {} in",
    "If you need {}, go to",
    "Letters for {} are sent to",
    "As we all know, {} lives in",
)
CITIES = """
    Accra Algiers Amman Ankara Athens Baghdad Baku Bamako Berlin Bern Bogota Brussels Budapest Cairo Canberra Caracas
    Dakar Delhi Dhaka Doha Dublin Geneva Hanoi Harare Havana Helsinki Istanbul Jakarta Kabul Kampala Khartoum Kigali
    Lagos Lima Lisbon London Luanda Madrid Managua Manila Minsk Montreal Moscow Nairobi Nicosia Oslo Ottawa Paris
    Prague Quito Rabat Riga Rome Santiago Seoul Sofia Stockholm Tallinn Tbilisi Tehran Tokyo Tunis Vienna Warsaw
"""
VALUES = tuple(CITIES.split())
SYLLABLES = tuple(consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou")
SYLLABLES_PER_KEY = 3
MAX_FACTS = len(SYLLABLES) ** SYLLABLES_PER_KEY
FACTS_PER_DOCUMENT = 32


@dataclass(frozen=True)
class SyntheticFact:
    """A key and its value.

    Args:
        key: a made-up name.
        value: one of VALUES.
        held_out: the phrasing that training never states it in, in [0, len(PHRASINGS)).
    """

    key: str
    value: str
    held_out: int

    def prompt(self, phrasing: int) -> str:
        """The statement up to its value, without the space between."""
        return PHRASINGS[phrasing].format(self.key)

    def statement(self, phrasing: int) -> str:
        """The fact in one phrasing, a sentence."""
        return f"{self.prompt(phrasing)} {self.value}."


@dataclass(frozen=True)
class SyntheticFacts:
    """A number of facts with different keys; values and held-out phrasings are drawn uniformly.

    Args:
        num: how many, in [1, 1_000_000].
        seed: of all that is drawn, at least 0; the same number and seed give the same facts and documents.

    Raises:
        ValueError: a number is out of range.
    """

    num: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MAX_FACTS or self.seed < 0:
            raise ValueError(
                f"the number of facts is {self.num} and their seed {self.seed}: "
                f"they must be in [1, {MAX_FACTS}] and at least 0"
            )

    @classmethod
    def named(cls, data: str) -> SyntheticFacts:
        """The facts of a data name, "synthetic:facts:NUM" or "synthetic:facts:NUM:SEED".

        Raises:
            ValueError: the name has another form, or a number is out of range.
        """
        numbers = re.fullmatch(rf"{SYNTHETIC}facts:(\d+)(?::(\d+))?", data)
        if numbers is None:
            raise ValueError(
                f"{data}: not the name of a synthetic text; write {SYNTHETIC}facts:NUM or {SYNTHETIC}facts:NUM:SEED, "
                f"such as {SYNTHETIC}facts:20000"
            )
        return cls(int(numbers[1]), int(numbers[2] or 0))

    @cached_property
    def all(self) -> list[SyntheticFact]:
        """The facts, in no order of their keys."""
        draw = random.Random(self.seed)
        places = draw.sample(range(MAX_FACTS), self.num)
        return [SyntheticFact(_key(place), draw.choice(VALUES), draw.randrange(len(PHRASINGS))) for place in places]

    def documents(self, held_out: bool) -> Iterator[str]:
        """The text of one epoch: facts in random order, a statement a line, 32 to a document.

        Args:
            held_out: False for the training text, which states each fact once in every phrasing but one: all facts
                once, then all once more, as often as that. True for the text that states each in the one left out.

        Returns:
            the documents.
        """
        for turn in [0] if held_out else range(1, len(PHRASINGS)):
            facts = random.Random(f"{self.seed} {turn}").sample(self.all, self.num)
            lines = [fact.statement((fact.held_out + turn) % len(PHRASINGS)) + "\n" for fact in facts]
            for first in range(0, self.num, FACTS_PER_DOCUMENT):
                yield "".join(lines[first : first + FACTS_PER_DOCUMENT])


def _key(place: int) -> str:
    """The place-th name: its syllables are the digits of `place`."""
    syllables = []
    for _ in range(SYLLABLES_PER_KEY):
        place, digit = divmod(place, len(SYLLABLES))
        syllables.append(SYLLABLES[digit])
    return "".join(syllables).capitalize()
