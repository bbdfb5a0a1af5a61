import os
import subprocess
import sys

from pkmem.editing.near_misses import near_misses
from pkmem.text.facts import Fact

PEOPLE = ["Alda Kirosa", "Boris Venudo", "Celia Tamari", "Dario Lopenu", "Edna Sibako"]
FACTS = [Fact((f"{name} was born in", f"The home of {name} is"), name[:2]) for name in PEOPLE]


def test_near_misses_keep_the_phrasings_and_change_the_names():
    made = near_misses(FACTS, 40, 0)
    known = {prompt for fact in FACTS for prompt in fact.prompts}
    prompts = [prompt for fact in made for prompt in fact.prompts]
    assert len(made) == len(set(prompts)) > 20
    assert not known & set(prompts)
    assert {fact.completion for fact in made} == {fact.completion for fact in FACTS}
    for prompt, fact in zip(prompts, made, strict=True):
        is_one, is_other = prompt.endswith(" was born in"), prompt.startswith("The home of ")
        assert is_one or is_other
        name = prompt.removesuffix(" was born in") if is_one else prompt[len("The home of ") : -len(" is")]
        assert name not in PEOPLE
        assert name[0] == fact.completion[0]  # crossed with another's name from its middle on
        assert all(word[0].isupper() for word in name.split())


def test_digits_are_crossed_with_digits():
    facts = [
        Fact((f"Code {letters}-{number} opens",), "a door")
        for letters, number in (("AXB", 1111), ("CYD", 2222), ("EZF", 3333))
    ]
    for fact in near_misses(facts, 9, 1):
        letters, number = fact.prompts[0].removeprefix("Code ").removesuffix(" opens").split("-")
        assert letters.isalpha()
        assert number.isdigit()


def test_the_seed_decides():
    assert near_misses(FACTS, 10, 3) == near_misses(FACTS, 10, 3) != near_misses(FACTS, 10, 4)


def test_a_fact_alone_has_none():
    assert near_misses(FACTS[:1], 10, 0) == []
    assert near_misses([Fact(("word",), "a"), Fact(("word",), "b")], 10, 0) == []  # nothing of their own


def test_the_order_of_sets_does_not_decide():
    # A process draws the order of its sets of words.
    source = (
        "from pkmem.editing.near_misses import near_misses\n"
        "from pkmem.text.facts import Fact\n"
        f"print(near_misses([Fact((f'{{name}} was born in',), name) for name in {PEOPLE}], 10, 0))"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", source],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(made) == 1
