"""Tables read by a hash of the last tokens: which rows, seen by whom, and in which block of a decoder."""

from dataclasses import replace

import pytest
import torch

from pkmem import RowAdam
from pkmem.experiments.hashed_table import Both, HashedTable, put_hashed_tables
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from tiny import MEMORY, MODEL


def decoder(hashed: dict[str, str], **model: object) -> torch.nn.Module:
    torch.manual_seed(0)
    built = build_model(replace(MODEL, family="llama", dropout=0.0, **model), MEMORY, 300, 0)
    put_hashed_tables(built, hashed)
    return built.eval()


def table_of(tokens: torch.Tensor, num_slots: int = 4096, width: int = 16) -> HashedTable:
    class Here:
        last = tokens

    return HashedTable(num_slots, width, Here())  # type: ignore[arg-type]


def test_equal_last_tokens_read_equal_rows_and_others_almost_never() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(20, (4, 300))  # 400 pairs, 8,000 triples
    slots = table_of(tokens, num_slots=1 << 20).slots(tokens)
    assert slots.shape == (4, 300, 8)
    assert ((slots >= 0) & (slots < 1 << 20)).all()
    for order, columns in ((2, slice(4)), (3, slice(4, 8))):
        rows: dict[tuple[int, ...], tuple[int, ...]] = {}
        for text, read in zip(tokens.tolist(), slots[..., columns].tolist(), strict=True):
            before = [-1, -1, *text]
            for place in range(len(text)):
                last = tuple(before[place + 3 - order : place + 3])
                assert rows.setdefault(last, tuple(read[place])) == tuple(read[place])
        assert len(set(rows.values())) == len(rows)  # none shares all four
        assert len({row for read in rows.values() for row in read}) > 0.98 * 4 * len(rows)


def test_hashes_are_spread_evenly_and_the_same_in_every_process() -> None:
    tokens = torch.arange(2000).view(1, -1)
    slots = table_of(tokens, num_slots=64).slots(tokens)
    counts = slots.flatten().bincount(minlength=64)
    assert counts.min() > 150  # 250 on average
    assert counts.max() < 350
    assert slots[0, 7].tolist() == [11, 39, 54, 58, 28, 43, 9, 50]


def test_output_is_the_gated_sum_of_the_rows() -> None:
    torch.manual_seed(0)
    tokens, x = torch.randint(50, (2, 5)), torch.randn(2, 5, 16)
    table = table_of(tokens)
    rows = table.values.weight[table.slots(tokens)].sum(-2) / 8**0.5
    query = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    key = table.key(rows)
    key = key / (key.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    gate = torch.sigmoid((query * key).sum(-1, keepdim=True) / 4)
    torch.testing.assert_close(table(x), gate * table.value(rows))


def test_tokens_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \(2, 4, 16\) but must be of the tokens \(2, 5\)"):
        table_of(torch.zeros(2, 5, dtype=torch.int64))(torch.randn(2, 4, 16))


@pytest.mark.parametrize("how", ["instead", "beside"])
def test_a_decoder_with_a_hashed_table_sees_no_later_token(how) -> None:
    model = decoder({"1": how})
    tokens = torch.randint(300, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 300
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all()


def test_instead_the_memory_is_gone_and_beside_it_stays() -> None:
    assert not memories_in(decoder({"1": "instead"}))
    both = decoder({"1": "beside"}).get_submodule("base.model.layers.1.mlp.memory")
    assert isinstance(both, Both)
    assert isinstance(both.memory, ProductKeyMemory)
    assert both.memory.values.weight.shape == both.table.values.weight.shape
    two = decoder({"0": "instead"}, memory_layers=[0, 1])
    assert len(memories_in(two)) == 1
    assert len(tables_in(two)) == 2


def test_row_adam_trains_the_rows_that_were_read_alone() -> None:
    model = decoder({"1": "instead"}).train()
    (table,) = tables_in(model)
    optimizer, before = RowAdam(model, lr=0.1), table.weight.detach().clone()
    tokens = torch.randint(300, (1, 6))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    hashed = next(part for part in model.modules() if isinstance(part, HashedTable))
    assert set(changed) == set(hashed.slots(tokens)[:, :5].flatten().tolist())  # nothing is asked after the last
    for part in (hashed.key.weight, hashed.value.weight, hashed.key_norm.weight):
        assert part.grad is not None
        assert part.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("hashed", "message"),
    [
        ({"0": "instead"}, "hashed names layer 0, which has no memory: name it in model.memory_layers, too"),
        ({"2": "instead"}, "hashed names layer 2, which has no memory"),
        ({"-1": "instead"}, "hashed names layer -1, which has no memory"),
        ({"1": "above"}, "hashed, layer 1 is 'above' but must be 'instead' of the memory or 'beside' it"),
    ],
)
def test_a_mistake_is_named(hashed, message) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(hashed)
