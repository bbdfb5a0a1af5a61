import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from pkmem.editing.course import Course
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.holding import Hold
from pkmem.editing.others import Others
from pkmem.editing.questions import questions_of
from pkmem.editing.reads import RowsInTraining, in_place_of_tables, tables_of
from pkmem.editing.rounding import rounded
from pkmem.editing.surroundings import in_other_text

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]


@pytest.fixture
def made():
    """A course of four questions two at a time, and the rows that it changes."""
    model = pupil()
    model.requires_grad_(False)
    facts = FACTS[:2]
    elsewhere = Elsewhere(model, tokenizer(), facts, Others(model, []), [], TEXT, 0)
    in_text = in_other_text(model, tokenizer(), facts, elsewhere.texts, 0)
    parts = {name: RowsInTraining(table, torch.arange(len(table.weight))) for name, table in tables_of(model).items()}
    with in_place_of_tables(model, parts):
        asked = questions_of(facts, tokenizer(), model)
        hold, others = Hold(elsewhere, 1e-3, 1e-3), Others(model, [])
        yield Course(model, asked, in_text, hold, others, None, 0.1, 2, 0), list(parts.values())


def test_an_epoch_goes_through_few_questions_until_it_has_six_updates(made):
    course, _ = made
    course.epoch()
    assert (course.num_epochs, course.num_updates) == (1, 6)


def test_steps_become_smaller(made):
    course, _ = made
    rates = []
    for _ in range(3):
        course.epoch()
        rates += [group["lr"] for group in course._optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.095, 0.09025])


def test_a_check_rounds_and_asks(made):
    course, parts = made
    assert course.check() == 0.0
    course.epoch()
    assert not all(torch.equal(part.change, rounded(part.change)) for part in parts)
    for _ in range(20):
        course.epoch()
    assert course.check() == course.progress.share == 1.0
    assert course.check_known() == course.share_learned == 1.0
    assert all(torch.equal(part.change, rounded(part.change)) for part in parts)
