import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from made_edits import bits_of, made_edit, same_bits
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.others import Others

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]


def told(answers, model):
    with torch.no_grad():
        return answers.divergence(model, range(len(answers))).item()


def test_what_shall_stay_is_what_the_model_said_without_the_other_edits():
    model = pupil()
    edit = made_edit(model, list(range(400)))
    before = Elsewhere(model, tokenizer(), FACTS[3:], Others(model, []), [], TEXT, 0)
    edit.apply(model)
    others = Others(model, [edit])
    after = Elsewhere(model, tokenizer(), FACTS[3:], others, [[]], TEXT, 0)
    for one, other in zip(before.background, after.background, strict=True):
        assert torch.equal(one.slots, other.slots)
    others.hold_all()
    assert told(after.near_answers, model) > 1e-3
    others.hold_none()
    assert told(after.near_answers, model) == pytest.approx(0.0, abs=1e-5)


def test_near_misses_are_of_what_is_known_as_well():
    """Of one fact alone there are none, since nobody knows which of its words are its own."""
    model = pupil()
    assert Elsewhere(model, tokenizer(), FACTS[:1], Others(model, []), [], TEXT, 0).near_answers is None
    edit = made_edit(model, [1])
    edit.apply(model)
    before = bits_of(model)
    elsewhere = Elsewhere(model, tokenizer(), FACTS[:1], Others(model, [edit]), [FACTS[1:]], TEXT, 0)
    assert len(elsewhere.near_answers) > 5
    assert len(elsewhere.near[0].slots) > 0
    assert same_bits(bits_of(model), before)  # the other is in again


def test_a_background_without_text_is_refused():
    with pytest.raises(ValueError, match="the background has no text"):
        Elsewhere(pupil(), tokenizer(), FACTS, Others(pupil(), []), [], [], 0)


def test_near_misses_weigh_as_background_does():
    model = pupil()
    elsewhere = Elsewhere(model, tokenizer(), FACTS, Others(model, []), [], TEXT, 0)
    weights = elsewhere.weight_of_rows(0, 24**2)
    per_token = [
        reads[0].weights.double().sum() / len(reads[0].slots) for reads in (elsewhere.background, elsewhere.near)
    ]
    assert weights.sum().item() == pytest.approx(sum(per_token).item(), rel=1e-5)
