"""The same layer as others have it, each in its strongest form, on the parameters of ours where it can.

`NOTES` says how each differs from ours: it belongs under every table that names a peer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkmem.layer.memory import ProductKeyMemory

PLAIN, PKM, PEER, FFN = "plain torch", "product-key-memory", "PEER-pytorch", "FFN"
NOTES = {
    PLAIN: "plain torch: linear query and batch norm, einsum scores, top-k of the halves, top-k of the k^2 sums, "
    "softmax, F.embedding_bag; the parameters are ours and so is the output",
    PKM: "product-key-memory (PyPI): same table, heads, knn, sub-keys and query width; its query norm is a layer norm, "
    "its query has no bias",
    PEER: "PEER-pytorch (PyPI): another layer, single-neuron experts; same heads, knn, query width and softmax, and as "
    "many value parameters as ours, in two tables (down and up) of half as many slots",
    FFN: "FFN: the 4d MLP a memory would replace; far fewer parameters, shown for scale and never the best peer",
}


class PlainMemory(nn.Module):
    """Section 3 of the paper in plain torch.

    Args:
        memory: whose parameters to use.
        sparse: a sparse gradient for the values, as `nn.EmbeddingBag(sparse=True)` gives.
    """

    def __init__(self, memory: ProductKeyMemory, sparse: bool = False) -> None:
        super().__init__()
        self.project, self.norm = memory.query.project, memory.query.norm
        self.sub_keys, self.values = memory.keys.sub_keys, memory.values.weight
        self.knn, self.sparse = memory.config.knn, sparse

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, v)."""
        heads, _, _, half = self.sub_keys.shape
        query = self.norm(self.project(x)).view(-1, heads, 2, half)
        half_scores = torch.einsum("nhpd,hpsd->nhps", query, self.sub_keys)
        slots, weights = select(half_scores, self.knn)
        return F.embedding_bag(
            slots.flatten(1), self.values, mode="sum", per_sample_weights=weights.flatten(1), sparse=self.sparse
        )


def select(half_scores: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """Slots and weights (n, h, knn) from scores (n, h, 2, s), by way of all knn ** 2 sums."""
    best, indices = half_scores.topk(knn)  # sorted halves make the next top-k faster than they cost
    sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]
    scores, places = sums.flatten(-2).topk(knn, sorted=False)
    first = indices[:, :, 0].gather(-1, places // knn)
    second = indices[:, :, 1].gather(-1, places % knn)
    return first * half_scores.shape[-1] + second, scores.softmax(-1)


class _Batched(nn.Module):
    """A layer of (1, n, d) as one of (n, d)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.unsqueeze(0)).squeeze(0)
        return out


def product_key_memory(memory: ProductKeyMemory) -> nn.Module:
    """lucidrains/product-key-memory on our value table."""
    from product_key_memory import PKM as Layer

    config = memory.config
    half = config.query_dim // 2
    layer = Layer(config.bound_dim, config.heads, 1, config.knn, half)  # then enlarged, without a table of its own
    layer.num_keys, layer.num_memories = config.num_sub_keys, config.num_slots
    layer.keys = nn.Parameter(torch.randn(config.heads, config.num_sub_keys, 2, half) / math.sqrt(half))
    layer.values.weight = memory.values.weight
    return _Batched(layer)


def peer(memory: ProductKeyMemory) -> nn.Module:
    """lucidrains/PEER-pytorch with as many value parameters."""
    from PEER_pytorch import PEER as Layer

    config = memory.config
    layer = Layer(
        config.bound_dim,
        heads=config.heads,
        num_experts=max(config.knn, round(config.num_sub_keys / math.sqrt(2))) ** 2,
        num_experts_per_head=config.knn,
        dim_key=config.query_dim // 2,
        non_competing_scores=False,
    )
    return _Batched(layer)


def feed_forward(memory: ProductKeyMemory) -> nn.Module:
    """The MLP of the same width."""
    width = memory.config.bound_dim
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


LAYERS: dict[str, Callable[[ProductKeyMemory], nn.Module]] = {
    PLAIN: PlainMemory,
    PKM: product_key_memory,
    PEER: peer,
    FFN: feed_forward,
}
