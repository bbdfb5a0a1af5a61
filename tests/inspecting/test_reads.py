"""What each memory reads: against every read, recomputed from the queries and all keys, text by text without padding."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from inspected import BruteForce, build, by_brute_force, only_memory, ragged, read
from pkmem.inspecting.reads import MOST_CONTEXTS, MOST_READS, MemoryReads, watching_reads
from pkmem.layer.memory import memories_in
from pkmem.layer.usage import watching
from pkmem.lm.inspection import one_after_another, read_texts

KINDS = {
    "batch norm": {},
    "layer norm, one head": {"query_norm": "layer", "heads": 1, "knn": 8},
    "flat": {"keys": "flat"},
    "experts": {"experts": True, "heads": 3},
    "gate": {"gate": True, "value_dim": 20},
}
LENGTHS = (
    32,
    5,
    17,
    0,
    1,
    9,
    32,
    32,
    32,
    32,
    3,
    32,
)  # two batches; the first has to be padded, the text without tokens too


@pytest.fixture(params=KINDS, ids=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[MemoryReads, BruteForce, torch.Tensor]:
    model, texts = build(KINDS[request.param]), ragged(*LENGTHS)
    truth = by_brute_force(model, only_memory(model), texts)
    return read(model, texts).reads[0], truth, one_after_another(texts)


def test_counts_of_each_head_and_of_all(case) -> None:
    reads, truth, tokens = case
    num_slots = len(reads.all_heads.num_reads)
    for head, counts in enumerate(reads.heads):
        assert counts.num_reads.tolist() == truth.num_reads(num_slots, head)
        best = [slot for reader, slot in truth.best if reader == head]
        assert counts.num_top1.tolist() == np.bincount(best, minlength=num_slots).tolist()
        weights = np.zeros(num_slots)
        for (reader, _, slot), weight in truth.weights.items():
            weights[slot] += weight * (reader == head)
        np.testing.assert_allclose(counts.weight_sum, weights, rtol=1e-4, atol=1e-6)
    assert reads.all_heads.num_reads.tolist() == sum(head.num_reads for head in reads.heads).tolist()
    assert reads.all_heads.num_top1.tolist() == sum(head.num_top1 for head in reads.heads).tolist()
    assert int(reads.all_heads.num_reads.sum()) == len(truth.weights)
    assert len(tokens) == sum(LENGTHS)


def test_the_strongest_contexts_of_each_slot(case) -> None:
    reads, truth, _ = case
    pairs = truth.of_pairs()
    for slot in range(len(reads.all_heads.num_reads)):
        wanted = sorted((sum(w.values()) for (_, s), w in pairs.items() if s == slot), reverse=True)[:MOST_CONTEXTS]
        found = reads.context_weights[slot]
        np.testing.assert_allclose(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-6)
        assert not found[len(wanted) :].any()
        positions = reads.context_positions[slot, : len(wanted)].tolist()
        assert len(set(positions)) == len(positions)
        for place, position in enumerate(positions):
            heads = pairs[position, slot]
            assert found[place].item() == pytest.approx(sum(heads.values()), rel=1e-4)
            assert int(reads.context_heads[slot, place]) == sum(1 << head for head in heads)


def test_the_strongest_reads_of_each_token(case) -> None:
    reads, truth, tokens = case
    pairs = truth.of_pairs()
    for position in range(len(tokens)):
        wanted = sorted((sum(w.values()) for (p, _), w in pairs.items() if p == position), reverse=True)[:MOST_READS]
        slots = reads.read_slots[position].tolist()
        assert slots[len(wanted) :] == [-1] * (MOST_READS - len(wanted))
        np.testing.assert_allclose(reads.read_weights[position, : len(wanted)], wanted, rtol=1e-4, atol=1e-6)
        for place, slot in enumerate(slots[: len(wanted)]):
            heads = pairs[position, slot]
            assert reads.read_weights[position, place].item() == pytest.approx(sum(heads.values()), rel=1e-4)
            assert int(reads.read_heads[position, place]) == sum(1 << head for head in heads)


@pytest.mark.parametrize("by_count", [False, True])
def test_the_slots_that_a_token_of_the_vocabulary_reads_most(case, by_count: bool) -> None:
    reads, truth, tokens = case
    weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for (position, slot), heads in truth.of_pairs().items():
        weights[int(tokens[position])][slot] += sum(heads.values())
        counts[int(tokens[position])][slot] += 1
    types, most = tokens.unique(), 5
    found = reads.slots_of_tokens(types, most, by_count)
    assert found.slots.shape == (len(types), most)
    for row, token in enumerate(types.tolist()):
        amount = counts[token] if by_count else weights[token]
        wanted = sorted(amount.values(), reverse=True)[:most]
        slots = [slot for slot in found.slots[row].tolist() if slot >= 0]
        assert len(set(slots)) == len(slots) == len(wanted)
        np.testing.assert_allclose([amount[slot] for slot in slots], wanted, rtol=1e-4)
        assert found.counts[row, : len(slots)].tolist() == [counts[token][slot] for slot in slots]
        np.testing.assert_allclose(found.weights[row, : len(slots)], [weights[token][s] for s in slots], rtol=1e-4)


def test_figures_are_those_of_memory_usage() -> None:
    model, texts = build(), ragged(32, 32, 7)
    with watching(model) as usages, watching_reads(model, one_after_another(texts)) as reads:
        read_texts(model, texts)
    assert reads[0].all_heads.summary() == usages["memory_0"].summary()


def test_memories_that_share_a_table_are_watched_apart() -> None:
    model, texts = build(memory_layers=[0, 1], share_values=True), ragged(32, 20)
    first, second = read(model, texts).reads
    for memory, reads in zip(memories_in(model).values(), (first, second), strict=True):
        truth = by_brute_force(model, memory, texts)
        assert [counts.num_reads.tolist() for counts in reads.heads] == [truth.num_reads(64, head) for head in (0, 1)]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_nothing_is_read_of_nothing(lengths: tuple[int, ...]) -> None:
    (reads,) = read(build(), ragged(*lengths)).reads
    assert reads.all_heads.dead_slots == 64
    assert not reads.context_weights.any()
    assert reads.read_slots.shape == (0, MOST_READS)
    assert reads.slots_of_tokens(torch.zeros(0, dtype=torch.int64), 3, by_count=True).slots.shape == (0, 3)


def test_padding_in_front_is_no_token_of_the_text() -> None:
    model, text = build({"query_norm": "layer"}), ragged(6)[0]
    with watching_reads(model, text) as (padded,), torch.no_grad():
        model(
            input_ids=torch.cat([torch.zeros(4, dtype=torch.int64), text])[None],
            attention_mask=torch.tensor([[0] * 4 + [1] * 6]),
            position_ids=torch.tensor([[0] * 4 + [*range(6)]]),
        )
    (alone,) = read(model, [text]).reads
    assert padded.all_heads.num_reads.tolist() == alone.all_heads.num_reads.tolist()
    assert padded.read_slots.sort(1).values.tolist() == alone.read_slots.sort(1).values.tolist()


def test_nobody_watches_afterwards_and_too_many_heads_are_refused() -> None:
    model = build()
    with pytest.raises(RuntimeError), watching_reads(model, torch.zeros(0)):
        raise RuntimeError
    assert only_memory(model).watchers == ()
    many = build({"heads": 33})
    with (
        pytest.raises(ValueError, match="heads is 33 but must be at most 32 for a page"),
        watching_reads(many, torch.zeros(0)),
    ):
        pass
    assert only_memory(many).watchers == ()


def test_the_last_bit_of_32_heads_is_kept() -> None:
    (reads,) = read(build({"heads": 32, "query_dim": 2}), ragged(4)).reads
    assert (reads.read_heads < 0).any()  # the sign of 32 bits
