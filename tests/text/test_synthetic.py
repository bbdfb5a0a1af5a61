"""synthetic.py: the text states what it should, as often as it should, and never what is held out."""

from collections import Counter
from itertools import combinations

import pytest

from pkmem.text import TokenBlocks, read_documents, tokenize, train_tokenizer
from pkmem.text.synthetic import FACTS_PER_DOCUMENT, MAX_FACTS, PHRASINGS, SYLLABLES, VALUES, SyntheticFacts, _key

EXPOSURES = len(PHRASINGS) - 1  # statements of a fact in one epoch of the training text


def lines(data: str, split: str) -> list[str]:
    return [line for text in read_documents(data, split) for line in text.splitlines()]


def fact_of(line: str) -> tuple[str, str]:
    """Key and value of a statement, read back from its words."""
    key = next(word for word in line.removesuffix(".").replace(",", "").split() if len(word) == 6 and is_key(word))
    return key, line.removesuffix(".").split()[-1]


def is_key(word: str) -> bool:
    return all(word[i : i + 2].lower() in SYLLABLES for i in (0, 2, 4))


def test_the_same_name_gives_the_same_text_and_another_seed_another() -> None:
    texts = {
        data: [tuple(read_documents(data, split)) for split in ("train", "validation")]
        for data in ("synthetic:facts:100", "synthetic:facts:100:0", "synthetic:facts:100:1")
    }
    plain, zero, one = texts.values()
    assert plain == zero
    assert not set(plain[0]) & set(one[0])


def test_keys_are_unique_and_values_uniform() -> None:
    drawn = SyntheticFacts(20_000).all
    assert len({fact.key for fact in drawn}) == 20_000
    assert all(is_key(fact.key) for fact in drawn)
    counts = Counter(fact.value for fact in drawn)
    assert set(counts) == set(VALUES)
    assert max(abs(count - 20_000 / 64) for count in counts.values()) < 5 * (20_000 / 64) ** 0.5
    assert set(Counter(fact.held_out for fact in drawn)) == set(range(len(PHRASINGS)))


def test_training_states_each_fact_in_every_phrasing_but_the_held_out_one() -> None:
    known = SyntheticFacts(300).all
    stated = Counter(lines("synthetic:facts:300", "train"))
    expected = [f.statement(p) for f in known for p in range(len(PHRASINGS)) if p != f.held_out]
    assert stated == Counter(expected)
    assert len(expected) == EXPOSURES * 300
    assert Counter(fact_of(line) for line in stated) == {(f.key, f.value): EXPOSURES for f in known}


def test_no_held_out_sentence_is_in_training() -> None:
    train, held_out = lines("synthetic:facts:300", "train"), lines("synthetic:facts:300", "validation")
    assert not set(train) & set(held_out)
    assert sorted(held_out) == sorted(f.statement(f.held_out) for f in SyntheticFacts(300).all)
    assert {fact_of(line) for line in train} == {fact_of(line) for line in held_out}
    phrasing = [
        {line.replace(fact_of(line)[0], "{}").rsplit(" ", 1)[0] for line in split} for split in (train, held_out)
    ]
    assert phrasing[0] == phrasing[1] == set(PHRASINGS)  # every phrasing is known from other facts


def test_a_document_mixes_many_facts_and_states_none_twice() -> None:
    documents = list(read_documents("synthetic:facts:320", "train"))
    assert len(documents) == EXPOSURES * 320 // FACTS_PER_DOCUMENT
    order = [fact.key for fact in SyntheticFacts(320).all]
    for text in documents:
        keys = [fact_of(line)[0] for line in text.splitlines()]
        assert len(set(keys)) == FACTS_PER_DOCUMENT
        places = [order.index(key) for key in keys]
        assert places != sorted(places)
        assert len({line.split()[0] for line in text.splitlines()}) > 1  # phrasings too


def test_no_value_begins_another() -> None:
    assert len(set(VALUES)) == len(VALUES) == 64
    assert not [(a, b) for a, b in combinations(VALUES, 2) if a.startswith(b) or b.startswith(a)]


def test_all_keys_there_are_can_be_asked_for() -> None:
    assert len({_key(place) for place in range(0, MAX_FACTS, 7)}) == len(range(0, MAX_FACTS, 7))
    assert _key(MAX_FACTS - 1) == "Zuzuzu"


@pytest.mark.parametrize(
    "name", ["synthetic:", "synthetic:facts", "synthetic:facts:", "synthetic:facts:2k", "synthetic:facts:9:1:1"]
)
def test_a_wrong_name_is_answered_with_the_right_form(name) -> None:
    with pytest.raises(ValueError, match=r"write synthetic:facts:NUM or .*:SEED, such as synthetic:facts:20000"):
        read_documents(name, "train")


@pytest.mark.parametrize("name", ["synthetic:facts:0", f"synthetic:facts:{MAX_FACTS + 1}"])
def test_a_number_out_of_range_is_refused(name) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[1, {MAX_FACTS}\]"):
        read_documents(name, "validation")


def test_facts_become_token_blocks_like_any_text(tmp_path) -> None:
    data = "synthetic:facts:200"
    tokenizer = train_tokenizer(read_documents(data, "train"), 600)
    files = [tokenize(data, split, tokenizer, tmp_path, progress=False) for split in ("train", "validation")]
    assert files[0].num_documents == EXPOSURES * files[1].num_documents == EXPOSURES * 7
    assert tokenizer.decode(TokenBlocks(files[1], 64)[0]["input_ids"]).startswith(lines(data, "validation")[0])
