"""The keys, sections 3.1 and 3.2: queries -> the slots that match best, and their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.config import MemoryConfig
from pkmem.layer.padding import reads_of_real_tokens


class Keys(nn.Module):
    """Queries -> slots and weights; abstract.

    Attributes:
        knn: slots per head.
        backend: None for the fastest on the device, or one of `pkmem.ops.BACKENDS`.
        log_temperature: None, or (h,) the logarithm of what each head's scores are divided by.
    """

    log_temperature: nn.Parameter | None

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.knn = config.knn
        self.backend: str | None = None
        temperature = nn.Parameter(torch.empty(config.heads)) if config.learned_temperature else None
        self.register_parameter("log_temperature", temperature)

    def _reset(self, keys: Tensor) -> None:
        """Keys uniform within +-1 / sqrt(their width), as in the paper's public code; temperatures 1."""
        bound = 1 / math.sqrt(keys.shape[-1])
        nn.init.uniform_(keys, -bound, bound)
        if self.log_temperature is not None:
            nn.init.zeros_(self.log_temperature)

    def _weights(self, scores: Tensor) -> Tensor:
        """Scores (n, h, knn) -> softmax weights (eq. 2)."""
        if self.log_temperature is not None:
            scores = scores * torch.exp(-self.log_temperature).unsqueeze(-1)
        return scores.softmax(-1)


class ProductKeys(Keys):
    """Two sets of s sub-keys per head; a slot's key is a pair of them (section 3.2)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.sub_keys = nn.Parameter(torch.empty(config.heads, 2, config.num_sub_keys, config.query_dim // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the sub-keys anew; temperatures are 1 again."""
        self._reset(self.sub_keys)

    def forward(self, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) and a mask (n,) or None -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        scores, slots = ops.product_key_topk(query, self.sub_keys, self.knn, backend=self.backend)
        return reads_of_real_tokens(slots, self._weights(scores), mask)


class FlatKeys(Keys):
    """s ** 2 full keys per head, compared one by one: what product keys save (section 4.5, table 4)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.keys = nn.Parameter(torch.empty(config.heads, config.num_slots, config.query_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the keys anew; temperatures are 1 again."""
        self._reset(self.keys)

    def forward(self, query: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) and a mask (n,) or None -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        heads, num_slots, _ = self.keys.shape
        slots = ops.flat_topk(query, self.keys, self.knn, backend=self.backend)
        first_row = torch.arange(heads, device=slots.device).unsqueeze(-1) * num_slots
        scores = ops.row_products(
            self.keys.flatten(0, 1), (slots + first_row).flatten(0, 1), query.flatten(0, 1), backend=self.backend
        )
        return reads_of_real_tokens(slots, self._weights(scores.view_as(slots)), mask)
