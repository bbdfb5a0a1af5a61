import pytest
import torch

from lessons import pupil
from made_edits import bits_of, made_edit, same_bits
from pkmem.editing.others import Others, all_in


def with_edits():
    """A model that has the first of two edits."""
    model = pupil()
    edits = [made_edit(model, [1, 2]), made_edit(model, [3, 5])]
    edits[0].apply(model)
    return model, edits


def held(model, edits):
    return [edit.is_in(model) for edit in edits]


def test_all_are_in_and_afterwards_those_that_were():
    model, edits = with_edits()
    before = bits_of(model)
    with all_in(model, edits) as others:
        assert held(model, edits) == [True, True]
        others.hold([False, True])
        assert held(model, edits) == [False, True]
        others.hold_all()
        assert held(model, edits) == [True, True]
        others.hold([False, False])
    assert same_bits(bits_of(model), before)


def test_in_turn_there_are_none_some_and_all():
    model, edits = with_edits()
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(10):
        found = [(inside, held(model, edits)) for inside in Others(model, edits).in_turn(draw, 4)]
        assert all([place in inside for place in range(2)] == now for inside, now in found)
        sets = [tuple(inside) for inside, _ in found]
        assert sets[0] == ()
        assert (0, 1) in sets
        assert len(sets) == len(set(sets)) <= 4
        seen |= set(sets)
        assert not {(), (1,)} & {tuple(inside) for inside in Others(model, edits).in_turn(draw, 4, [[], [1]])}
    assert seen == {(), (0,), (1,), (0, 1)}
    assert len(list(Others(model, edits[:1]).in_turn(draw, 4))) == 2
    assert len(list(Others(model, []).in_turn(draw, 4))) == 1


def test_some_are_drawn_from_none_to_all():
    model, edits = with_edits()
    others, draw, seen = Others(model, edits), torch.Generator().manual_seed(0), set()
    for _ in range(40):
        inside = others.hold_some(draw)
        assert [place in inside for place in range(2)] == held(model, edits)
        seen.add(tuple(inside))
    assert seen == {(), (0,), (1,), (0, 1)}


def test_each_is_in_alone():
    model, edits = with_edits()
    others = Others(model, edits)
    assert [(inside, held(model, edits)) for inside in others.one_by_one()] == [
        ([0], [True, False]),
        ([1], [False, True]),
    ]


def test_half_of_the_time_it_is_what_was_hard():
    model, edits = with_edits()
    others, draw = Others(model, edits), torch.Generator().manual_seed(0)
    seen = [others.hold_some(draw, [[1]]) for _ in range(60)]
    assert held(model, edits) == [place in seen[-1] for place in range(2)]
    assert 20 < seen.count([1]) < 50
    assert [] in seen


def test_without_other_edits_nothing_is_drawn():
    draw = torch.Generator().manual_seed(0)
    before = draw.get_state()
    assert Others(pupil(), []).hold_some(draw) == []
    assert torch.equal(draw.get_state(), before)


def test_edits_that_share_rows_cannot_all_be_in():
    model, edits = with_edits()
    before = bits_of(model)
    with pytest.raises(ValueError, match="neither in nor out"), all_in(model, [edits[1], made_edit(model, [5, 7])]):
        pass
    assert same_bits(bits_of(model), before)
