import pytest
import torch

from decoders import decoder
from lessons import pupil
from pkmem.editing.reads import (
    Reads,
    RowsInTraining,
    in_place_of_tables,
    reading,
    rows_to_teach,
    tables_of,
    weight_of_rows,
)
from pkmem.layer.memory import memories_in
from pkmem.layer.values import ValueTable


def test_rows_in_training_give_what_the_changed_table_gives():
    table = ValueTable(20, 6).double()
    part = RowsInTraining(table, torch.tensor([3, 7, 19]))
    with torch.no_grad():
        part.change.normal_()
    slots, weights = torch.randint(20, (9, 2, 4)), torch.rand(9, 2, 4, dtype=torch.float64)
    changed = table.weight.detach().clone()
    changed[[3, 7, 19]] += part.change.detach().double()
    expected = (changed[slots] * weights[..., None]).sum((1, 2))
    torch.testing.assert_close(part(slots, weights), expected, rtol=1e-5, atol=1e-6)
    part.requires_grad_(True)
    table.requires_grad_(False)
    part(slots, weights).square().sum().backward()
    assert table.weight.grad is None
    read = torch.isin(torch.tensor([3, 7, 19]), slots)
    assert torch.equal(part.change.grad.any(1), read)


def test_memories_read_through_the_rows_in_training_inside_the_block():
    model = pupil()
    tables = tables_of(model)
    name = next(iter(tables))
    part = RowsInTraining(tables[name], torch.arange(24 * 24))
    with torch.no_grad():
        part.change.fill_(0.5)
    tokens = torch.tensor([[5, 9, 3, 200]])
    with torch.no_grad():
        before = model(tokens).logits
        with in_place_of_tables(model, {name: part}):
            assert not torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert list(tables_of(model).values()) == list(tables.values())


def test_a_shared_table_is_named_once():
    model = pupil(share_values=True)
    assert list(tables_of(model)) == ["base.model.layers.0.mlp.memory.values.weight"]
    part = RowsInTraining(next(iter(tables_of(model).values())), torch.tensor([1]))
    with in_place_of_tables(model, dict.fromkeys(tables_of(model), part)):
        assert all(memory.values is part for memory in memories_in(model).values())


def test_a_model_without_memories_is_refused():
    with pytest.raises(ValueError, match="no memories to teach: put some beside its MLPs with `pkmem retrofit`"):
        tables_of(decoder())


def test_real_tokens_alone_are_seen_reading():
    model, found = pupil(), {}
    tokens, mask = torch.tensor([[5, 9, 3], [7, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with torch.no_grad(), reading(model, found.__setitem__):
        model(tokens, attention_mask=mask)
    assert sorted(found) == [0, 1, 2]
    alone = {}
    with torch.no_grad(), reading(model, alone.__setitem__):
        model(tokens[1:, :1])
    for place in found:
        assert found[place].slots.shape == found[place].weights.shape == (4, 12)
        assert torch.equal(found[place].slots[3], alone[place].slots[0])
    assert not any(memory.watchers for memory in memories_in(model).values())


def test_rows_are_weighed_as_they_are_read():
    reads = Reads(torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.5, 0.25], [1.0, 2.0]]))
    assert weight_of_rows(reads, 4).tolist() == [0.5, 2.0, 1.25, 0.0]


def test_the_rows_that_matter_and_that_nothing_else_reads_are_taught():
    matter = [torch.tensor([5.0, 4.0, 0.0, 3.0]).double(), torch.tensor([0.0, 9.0, 1.0]).double()]
    never, often = 0.0, 1.0
    background = [torch.tensor([often, never, never, never]), torch.tensor([never, 1e-2, never])]
    background = [weights.double() for weights in background]
    chosen = rows_to_teach(matter, background, ["a", "b"], [], 3)  # ranks: 0, 4, 0, 3; 0, 4.5, 1
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [1, 3], "b": [1]}
    chosen = rows_to_teach(matter, background, ["a", "b"], [{"a": torch.tensor([1])}, {"c": torch.tensor([0])}], 9)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [3], "b": [1, 2]}
    shared = rows_to_teach([matter[0], matter[0]], [background[0], background[0]], ["a", "a"], [], 1)
    assert {name: rows.tolist() for name, rows in shared.items()} == {"a": [1]}
    assert rows_to_teach(matter, background, ["a", "b"], [{"a": torch.arange(4), "b": torch.arange(3)}], 9) == {}
    sharp = rows_to_teach(matter, background, ["a", "b"], [], 3, sharpness=4.0)  # ranks: 0, 4, 0, 3; 0, 9 / 16, 1
    assert {name: rows.tolist() for name, rows in sharp.items()} == {"a": [1, 3], "b": [2]}
