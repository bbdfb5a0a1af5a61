"""What torch's counter counts for the operators, against loops that multiply one by one in thought."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pkmem
from pkmem import ops

N, H, KNN, SUB_KEYS, QUERY, WIDTH = 5, 2, 4, 8, 6, 7


def counted(run) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items() if str(op).startswith("pkmem")}


def test_selection_multiplies_each_half_with_each_sub_key() -> None:
    query = torch.randn(N, H, QUERY, requires_grad=True)
    sub_keys = torch.randn(H, 2, SUB_KEYS, QUERY // 2, requires_grad=True)

    def run() -> None:
        scores, _ = ops.product_key_topk(query, sub_keys, KNN, backend="reference")
        scores.sum().backward()

    assert counted(run) == {
        "pkmem.product_key_topk": N * H * 2 * SUB_KEYS * (QUERY // 2) * 2,
        # The gradient of a score in a query half is a sub-key times a number, and the other way round.
        "pkmem.product_key_topk_backward": N * H * KNN * 2 * (2 * (QUERY // 2) * 2),
    }


def test_flat_keys_are_all_compared() -> None:
    query, keys = torch.randn(N, H, QUERY), torch.randn(H, SUB_KEYS**2, QUERY)
    run = lambda: ops.flat_topk(query, keys, KNN, backend="reference")  # noqa: E731
    assert counted(run)["pkmem.flat_topk"] == N * H * SUB_KEYS**2 * QUERY * 2


@pytest.mark.parametrize("trains_rows", [False, True])
def test_a_read_is_a_product_of_the_width_forward_and_one_for_each_gradient(trains_rows: bool) -> None:
    config = pkmem.MemoryConfig(dim=WIDTH, num_sub_keys=SUB_KEYS, heads=H, knn=KNN, query_dim=QUERY, experts=True)
    memory, x = pkmem.ProductKeyMemory(config), torch.randn(N, WIDTH, requires_grad=True)
    memory.backend = "reference"
    optimizer = pkmem.RowAdam(memory) if trains_rows else None  # while it lives, tables have no dense gradient
    counts = counted(lambda: memory(x).sum().backward())
    counts.pop("pkmem.product_key_topk"), counts.pop("pkmem.product_key_topk_backward")
    of_reads = 2 * N * H * KNN * WIDTH
    back = {"pkmem.weighted_sum": of_reads, "pkmem.row_products": of_reads}  # each is the gradient of the other
    if optimizer is None:
        assert counts == {name: 2 * flops for name, flops in back.items()} | {
            "pkmem.weighted_sum_grad_values": 2 * of_reads
        }
    else:
        assert counts == back | {f"{name}_logged": flops for name, flops in back.items()}
