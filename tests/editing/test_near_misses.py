from pkmem.editing.near_misses import near_misses

PEOPLE = ["Alda Kirosa", "Boris Venudo", "Celia Tamari", "Dario Lopenu", "Edna Sibako"]
FACTS = [(f"{name} was born in", f"The home of {name} is") for name in PEOPLE]


def test_near_misses_keep_the_phrasings_and_change_the_names():
    made = near_misses(FACTS, 40, 0)
    known = {prompt for prompts in FACTS for prompt in prompts}
    assert len(made) == len(set(made)) > 20
    assert not known & set(made)
    for prompt in made:
        is_one, is_other = prompt.endswith(" was born in"), prompt.startswith("The home of ")
        assert is_one or is_other
        name = prompt.removesuffix(" was born in") if is_one else prompt[len("The home of ") : -len(" is")]
        assert name not in PEOPLE
        assert all(word[0].isupper() for word in name.split())


def test_digits_are_crossed_with_digits():
    facts = [(f"Code {letters}-{number} opens",) for letters, number in (("AXB", 1111), ("CYD", 2222), ("EZF", 3333))]
    for prompt in near_misses(facts, 9, 1):
        letters, number = prompt.removeprefix("Code ").removesuffix(" opens").split("-")
        assert letters.isalpha()
        assert number.isdigit()


def test_the_seed_decides():
    assert near_misses(FACTS, 10, 3) == near_misses(FACTS, 10, 3) != near_misses(FACTS, 10, 4)


def test_a_fact_alone_has_none():
    assert near_misses(FACTS[:1], 10, 0) == []
    assert near_misses([("word",), ("word",)], 10, 0) == []  # nothing of their own
