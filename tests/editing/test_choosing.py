import pytest
import torch

from lessons import FACTS, OF_LESSONS, pupil, tokenizer
from made_edits import made_edit
from pkmem.editing.choosing import choose_rows
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.others import Others
from pkmem.editing.questions import questions_of
from pkmem.editing.reads import reading, tables_of

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]


def chosen(model, others, most):
    model.requires_grad_(False)
    elsewhere = Elsewhere(model, tokenizer(), FACTS, Others(model, []), [], TEXT, 0)
    return choose_rows(model, questions_of(FACTS, tokenizer(), model), elsewhere, others, most)


def test_as_many_rows_that_the_questions_read_as_asked_for():
    model, read = pupil(), {}
    rows = chosen(model, [], 40)
    assert sum(map(len, rows.values())) == 40
    names = list(tables_of(model))
    with torch.no_grad(), reading(model, lambda place, reads: read.setdefault(names[place], []).append(reads.slots)):
        for prompt, answer in questions_of(FACTS, tokenizer(), model):
            model(torch.tensor([prompt + answer]))
    for name, numbers in rows.items():
        assert set(numbers.tolist()) <= set(torch.cat(read[name]).flatten().tolist())


def test_rows_of_other_edits_are_left_alone():
    model = pupil()
    first = chosen(model, [], 40)
    for name in first:
        other = made_edit(model, first[name].tolist())  # these rows of every table
        again = chosen(model, [other], 40)
        assert not set(again.get(name, torch.tensor([])).tolist()) & set(first[name].tolist())


def test_rows_that_are_all_others_are_refused():
    model = pupil()
    every = made_edit(model, list(range(OF_LESSONS.num_slots)))
    with pytest.raises(ValueError, match="every row that these facts read belongs to another edit: forget one"):
        chosen(model, [every], 40)
