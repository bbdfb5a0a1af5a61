"""offloading.py: tables that a device map leaves on the CPU are read there, and not copied at every call."""

import pytest
import torch

from decoders import ids, with_memories
from pkmem.lm.offloading import keep_tables_where_they_are
from pkmem.lm.stored import stored_tables

accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("share_values", [False, True])
@torch.no_grad()
def test_a_table_on_the_cpu_is_no_weight_to_copy(share_values):
    model, tokens = with_memories(share_values=share_values).eval(), ids()
    expected = model(tokens).logits
    names = list(stored_tables(model))
    others = [name for name in names if name != names[0]]
    for place in (names[0], names[0].rpartition(".")[0]):
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in model.parameters())
        model.hf_device_map = {"": 0, place: "cpu"}
        keep_tables_where_they_are(model)
        assert not stored_tables(model)[names[0]].weight.is_meta
        assert all(stored_tables(model)[name].weight.is_meta for name in others)
        assert torch.equal(model(tokens).logits, expected)
        assert not stored_tables(model)[names[0]].weight.is_meta
        accelerate.hooks.remove_hook_from_submodules(model)


def test_a_model_in_one_place_is_left_alone():
    for places in (None, {"": "cpu"}):
        model = with_memories()
        if places is not None:
            model.hf_device_map = places
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        keep_tables_where_they_are(model)
        assert all(weight.is_meta for weight in model.parameters())
