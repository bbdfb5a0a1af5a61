"""What do the operators cost, stage by stage, next to plain torch and to what the machine can do?

    python benchmarks/operators.py            # 2,048 tokens, 4 heads, knn 32, query_dim 256, s 512, width 512 and 1,024

Each stage by itself, on the same inputs: selection from the half scores, scores and selection together, the bag, its
gradient in the weights, the gradient of selection, and the update of the rows that were read. An update is measured
from the log of one backward pass: sort, norm, Adam against SparseAdam on a sparse gradient and fused Adam on a dense one.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from floor import fastest, readers, updaters
from harness import Options, Report, check_same, interleave
from peers import select
from pkmem import MemoryConfig, RowAdam, ops
from pkmem.layer.values import ValueTable
from pkmem.ops import cpu
from pkmem.ops.cpu.selection import select as select_kernel
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.reading_log import RowGradient
from pkmem.ops.reads import Reads
from steps import moments_of

TORCH = "torch"


def main() -> None:
    """Measures every stage and writes operators.json and operators.md."""
    options = harness.start(__doc__, repeats=21)
    report = Report("operators", options)
    config, tokens = (
        (MemoryConfig(dim=16, num_sub_keys=16, heads=2, knn=4, query_dim=16), 16)
        if options.smoke
        else (MemoryConfig(dim=512), 2048)
    )
    query = torch.randn(tokens, config.heads, config.query_dim)
    sub_keys = torch.randn(config.heads, 2, config.num_sub_keys, config.query_dim // 2)
    selection(report, options, query, sub_keys, config.knn)
    scores_and_selection(report, options, query, sub_keys, config.knn)
    selection_backward(report, options, query, sub_keys, config.knn)
    for width in (config.bound_dim, 2 * config.bound_dim):
        table = ValueTable(config.num_slots, width)
        slots = torch.randint(config.num_slots, (tokens, config.heads * config.knn))
        weights = torch.rand(slots.shape)
        grad_output = torch.randn(tokens, width)
        bag(report, options, table.weight.detach(), slots, weights)
        bag_grad_weights(report, options, table.weight.detach(), slots, weights, grad_output)
        update(report, options, table, slots, weights, grad_output)
    report.note("torch selects by top-k of both halves, all knn^2 sums, top-k, softmax: the fastest form tried")
    report.note("pure read: the fastest of several loops that load the same rows and compute next to nothing")
    report.write()


def selection(report: Report, options: Options, query: Tensor, sub_keys: Tensor, knn: int) -> None:
    """From half scores to slots and weights."""
    tokens, heads, _ = query.shape
    half_scores = torch.einsum("nhpd,hpsd->nhps", query.unflatten(-1, (2, -1)), sub_keys).contiguous()
    rows = half_scores.flatten(1, 2).transpose(0, 1).contiguous()  # (2h, n, s), the layout of the kernel

    def ours() -> tuple[Tensor, Tensor]:
        scores, slots = torch.empty(tokens, heads, knn), torch.empty(tokens, heads, knn, dtype=torch.int64)
        run_over(select_kernel, (rows.numpy(), knn, scores.numpy(), slots.numpy()), tokens, 1 + 64 // heads)
        return slots, scores.softmax(-1)

    torchs = partial(select, half_scores, knn)
    check_same("weights of the selected slots", ours()[1], torchs()[1].sort(-1, descending=True).values)
    timings = interleave({"ours": ours, TORCH: torchs}, options.repeats)
    report.keep("selection", timings)
    report.add(f"selection, s {sub_keys.shape[2]}: torch / ours", timings.ratio(TORCH, "ours"))


def scores_and_selection(report: Report, options: Options, query: Tensor, sub_keys: Tensor, knn: int) -> None:
    """From queries to slots and weights: the matrix product is in both."""

    def ours() -> Tensor:
        return ops.product_key_topk(query, sub_keys, knn)[0].softmax(-1)

    def torchs() -> Tensor:
        half_scores = torch.einsum("nhpd,hpsd->nhps", query.unflatten(-1, (2, -1)), sub_keys)
        return select(half_scores, knn)[1]

    check_same("weights", ours(), torchs().sort(-1, descending=True).values)
    timings = interleave({"ours": ours, TORCH: torchs}, options.repeats)
    report.keep("scores and selection", timings)
    report.add("scores and selection: torch / ours", timings.ratio(TORCH, "ours"))


def selection_backward(report: Report, options: Options, query: Tensor, sub_keys: Tensor, knn: int) -> None:
    """From d(scores) to d(query) and d(sub_keys)."""
    query, sub_keys = query.clone().requires_grad_(), sub_keys.clone().requires_grad_()
    scores, slots = ops.product_key_topk(query, sub_keys, knn)
    back = torch.randn_like(scores)
    half_scores = torch.einsum("nhpd,hpsd->nhps", query.unflatten(-1, (2, -1)), sub_keys)
    num_sub_keys = sub_keys.shape[2]
    theirs = sum(
        half_scores[:, :, half].gather(-1, chosen)
        for half, chosen in enumerate((slots // num_sub_keys, slots % num_sub_keys))
    )
    assert isinstance(theirs, Tensor)
    ours, torchs = (
        partial(torch.autograd.grad, out, (query, sub_keys), back, retain_graph=True) for out in (scores, theirs)
    )
    for what, found, expected in zip(("query", "sub_keys"), ours(), torchs(), strict=True):
        check_same(f"d({what})", found, expected)
    timings = interleave({"ours": ours, TORCH: torchs}, options.repeats)
    report.keep("gradient of selection", timings)
    report.add("gradient of selection: torch / ours", timings.ratio(TORCH, "ours"))


def bag(report: Report, options: Options, values: Tensor, slots: Tensor, weights: Tensor) -> None:
    """The weighted sum of rows, and the pure read of the same rows."""
    ours = partial(ops.weighted_sum, values, slots, weights)
    torchs = partial(F.embedding_bag, slots, values, mode="sum", per_sample_weights=weights)
    check_same("bag", ours(), torchs())
    reads = readers(values, slots)
    timings = interleave({"ours": ours, TORCH: torchs, **reads}, options.repeats)
    width = values.shape[1]
    report.keep(f"bag, width {width}", timings)
    report.add(f"bag, width {width}: pure read / ours", timings.ratio(timings.fastest(reads), "ours"))
    report.add(f"bag, width {width}: torch / ours", timings.ratio(TORCH, "ours"))


def bag_grad_weights(
    report: Report, options: Options, values: Tensor, slots: Tensor, weights: Tensor, grad_output: Tensor
) -> None:
    """d(weights) of the bag: the same rows are read once more."""
    weights = weights.clone().requires_grad_()
    summed = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights)
    ours = partial(cpu.row_products, values, slots, grad_output)
    torchs = partial(torch.autograd.grad, summed, weights, grad_output, retain_graph=True)
    check_same("d(weights)", ours(), torchs()[0])
    timings = interleave({"ours": ours, TORCH: torchs, "pure read": fastest(readers(values, slots))}, options.repeats)
    width = values.shape[1]
    report.keep(f"d(weights) of the bag, width {width}", timings)
    report.add(f"d(weights), width {width}: pure read / ours", timings.ratio("pure read", "ours"))
    report.add(f"d(weights), width {width}: torch / ours", timings.ratio(TORCH, "ours"))


def update(
    report: Report, options: Options, table: ValueTable, slots: Tensor, weights: Tensor, grad_output: Tensor
) -> None:
    """From a finished backward pass to an updated table, one table and one pair of moments for all."""
    ours = RowAdam(table, 1e-5, max_norm=1e9)
    sparse = torch.optim.SparseAdam([table.weight], 1e-5)
    dense = torch.optim.Adam([table.weight], 1e-5, fused=True)

    summed = {
        is_sparse: F.embedding_bag(slots, table.weight, mode="sum", per_sample_weights=weights, sparse=is_sparse)
        for is_sparse in (True, False)
    }

    def our_update() -> None:
        reads = Reads(len(table.weight), ops.choose_backend(table.weight), [(slots, weights, grad_output)])
        table.weight.grad = RowGradient(table.weight, reads)
        ours.step()

    def torch_update(optimizer: torch.optim.Optimizer, is_sparse: bool) -> None:
        summed[is_sparse].backward(grad_output, retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()

    our_update()
    moments = moments_of(ours, table.weight)
    sparse.state[table.weight] = {"step": 0, **moments}
    dense.state[table.weight] = {"step": torch.zeros(()), **moments}
    timings = interleave(
        {
            "ours": our_update,
            "SparseAdam": partial(torch_update, sparse, True),
            "dense Adam (fused)": partial(torch_update, dense, False),
            "pure update": fastest(updaters(table.weight, moments, slots.unique())),
        },
        options.repeats,
    )
    width = table.weight.shape[1]
    report.keep(f"values' gradient and update, width {width}", timings)
    for name in ("SparseAdam", "dense Adam (fused)"):
        report.add(f"values' gradient and update, width {width}: {name} / ours", timings.ratio(name, "ours"))
    report.add(f"values' gradient and update, width {width}: ours / pure update", timings.ratio("ours", "pure update"))


if __name__ == "__main__":
    main()
