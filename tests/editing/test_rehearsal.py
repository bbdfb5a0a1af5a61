import copy

import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from pkmem import learn
from pkmem.editing import rehearsal
from pkmem.editing.rehearsal import Rehearsal

SETTINGS = {"background": ["the cat sat on a mat"], "lr": 0.1, "keep_background": 1e-3, "keep_near": 1e-3}


@pytest.fixture(scope="module")
def taught():
    """A model that knows the first three facts."""
    model = pupil()
    learn(model, tokenizer(), FACTS[:3], slots=200, most_epochs=60, **SETTINGS).apply(model)
    return model


def test_only_what_is_answered_right_is_asked(taught):
    assert len(Rehearsal(taught, tokenizer(), [FACTS[:3], [], FACTS[3:]], 0)) == 6
    assert len(Rehearsal(pupil(), tokenizer(), [FACTS[:3]], 0)) == 0


def test_as_many_of_each_edit(taught, monkeypatch):
    monkeypatch.setattr(rehearsal, "_QUESTIONS", 6)
    assert len(Rehearsal(taught, tokenizer(), [FACTS[:2], FACTS[2:3]], 0)) == 3 + 2


def test_answers_are_asked_for_that_are_in(taught):
    asked = Rehearsal(taught, tokenizer(), [FACTS[:1], FACTS[1:3]], 0)
    assert asked.ask_some(taught, []) == 0.0
    of_first, of_both = (asked.ask_some(taught, inside) for inside in ([0], [0, 1]))
    assert of_first.shape == of_both.shape == ()
    assert not torch.equal(of_first, of_both)
    assert torch.equal(of_first, asked.ask_some(taught, [0]))


def test_a_check_says_what_is_right_still(taught):
    asked = Rehearsal(taught, tokenizer(), [FACTS[:3]], 0)
    everything = [asked.places_of([0])]
    assert asked.check(taught, everything) == 1.0
    assert asked.check(pupil(), everything) == 0.0
    assert Rehearsal(pupil(), tokenizer(), [FACTS], 0).check(pupil(), [[]]) == 1.0


def test_an_answer_is_asked_for_wherever_its_edit_is_in(taught):
    asked = Rehearsal(taught, tokenizer(), [FACTS[:1], FACTS[1:3]], 0)
    changing = copy.deepcopy(taught)

    def circumstances(of_untaught):
        changing.load_state_dict(pupil().state_dict())
        yield asked.places_of(of_untaught)
        changing.load_state_dict(taught.state_dict())
        yield asked.places_of([0, 1])

    assert asked.check(changing, circumstances([])) == 1.0
    assert asked.check(changing, circumstances([0])) == 2 / 3
    assert asked.share_learned <= 2 / 3
    assert asked.check(changing, circumstances([0, 1])) == asked.share_learned == 0.0


def test_nothing_to_ask_is_learned():
    assert Rehearsal(pupil(), tokenizer(), [FACTS], 0).share_learned == 1.0
