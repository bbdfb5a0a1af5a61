"""The keys, sections 3.1 and 3.2: queries -> the slots that match best, and their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.config import MemoryConfig
from pkmem.layer.padding import reads_of_real_tokens


class ProductKeys(nn.Module):
    """Two sets of s sub-keys per head; a slot's key is a pair of them (section 3.2)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.knn = config.knn
        self.backend: str | None = None
        self.sub_keys = nn.Parameter(torch.empty(config.heads, 2, config.num_sub_keys, config.query_dim // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within +-1 / sqrt(q / 2), as in the paper's public code."""
        bound = 1 / math.sqrt(self.sub_keys.shape[-1])
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def forward(self, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) and a mask (n,) or None -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        scores, slots = ops.product_key_topk(query, self.sub_keys, self.knn, backend=self.backend)
        return reads_of_real_tokens(slots, scores.softmax(-1), mask)


class FlatKeys(nn.Module):
    """s ** 2 full keys per head, compared one by one: what product keys save (section 4.5, table 4)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.knn = config.knn
        self.backend: str | None = None
        self.keys = nn.Parameter(torch.empty(config.heads, config.num_slots, config.query_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within +-1 / sqrt(q), as in the paper's public code."""
        bound = 1 / math.sqrt(self.keys.shape[-1])
        nn.init.uniform_(self.keys, -bound, bound)

    def forward(self, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) and a mask (n,) or None -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        heads, num_slots, _ = self.keys.shape
        slots = ops.flat_topk(query, self.keys, self.knn, backend=self.backend)
        first_row = torch.arange(heads, device=slots.device).unsqueeze(-1) * num_slots
        scores = ops.row_products(
            self.keys.flatten(0, 1), (slots + first_row).flatten(0, 1), query.flatten(0, 1), backend=self.backend
        )
        return reads_of_real_tokens(slots, scores.view_as(slots).softmax(-1), mask)
