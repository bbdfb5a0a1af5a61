import pytest
import torch

from lessons import FACTS, pupil, tokenizer
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.holding import Hold
from pkmem.editing.others import Others
from pkmem.editing.reads import RowsInTraining, in_place_of_tables, tables_of

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]


def loss(keep_background, keep_near, size, facts=FACTS, epochs=0):
    """Of a model all of whose rows were changed by numbers of a size."""
    model = pupil()
    model.requires_grad_(False)
    elsewhere = Elsewhere(model, tokenizer(), facts, Others(model, []), [], TEXT, 0)
    parts = {name: RowsInTraining(table, torch.arange(len(table.weight))) for name, table in tables_of(model).items()}
    draw = torch.Generator().manual_seed(0)
    for part in parts.values():
        part.change.data = size * torch.randn(part.change.shape, generator=draw)
    with in_place_of_tables(model, parts):
        return Hold(elsewhere, keep_background, keep_near).loss(model, epochs, draw)


def test_a_model_as_it_was_loses_nothing():
    assert loss(1.0, 1.0, 0.0).abs().item() < 1e-4  # what is unlikely has a floor


def test_more_change_loses_more():
    small, large = (loss(1.0, 0.0, size).item() for size in (0.1, 0.2))
    assert large == pytest.approx(4 * small, rel=1e-4)
    assert loss(1.0, 1.0, 0.1) > small


def test_each_hold_has_its_weight_and_relaxes():
    assert loss(2.0, 0.0, 0.1).item() == pytest.approx(2 * loss(1.0, 0.0, 0.1).item())
    assert loss(1.0, 0.0, 0.1, epochs=2).item() == pytest.approx(0.85**2 * loss(1.0, 0.0, 0.1).item())
    assert loss(0.0, 0.0, 0.1) == 0.0


def test_a_single_fact_has_no_near_misses():
    assert loss(0.0, 1.0, 0.1, facts=FACTS[:1]) == 0.0


def test_what_the_loss_sees_trains():
    model_loss = loss(1.0, 1.0, 0.1)
    assert model_loss.requires_grad
