"""Inspection: the lines about a memory say what is in it and who read it."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from pkmem.layer.memory import memories_in
from pkmem.lm.build import build_model
from pkmem.lm.inspection import describe_memories, describe_reads
from pkmem.text import train_tokenizer
from tiny import MEMORY, MODEL


def build(**changes: object) -> PreTrainedModel:
    return build_model(replace(MODEL, **changes), MEMORY, vocab_size=300, eos_token_id=0).eval()


@pytest.fixture
def blocks() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(40, 50, (32,))} for _ in range(10)]


def test_sizes_place_and_norms_of_a_memory() -> None:
    model = build()
    (memory,) = memories_in(model).values()
    memory.values.weight.data[:] = torch.eye(32).repeat(2, 1)
    memory.values.weight.data[5] *= 3
    memory.values.weight.data[6] = 0
    assert describe_memories(model).splitlines() == [
        "memory_0 at base.transformer.h.1.mlp.memory",
        "  64 slots (8 x 8 sub-keys), 2 heads x 4 neighbours, query 8 (batch norm)",
        "  values 64 x 32 float32, 0.0 MB",
        "  norm of a value: median 1.000, smallest 0.000, largest 3.000",
    ]


def test_a_shared_table_is_named_as_such() -> None:
    shared = describe_memories(build(memory_layers=[0, 1], share_values=True))
    assert shared.count("shared with memory_0") == 1
    assert "memory_1 at base.transformer.h.1" in shared
    assert "shared" not in describe_memories(build(memory_layers=[0, 1]))


def test_a_model_without_memories_says_so(blocks: list) -> None:
    model = build(memory_layers=[])
    assert describe_memories(model) == "no memories in this model"
    tokenizer = train_tokenizer(["a b c"], 300)
    assert describe_reads(model, tokenizer, blocks, 100, 3) == "no memories in this model"


def test_hottest_slots_and_their_readers_are_counted_right(blocks: list) -> None:
    model, tokenizer = build(), train_tokenizer(["a b c"], 300)
    (memory,) = memories_in(model).values()
    read = []
    hook = memory.keys.register_forward_hook(lambda _, __, output: read.append(output[0].flatten(1)))
    with torch.no_grad():
        for block in blocks[:3]:
            model(input_ids=block["input_ids"][None])
    hook.remove()
    slots, tokens = torch.cat(read), torch.cat([block["input_ids"] for block in blocks[:3]])
    counts = slots.flatten().bincount(minlength=64)

    lines = describe_reads(model, tokenizer, blocks, max_tokens=3 * 32 + 31, hottest=4).splitlines()
    assert lines[0].startswith(f"memory_0 over 96 tokens: usage {(counts > 0).double().mean():.1%}, top-1 usage ")
    assert f"{(counts == 0).sum()} dead slots" in lines[0]
    assert len(lines) == 5
    expected = counts.sort(descending=True).values[:4].tolist()
    for line, num_reads in zip(lines[1:], expected, strict=True):
        slot, reads, readers = re.match(r"  slot +(\d+): ([\d,]+) reads, most at (.+)", line).groups()
        assert int(reads) == counts[int(slot)] == num_reads
        token, count = re.match(r"('.+?') x(\d+)", readers).groups()
        of_slot = tokens[(slots == int(slot)).any(1)].bincount()
        assert int(count) == of_slot.max()
        assert token in [repr(tokenizer.decode([t])) for t in (of_slot == of_slot.max()).nonzero().flatten().tolist()]


def test_no_hottest_slots_and_no_hooks_left(blocks: list) -> None:
    model, tokenizer = build(memory_layers=[0, 1]), train_tokenizer(["a b c"], 300)
    lines = describe_reads(model, tokenizer, blocks, max_tokens=1, hottest=0).splitlines()
    assert [line.split(":")[0] for line in lines] == ["memory_0 over 32 tokens", "memory_1 over 32 tokens"]
    assert len(describe_reads(model, tokenizer, blocks, 64, hottest=1000).splitlines()) == 2 + 2 * 64
    assert not any(module._forward_hooks for module in model.modules())
