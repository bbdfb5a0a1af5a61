import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from made_edits import made_edit
from pkmem.editing.course import Course
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.holding import Hold
from pkmem.editing.others import Others
from pkmem.editing.questions import questions_of
from pkmem.editing.reads import RowsInTraining, in_place_of_tables, tables_of
from pkmem.editing.rounding import rounded
from pkmem.editing.surroundings import in_other_text

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]


@pytest.fixture(params=[False])
def made(request):
    """A course of four questions two at a time, the rows that it changes, and two other edits, which it may mind."""
    model = pupil()
    model.requires_grad_(False)
    facts = FACTS[:2]
    elsewhere = Elsewhere(model, tokenizer(), facts, Others(model, []), [], TEXT, 0)
    in_text = in_other_text(model, tokenizer(), facts, elsewhere.texts, 0)
    parts = {name: RowsInTraining(table, torch.arange(len(table.weight))) for name, table in tables_of(model).items()}
    beside, others = Others(model, [made_edit(model, [row]) for row in (3, 5)]), Others(model, [])
    with in_place_of_tables(model, parts):
        asked = questions_of(facts, tokenizer(), model)
        hold = Hold(elsewhere, 1e-3, 1e-3)
        minded = beside if request.param else others
        yield Course(model, asked, in_text, hold, minded, None, 0.1, 2, 0), list(parts.values()), beside


def test_an_epoch_goes_through_few_questions_until_it_has_six_updates(made):
    course, _, _ = made
    course.epoch()
    assert (course.num_epochs, course.num_updates) == (1, 6)


@pytest.mark.parametrize("made", [True], indirect=True)
def test_beside_others_the_model_has_the_mean_of_the_latest_updates(made, monkeypatch):
    course, parts, _ = made
    steps = []
    step = course._optimizer.step
    monkeypatch.setattr(course._optimizer, "step", lambda: (step(), steps.append(parts[0].change.detach().clone())))
    course.epoch()
    assert torch.allclose(parts[0].change, torch.stack(steps).mean(0), atol=1e-6)
    course.check()  # rounds
    before = []
    ask = course._ask
    monkeypatch.setattr(course, "_ask", lambda places: before.append(parts[0].change.detach().clone()) or ask(places))
    latest = steps[-1]
    course.epoch()
    assert torch.equal(before[0], latest)


def test_steps_become_smaller(made):
    course, _, _ = made
    rates = []
    for _ in range(3):
        course.epoch()
        rates += [group["lr"] for group in course._optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.095, 0.09025])


def test_a_check_rounds_and_asks(made):
    course, parts, _ = made
    assert course.check() == 0.0
    course.epoch()
    assert not all(torch.equal(part.change, rounded(part.change)) for part in parts)
    for _ in range(20):
        course.epoch()
    assert course.check() == course.progress.share == 1.0
    assert course.check_known() == course.share_learned == 1.0
    assert all(torch.equal(part.change, rounded(part.change)) for part in parts)


def test_at_last_more_combinations_of_the_others_are_tried(made, monkeypatch):
    course, _, beside = made
    assert course.check(at_last=True) == course.progress.share == 0.0  # there are no others, and nothing was asked
    course._others = beside
    tried = []
    in_turn = Others.in_turn
    monkeypatch.setattr(Others, "in_turn", lambda *given: tried.append(given[2]) or in_turn(*given))
    course.check()
    course.check(at_last=True)
    assert tried == [40, 64]  # of 160 and 640 answers


class Known:
    """A rehearsal in which the second and third circumstances are always hard."""

    hard = (1, 2)

    def check(self, model, circumstances, least):
        list(circumstances)
        return least

    def places_of(self, inside):
        return [10 * edit for edit in inside]


def test_what_is_known_is_asked_alone_beside_some_and_beside_all(made):
    course, _, beside = made
    course._others = beside
    tried = []
    asked = [(places, list(beside.inside)) for places in course._known_in_turn(Known(), tried)]
    assert asked[:3] == [([0], [True, False]), ([10], [False, True]), ([], [False, False])]
    assert asked[3:] == [([0, 10], [True, True])]  # of two there is no other set
    assert tried == [[0], [1], [], [0, 1]]


def test_updates_are_made_beside_what_did_not_hold(made):
    course, _, beside = made
    course._others, course._known = beside, Known()
    assert course.check_known(0.5) == 0.5
    assert course._hard == [[], [1]]
    tried = []
    assert list(course._in_turn(90, [], tried)) == tried
    assert tried[:2] == [[], [1]]
    assert sorted(tried) == [[], [0], [0, 1], [1]]
    assert list(course._in_turn(90, [[1], [0]], [])) == [[], [0, 1]]
    course.check(least=1.0)  # ends at the first, since nothing is learned yet
    assert course._hard == [[], [1]]
    course.check()
    course.check(at_last=True)  # goes on beside those that are left, if any
    assert sorted(course._asked_beside) == [[], [0], [0, 1], [1]]
    assert sorted(course._hard) == [[], [0], [0, 1], [1]]


def test_without_others_a_check_asks_once(made):
    course, _, _ = made
    assert course.check() < 1.0
    tried = []
    assert list(course._in_turn(3, [], tried)) == tried == [[]]


def test_of_many_that_were_hard_the_latest_are_kept(made):
    course, _, beside = made
    course._others = beside
    course._found_hard([[number] for number in range(12)], range(12))
    assert course._hard == [[number] for number in range(11, 3, -1)]
    course._found_hard([[5], [20], [5]], [1, 2])
    assert course._hard == [[5], [20], [11], [10], [9], [8], [7], [6]]
