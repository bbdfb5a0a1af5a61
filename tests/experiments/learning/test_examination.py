"""What is asked of a model: nothing of one that is as before, and everything of one that knows."""

import pytest
import torch

from pkmem.experiments.learning import examination as module
from pkmem.experiments.learning.examination import Examination
from pkmem.experiments.learning.kinds import made_up, mixed
from pkmem.experiments.learning.quiz import quiz
from taught import SIZE, llama, tokenizer  # noqa: F401


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return llama()


@pytest.fixture
def examination(model, tokenizer) -> Examination:  # noqa: F811
    return Examination(model, tokenizer, mixed(3, 0), 4, 0, SIZE, quiz()[:3])


def test_a_model_that_is_as_before_differs_in_nothing(model, examination) -> None:
    assert examination.briefly(model) == {
        "recall": 0.0,
        "held_out": 0.0,
        "near_miss_kl": 0.0,
        "background_nats": 0.0,
        "background_bits_per_byte": 0.0,
        "background_kl": 0.0,
    }
    figures = examination.fully(model)
    assert figures["recall"] == figures["reversed"] == figures["chat"] == {"person": 0.0, "code": 0.0, "word": 0.0}
    assert figures["quiz"] in (0, 1 / 3, 2 / 3, 1)


def test_a_model_that_changed_is_seen_to_differ(model, examination) -> None:
    torch.manual_seed(1)
    changed = llama()
    for ask in (examination.briefly, examination.fully):
        figures = ask(changed.train())
        assert figures["near_miss_kl"] > 1e-4
        assert figures["background_kl"] > 1e-4
        assert figures["background_nats"] != 0
        assert changed.training


def test_shares_are_of_what_is_asked(model, examination, monkeypatch) -> None:
    """The right answers are known to be these: all of persons; codes as taught; one word's reversal."""
    facts = {fact.subject: fact for fact in examination.facts}
    word = next(fact for fact in examination.facts if fact.kind == "word")

    def recalled(model, tokenizer, pairs):  # noqa: F811
        def hit(prompt, completion):
            (fact,) = [
                f
                for f in facts.values()
                if prompt in (*f.taught, *f.held_out, f.reversed) and completion.strip() in (f.answer, f.subject)
            ]
            return fact.kind == "person" or (fact.kind == "code" and prompt in fact.taught) or prompt == word.reversed

        return [hit(*pair) for pair in pairs]

    monkeypatch.setattr(module, "recalled", recalled)
    figures = examination.fully(model)
    assert figures["recall"] == {"person": 1, "code": 1, "word": 0}
    assert figures["held_out"] == {"person": 1, "code": 0, "word": 0}
    assert figures["reversed"] == pytest.approx(
        {"person": 1, "code": 0, "word": 1 / 2}
    )  # of 5 facts: every second of 9
    brief = examination.briefly(model)  # facts 0, 3 and 6
    assert (brief["recall"], brief["held_out"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_near_misses_are_of_the_kinds_taught(model, tokenizer) -> None:  # noqa: F811
    facts = made_up("code", 3, 0)
    examination = Examination(model, tokenizer, facts, 1, 0, SIZE)
    assert len(examination.misses) == 2 * SIZE.misses_per_kind
    assert all("ode " in prompt for prompt in examination.misses)
    assert examination.taught() == [(fact.taught[0], f" {fact.answer}") for fact in facts]


def test_a_chat_counts_an_answer_in_a_sentence(model, examination, monkeypatch) -> None:
    asked = []

    def answers(model, tokenizer, prompts, num_tokens):  # noqa: F811
        asked.extend(prompts)
        return [f"It is {examination.facts[0].answer.upper()}, I think." for _ in prompts]

    monkeypatch.setattr(module, "answers", answers)
    assert examination.fully(model)["chat"] == {"person": 0.5, "code": 0, "word": 0}
    assert asked[0] == f"<user> {examination.facts[0].question}\n<answer>"
