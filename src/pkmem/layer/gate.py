"""The output gate of Memory+ (Berges et al. 2024)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pkmem.layer.config import MemoryConfig
from pkmem.layer.linear import apply_linear


class OutputGate(nn.Module):
    """Memory+'s output: W2(m(x) * silu(W1 x)) (Berges et al. 2024)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.bound_dim, config.value_width, bias=False)
        self.project = nn.Linear(config.value_width, config.bound_dim, bias=False)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Memory output (n, v) and hidden states (n, d) -> (n, d)."""
        return apply_linear(self.project, out * F.silu(apply_linear(self.gate, x)))
