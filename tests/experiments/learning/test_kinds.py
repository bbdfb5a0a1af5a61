"""Made-up facts: the same for everyone, different by seed, and never those that stay untaught."""

import pytest

from pkmem.experiments.learning.kinds import KINDS, NUM_TAUGHT, made_up, mixed


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_the_same_facts_and_another_one_others(kind) -> None:
    facts = made_up(kind, 50, 3)
    assert facts == made_up(kind, 50, 3)
    assert facts[:20] == made_up(kind, 20, 3)
    assert len({fact.subject for fact in facts}) == 50
    assert not {fact.subject for fact in facts} & {fact.subject for fact in made_up(kind, 50, 4)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_is_asked_in_phrasings_of_its_own(kind) -> None:
    (fact,) = made_up(kind, 1, 0)
    prompts = [*fact.taught, *fact.held_out, fact.question]
    assert len(fact.taught) == NUM_TAUGHT
    assert len(set(prompts)) == len(prompts) == 7
    assert all(fact.subject in prompt and fact.answer not in prompt for prompt in prompts)
    assert fact.answer in fact.reversed
    assert fact.subject not in fact.reversed


@pytest.mark.parametrize("kind", KINDS)
def test_near_misses_are_subjects_that_no_seed_teaches(kind) -> None:
    misses = {fact.subject for fact in made_up(kind, 50, 0, others=True)}
    assert not misses & {fact.subject for seed in range(5) for fact in made_up(kind, 300, seed)}


def test_kinds_are_mixed_evenly() -> None:
    assert [fact.kind for fact in mixed(2, 0)] == ["person", "person", "code", "code", "word", "word"]
