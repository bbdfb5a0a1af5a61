import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from pkmem import MemoryConfig, MemoryUsage, ProductKeyMemory

CONFIG = MemoryConfig(dim=6, num_sub_keys=4, heads=2, knn=3, query_dim=4, query_norm="layer")


def counted(slots: list, weights: list) -> MemoryUsage:
    """The usage of a memory of 16 slots after one reading (n, h, knn)."""
    usage = MemoryUsage(ProductKeyMemory(CONFIG))
    usage.update(torch.tensor(slots), torch.tensor(weights))
    return usage


def by_hand(slots: Tensor, weights: Tensor, num_slots: int) -> dict[str, float]:
    """The definitions of section 4.1, and ours, in loops."""
    z, reads, best = [0.0] * num_slots, [0] * num_slots, set()
    for place in np.ndindex(*slots.shape):
        z[int(slots[place])] += float(weights[place])
        reads[int(slots[place])] += 1
        if place[-1] == 0:
            best.add(int(slots[place]))
    z = [share / sum(z) for share in z]
    return {
        "usage": sum(share > 0 for share in z) / num_slots,
        "top1_usage": len(best) / num_slots,
        "kl": math.log(num_slots) + sum(share * math.log(share) for share in z if share > 0),
        "dead_slots": reads.count(0),
        "hottest_share": max(reads) / sum(reads),
    }


def test_every_figure_is_its_definition_over_several_batches() -> None:
    memory = ProductKeyMemory(CONFIG)
    batches = [torch.randn(3, 6), torch.randn(2, 2, 6), torch.randn(0, 6)]
    with MemoryUsage(memory) as usage:
        for x in batches:
            memory(x)
    with torch.no_grad():
        slots, weights = memory.keys(memory.query(torch.cat([x.reshape(-1, 6) for x in batches])))
    assert usage.summary() == pytest.approx(by_hand(slots, weights, 16), rel=1e-6)
    assert 0 < usage.dead_slots < 16  # or the figures above would show little


def test_even_use_has_no_divergence_and_one_slot_has_the_most() -> None:
    even = counted([[[slot]] for slot in range(16)], [[[1.0]]] * 16)
    assert even.kl == pytest.approx(0, abs=1e-12)
    assert (even.usage, even.dead_slots, even.hottest_share) == (1, 0, 1 / 16)
    one = counted([[[5]]] * 3, [[[0.7]]] * 3)
    assert one.kl == pytest.approx(math.log(16))  # nats
    assert (one.usage, one.dead_slots, one.hottest_share) == (1 / 16, 15, 1)


def test_divergence_follows_the_weights_not_the_reads() -> None:
    usage = counted([[[0, 1]]], [[[0.75, 0.25]]])
    assert usage.kl == pytest.approx(math.log(16) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))


def test_top1_usage_counts_each_heads_best_only() -> None:
    usage = counted([[[0, 1, 2], [3, 1, 2]], [[0, 4, 5], [0, 4, 5]]], [[[0.5, 0.3, 0.2]] * 2] * 2)
    assert usage.top1_usage == 2 / 16
    assert usage.usage == 6 / 16


def test_a_slot_read_with_weight_zero_is_read_but_not_used() -> None:
    usage = counted([[[0, 1]]], [[[1.0, 0.0]]])
    assert (usage.usage, usage.dead_slots) == (1 / 16, 14)


def test_the_hottest_percent_is_taken_of_all_slots() -> None:
    usage = MemoryUsage(ProductKeyMemory(MemoryConfig(dim=4, num_sub_keys=20, knn=1, query_dim=4)))
    slots = torch.tensor([0] * 40 + [1] * 30 + [2] * 20 + [3] * 10 + list(range(4, 104)))
    usage.update(slots[:, None, None], torch.ones(200, 1, 1))
    assert usage.hottest_share == 100 / 200  # 4 of 400 slots


def test_nothing_read_is_not_a_number() -> None:
    usage = MemoryUsage(ProductKeyMemory(CONFIG))
    assert math.isnan(usage.kl)
    assert math.isnan(usage.hottest_share)
    assert (usage.usage, usage.top1_usage, usage.dead_slots) == (0, 0, 16)


def test_reset_starts_anew_and_close_ends_while_the_counts_stay() -> None:
    memory = ProductKeyMemory(CONFIG)
    usage = MemoryUsage(memory)
    x = torch.randn(5, 6)
    memory(x)
    once = usage.num_reads.clone()
    assert once.sum() == 5 * 2 * 3
    memory(x)
    assert torch.equal(usage.num_reads, 2 * once)
    usage.reset()
    assert usage.num_reads.sum() == usage.num_top1.sum() == usage.weight_sum.sum().item() == 0
    memory(x)
    usage.close()
    memory(x)
    assert torch.equal(usage.num_reads, once)


def test_a_with_block_ends_the_counting_even_by_an_error() -> None:
    memory = ProductKeyMemory(CONFIG)
    with pytest.raises(ValueError, match="x is"), MemoryUsage(memory) as usage:
        memory(torch.randn(1, memory(torch.randn(5, 6)).numel()))
    memory(torch.randn(5, 6))
    assert usage.num_reads.sum() == 5 * 2 * 3


def test_of_a_shared_table_only_the_watched_memorys_reads_count() -> None:
    watched = ProductKeyMemory(CONFIG)
    other = ProductKeyMemory(CONFIG, values=watched.values)
    with MemoryUsage(watched) as usage:
        other(torch.randn(50, 6))
        assert usage.num_reads.sum() == 0
        watched(torch.randn(5, 6))
    assert usage.num_reads.sum() == 5 * 2 * 3


def test_counting_changes_neither_outputs_nor_gradients() -> None:
    memory = ProductKeyMemory(CONFIG)
    x = torch.randn(5, 6)
    memory(x).sum().backward()
    plain = memory(x), memory.values.weight.grad.clone(), memory.keys.sub_keys.grad.clone()
    memory.zero_grad()
    with MemoryUsage(memory) as usage:
        memory(x).sum().backward()
        watched = memory(x), memory.values.weight.grad, memory.keys.sub_keys.grad
    assert all(map(torch.equal, plain, watched))
    assert not usage.weight_sum.requires_grad


def test_flat_keys_are_counted_alike() -> None:
    memory = ProductKeyMemory(MemoryConfig(dim=6, num_sub_keys=4, knn=3, query_dim=4, keys="flat"))
    with MemoryUsage(memory) as usage:
        memory(torch.randn(5, 6))
    assert usage.num_reads.sum() == 5 * 4 * 3
    assert usage.weight_sum.sum().item() == pytest.approx(5 * 4, rel=1e-6)


@pytest.mark.case(
    "Padding and recomputation",
    "MemoryUsage of a memory that torch.compile has compiled already, with fullgraph=True and without",
    "works",
    "https://github.com/pytorch/pytorch/issues/117758",
)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_memory_compiled_before_is_counted_and_not_compiled_for_each_counter(fullgraph) -> None:
    memory, x = ProductKeyMemory(CONFIG), torch.randn(5, 6)
    counter = CompileCounter()
    compiled = torch.compile(memory, backend=counter, fullgraph=fullgraph)
    compiled(x)
    for _ in range(3):
        with MemoryUsage(memory) as usage:
            compiled(x)
        compiled(x)
        with MemoryUsage(memory) as eager:
            memory(x)
        assert torch.equal(usage.num_reads, eager.num_reads)
        assert torch.equal(usage.num_top1, eager.num_top1)
        assert usage.num_reads.sum() == 5 * 2 * 3
    assert counter.frame_count == 2


def test_several_count_side_by_side_and_a_copy_counts_for_itself() -> None:
    memory = ProductKeyMemory(CONFIG)
    with MemoryUsage(memory) as outer:
        memory(torch.randn(5, 6))
        with MemoryUsage(memory) as inner:
            memory(torch.randn(2, 6))
            copy.deepcopy(memory)(torch.randn(9, 6))
        memory(torch.randn(1, 6))
    assert (outer.num_reads.sum(), inner.num_reads.sum()) == (8 * 6, 2 * 6)
    assert memory.watchers == ()
