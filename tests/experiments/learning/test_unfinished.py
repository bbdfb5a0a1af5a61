import pytest

from lessons import FACTS, pupil
from made_edits import made_edit, same_bits
from pkmem.experiments.learning.unfinished import Unfinished


@pytest.fixture
def learned():
    """A model, an edit of it, and a lesson that counts how often it is given."""
    model = pupil()
    edit = made_edit(model, [1, 2])
    count = []
    return model, edit, lambda: count.append(1) or edit, count


def test_an_edit_is_learned_once(tmp_path, learned):
    model, edit, learn, count = learned
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        found = Unfinished(folder).edit(3, edit.facts, model, learn)
        assert same_bits(found.new, edit.new)
        assert same_bits(found.old, edit.old)
        assert found.facts == edit.facts
    assert len(count) == 1
    Unfinished(folder).edit(4, edit.facts, model, learn)
    assert len(count) == 2
    Unfinished(folder).forget()
    assert not folder.exists()
    Unfinished(folder).forget()


def test_an_edit_of_other_facts_another_model_or_a_damaged_one_is_learned_again(tmp_path, learned):
    model, edit, learn, count = learned
    kept = Unfinished(tmp_path)
    kept.edit(0, edit.facts, model, learn)
    kept.edit(0, FACTS[:1], model, learn)
    assert len(count) == 2
    other = pupil()
    next(other.parameters()).data.add_(1)
    kept.edit(0, edit.facts, other, learn)
    assert len(count) == 3
    (tmp_path / "edit-00.safetensors").write_bytes(b"cut")
    kept.edit(0, edit.facts, model, learn)
    assert len(count) == 4


def test_without_a_folder_nothing_is_kept(learned):
    model, edit, learn, count = learned
    for _ in range(2):
        assert Unfinished(None).edit(0, edit.facts, model, learn) is edit
    assert len(count) == 2
    Unfinished(None).forget()
