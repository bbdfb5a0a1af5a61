"""effects.py: what edits do to answers, against putting them in."""

import dataclasses

import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from made_edits import made_edit
from pkmem.editing.effects import Effects
from pkmem.editing.questions import answer_losses, as_questions, batches
from pkmem.editing.reads import RowsInTraining, in_place_of_tables, tables_of


def small(edit, share):
    """The edit, with so small a share of its change that what it does grows in proportion."""
    new = {name: old + share * (edit.new[name] - old) for name, old in edit.old.items()}
    return dataclasses.replace(edit, new=new)


@pytest.mark.parametrize("size", [32, 2])
@torch.no_grad()
def test_effects_are_what_small_edits_do(size, monkeypatch):
    monkeypatch.setattr("pkmem.editing.effects.batches", lambda questions: batches(questions, size))
    model = pupil().double().requires_grad_(False)
    questions = as_questions(FACTS, tokenizer())
    num_slots = len(next(iter(tables_of(model).values())).weight)
    parts = torch.arange(num_slots).chunk(3)
    edits = [small(made_edit(model, rows.tolist(), seed), 3e-5) for seed, rows in enumerate(parts)]
    one_table = next(iter(edits[1].rows))  # of several
    only = {part: {one_table: getattr(edits[1], part)[one_table]} for part in ("rows", "old", "new")}
    edits[1] = dataclasses.replace(edits[1], **only)
    effects = Effects(model, edits)
    edits[0].apply(model)
    before = answer_losses(model, questions)[0]
    losses, added = effects.on(model, questions)
    torch.testing.assert_close(losses, before)
    assert added.shape == (len(questions), 3)
    for place, edit in enumerate(edits):
        (edit.undo if place == 0 else edit.apply)(model)
        after = answer_losses(model, questions)[0]
        (edit.apply if place == 0 else edit.undo)(model)
        difference = before - after if place == 0 else after - before
        torch.testing.assert_close(added[:, place], difference, rtol=2e-2, atol=1e-6, check_dtype=False)


def test_they_are_the_same_through_rows_in_training_and_leave_no_gradient():
    model = pupil().requires_grad_(False)
    questions = as_questions(FACTS[:2], tokenizer())
    effects = Effects(model, [made_edit(model, [0, 3, 5])])
    plain = effects.on(model, questions)
    parts = {name: RowsInTraining(table, torch.arange(4)) for name, table in tables_of(model).items()}
    with in_place_of_tables(model, parts):
        through = effects.on(model, questions)
    for one, other in zip(plain, through, strict=True):
        torch.testing.assert_close(one, other)
    assert all(part.change.grad is None for part in parts.values())


def test_no_edits_do_nothing():
    model = pupil().requires_grad_(False)
    questions = as_questions(FACTS[:2], tokenizer())
    losses, added = Effects(model, []).on(model, questions)
    assert added.shape == (len(losses), 0)
