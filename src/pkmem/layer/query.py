"""The query network, section 3.1 of Lample et al. 2019: hidden states -> one query per head, normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkmem.layer.config import MemoryConfig


class QueryNetwork(nn.Module):
    """Hidden states (n, d) -> one query per head (n, h, q): linear or two layers, then a norm (section 3.1)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.heads * config.query_dim
        hidden = config.query_hidden_dim
        self.project: nn.Module
        if hidden is None:
            self.project = nn.Linear(config.bound_dim, width)
        else:
            self.project = nn.Sequential(nn.Linear(config.bound_dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm = _query_norm(config)
        self.dropout = nn.Dropout(config.query_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, d) and a mask (n,) or None -> (n, h, q)."""
        query = self.project(x)
        if isinstance(self.norm, MaskedBatchNorm):
            query = self.norm(query, mask).unflatten(-1, (self.heads, -1))
        elif isinstance(self.norm, nn.SyncBatchNorm):
            raise ValueError(
                "query.norm is a SyncBatchNorm, which counts padding: convert_sync_batchnorm must not reach a memory; "
                "convert other parts alone, or build the memory with query_norm='layer' or 'rms'"
            )
        else:
            query = self.norm(query.unflatten(-1, (self.heads, -1)))
        return self.dropout(query)


def _query_norm(config: MemoryConfig) -> nn.Module:
    match config.query_norm:
        case "batch":
            return MaskedBatchNorm(config.heads * config.query_dim)
        case "layer":
            return nn.LayerNorm(config.query_dim)
        case "rms":
            return nn.RMSNorm(config.query_dim)
    return nn.Identity()


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the tokens that are real: padding counts neither now nor in eval statistics."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, c) and a mask (n,) or None -> (n, c); every row is normalised, real rows alone are counted."""
        if not self.training or len(x) == 0:
            # A cast here: eval statistics stay in the module's dtype, whatever the activations are in.
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if mask is None:
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        share = mask.to(exact.dtype).unsqueeze(-1)
        count = share.sum().clamp_min(1.0)
        mean = (exact * share).sum(0) / count
        variance = ((exact - mean).square() * share).sum(0) / count
        self._follow(mean.detach(), variance.detach(), count)
        normal = (exact - mean) * (variance + self.eps).rsqrt()
        return (normal * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        unbiased = variance * (count / (count - 1).clamp_min(1.0))
        has_variance = count > 1  # one token has none to follow
        self.num_batches_tracked.add_(has_variance)
        # Without a momentum, as while `torch.optim.swa_utils.update_bn` runs, all batches have the same share.
        share = 1 / self.num_batches_tracked.clamp_min(1) if self.momentum is None else self.momentum
        share = share * has_variance.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
