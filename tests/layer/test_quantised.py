"""quantised.py: value tables in few bits, as a memory and everything that people do to a module sees them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pkmem import MemoryConfig, ProductKeyMemory, RowAdam, undrawn_tables
from pkmem.layer.counting import count_parameters
from pkmem.layer.quantised import QuantisedValues, quantise_values
from pkmem.layer.values import ValueTable, tables_in
from pkmem.ops.packing import BITS, pack_rows, row_bytes, unpack_rows

TINY = MemoryConfig(dim=24, num_sub_keys=7, heads=2, knn=3, query_dim=8, query_norm="layer")
by_bits = pytest.mark.parametrize("bits", BITS)


def memories(bits: int, **options) -> tuple[ProductKeyMemory, ProductKeyMemory]:
    """A memory with quantised values, and one that holds the same numbers as floats."""
    plain = ProductKeyMemory(MemoryConfig(**(TINY.to_dict() | options))).eval()
    quantised = copy.deepcopy(plain)
    quantise_values(quantised, bits)
    width = plain.values.weight.shape[1]
    plain.values.weight.data = unpack_rows(pack_rows(plain.values.weight, bits), width, bits)
    return quantised, plain


@by_bits
@pytest.mark.parametrize("options", [{}, {"gate": True, "value_dim": 9}, {"keys": "flat"}])
@pytest.mark.parametrize("num_tokens", [1, 8, 50])
def test_a_memory_reads_them_as_the_same_floats(bits, options, num_tokens):
    quantised, plain = memories(bits, **options)
    x = torch.randn(num_tokens, 24)
    with torch.no_grad():
        assert torch.allclose(quantised(x), plain(x), atol=1e-6)
    mask = torch.arange(num_tokens) % 3 > 0
    assert torch.allclose(quantised(x, mask), plain(x, mask), atol=1e-6)


@by_bits
def test_gradients_reach_queries_keys_and_hidden_states(bits):
    found = []
    for memory in memories(bits):
        x = torch.randn(20, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        memory(x).square().sum().backward()
        found.append([x.grad, *(part.grad for name, part in memory.named_parameters() if "values" not in name)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@by_bits
def test_they_do_not_train(bits):
    memory, _ = memories(bits)
    assert not memory.values.weight.requires_grad
    assert tables_in(memory) == []
    with pytest.raises(ValueError, match="no value table found"):
        RowAdam(memory)


@by_bits
def test_they_are_saved_loaded_copied_and_moved_as_they_are(bits):
    memory, _ = memories(bits)
    x = torch.randn(5, 24)
    expected = memory(x)
    again = ProductKeyMemory(TINY).eval()
    quantise_values(again, bits)
    again.load_state_dict(memory.state_dict())
    for held in (again, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), memory.to("cpu")):
        assert torch.equal(held(x), expected)
    halved = copy.deepcopy(memory).bfloat16()
    assert torch.equal(halved.values.weight, memory.values.weight)
    assert torch.allclose(halved(x.bfloat16()).float(), expected, atol=0.3)


@by_bits
def test_their_numbers_are_counted_and_their_size_is_shown(bits):
    memory, plain = memories(bits)
    assert count_parameters(memory) == count_parameters(plain)
    assert memory.values.weight.shape == (49, row_bytes(24, bits))
    assert f"QuantisedValues(num_slots=49, width=24, bits={bits})" in repr(memory)
    assert torch.allclose(memory.values.norms(), plain.values.weight.norm(dim=1))


@by_bits
def test_a_shared_table_stays_shared(bits):
    first = ProductKeyMemory(TINY)
    both = nn.ModuleList([first, ProductKeyMemory(TINY, values=first.values)])
    quantise_values(both, bits)
    assert isinstance(both[0].values, QuantisedValues)
    assert both[0].values is both[1].values


def test_the_backend_is_asked_for_as_of_a_table():
    memory, _ = memories(8)
    memory.backend = "reference"
    assert (memory.values.backend, memory.keys.backend) == ("reference", "reference")
    plain = ProductKeyMemory(TINY)
    plain.backend = "reference"
    quantise_values(plain, 8)
    assert plain.backend == "reference"


def test_a_table_without_numbers_becomes_one_without():
    with undrawn_tables():
        memory = ProductKeyMemory(TINY)
    quantise_values(memory, 4)
    assert memory.values.weight.is_meta
    assert memory.values.weight.shape == (49, row_bytes(24, 4))


def test_it_compiles_as_one_graph():
    memory, _ = memories(8)
    x = torch.randn(12, 24)
    assert torch.allclose(torch.compile(memory, fullgraph=True, backend="aot_eager")(x), memory(x), atol=1e-6)


def test_what_cannot_be_quantised_is_named_and_left_alone():
    experts = ProductKeyMemory(MemoryConfig(**(TINY.to_dict() | {"experts": True})))
    trained = ProductKeyMemory(TINY)
    optimizer = RowAdam(trained)
    spoiled = ProductKeyMemory(TINY)
    spoiled.values.weight.data[3, 4] = torch.nan
    for model, bits, why in (
        (experts, 8, "the slots are experts"),
        (trained, 8, "a RowAdam trains the tables"),
        (spoiled, 8, "not finite"),
        (nn.Linear(2, 2), 8, "no value table found"),
        (ProductKeyMemory(TINY), 5, "bits is 5 but must be one of 16, 8, 4"),
        (ProductKeyMemory(TINY).values, 8, "no value table found"),
    ):
        before = [type(part) for part in model.modules()]
        with pytest.raises(ValueError, match=why):
            quantise_values(model, bits)
        assert [type(part) for part in model.modules()] == before
    assert optimizer.param_groups
    quantised, _ = memories(8)
    with pytest.raises(ValueError, match="no value table found"):
        quantise_values(quantised, 8)
    assert isinstance(trained.values, ValueTable)
