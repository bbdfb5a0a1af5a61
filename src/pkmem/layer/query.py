"""The query network, section 3.1 of Lample et al. 2019: hidden states -> one query per head, normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkmem.layer.config import MemoryConfig
from pkmem.layer.crossing import AllProcesses
from pkmem.layer.linear import apply_linear
from pkmem.layer.recomputation import is_recomputation


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
        self.is_batch_norm = config.query_norm == "batch"  # of all heads' channels; the others norm a query alone
        self.norm = _query_norm(config)
        self.dropout = nn.Dropout(config.query_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, d) and a mask (n,) or None -> (n, h, q)."""
        query = apply_linear(self.project, x)
        if not self.is_batch_norm:
            return self.dropout(self.norm(query.unflatten(-1, (self.heads, -1))))
        if mask is None or not self.norm.training:
            query = self.norm(query)
        elif isinstance(self.norm, nn.SyncBatchNorm):
            raise ValueError(
                "query.norm is a SyncBatchNorm, which counts padding: leave memories out of convert_sync_batchnorm, "
                "or set query_norm='layer' or 'rms'"
            )
        else:
            query = self.norm(query, mask)
        query = query.unflatten(-1, (self.heads, -1))
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
    """Batch normalisation over the tokens that are real: padding counts neither now nor in eval statistics.

    A forward that activation checkpointing runs again does not follow the batch a second time.

    Attributes:
        processes: whose tokens are normalised together in training, as `pkmem.shard_values` sets it; None: this one.
    """

    processes: AllProcesses | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, c) and a mask (n,) or None -> (n, c); every row is normalised, real rows alone are counted."""
        if not self.training or (len(x) == 0 and self.processes is None):
            # A cast here: eval statistics stay in the module's dtype, whatever the activations are in.
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self._momentum()
        if mask is None and self.processes is None:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            out = F.batch_norm(x, mean, variance, self.weight, self.bias, True, momentum, self.eps)
            self._adopt(mean, variance, torch.ones((), dtype=torch.bool, device=x.device))
            return out
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        count, mean, variance = self._statistics(exact, mask)
        normal = (exact - mean) * (variance + self.eps).rsqrt()
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp_min(1.0))
            counted = count > 1  # one token has no variance to follow
            followed = momentum * counted.to(self.running_mean.dtype)
            self._adopt(
                self.running_mean.lerp(mean.to(self.running_mean.dtype), followed),
                self.running_var.lerp(unbiased.to(self.running_var.dtype), followed),
                counted,
            )
        return (normal * self.weight + self.bias).to(x.dtype)

    def _statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """How many real tokens there are, their mean (c,) and variance (c,), over all processes."""
        share = x.new_ones(len(x), 1) if mask is None else mask.to(x.dtype).unsqueeze(-1)
        count = share.sum().clamp_min(1.0)
        mean = (x * share).sum(0) / count
        squares = ((x - mean).square() * share).sum(0)
        if self.processes is None:
            return count, mean, squares / count
        # Means and squares about them, put together as by Chan et al. 1979: sums of squares would cancel.
        own = torch.cat((share.sum().unsqueeze(0), mean, squares))
        counts, means, squares = self.processes.gathered(own).split((1, len(mean), len(mean)), 1)
        count = counts.sum().clamp_min(1.0)
        mean = (counts * means).sum(0) / count
        squares = (squares + counts * (means - mean).square()).sum(0)
        return count, mean, squares / count

    def _momentum(self) -> float:
        """The share of this batch; without one, as `torch.optim.swa_utils.update_bn` sets it, all have the same."""
        assert self.num_batches_tracked is not None
        return 1 / (float(self.num_batches_tracked) + 1) if self.momentum is None else self.momentum

    def _adopt(self, mean: Tensor, variance: Tensor, counted: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        adopt = _compiled_adopt if torch.compiler.is_compiling() else _adopt
        adopt(self.running_mean, self.running_var, self.num_batches_tracked, mean, variance, counted)


def _adopt(
    running_mean: Tensor, running_var: Tensor, num_batches: Tensor, mean: Tensor, variance: Tensor, counted: Tensor
) -> None:
    if not is_recomputation():
        running_mean.copy_(mean)
        running_var.copy_(variance)
        num_batches.add_(counted)


# An operator of its own, so that compiled code asks each time it runs.
_compiled_adopt = torch.library.custom_op(
    "pkmem::adopt_statistics", _adopt, mutates_args=("running_mean", "running_var", "num_batches")
)
