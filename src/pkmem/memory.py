"""The memory layer, section 3 of Lample et al. 2019 from top to bottom.

x --QueryNetwork--> query --ProductKeys--> slots, weights --ValueTable--> sum of weighted values
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkmem import ops
from pkmem.config import MemoryConfig
from pkmem.ops.reading_log import ReadLog
from pkmem.pages import prefer_huge_pages


class ProductKeyMemory(nn.Module):
    """A product-key memory (Lample et al. 2019, section 3): (..., d) -> (..., d').

    Causal in eval mode, and in training mode with query_norm "layer", "rms" or "none". With "batch" (the
    paper's) a training batch is normalised together, so a later token touches an earlier one's query.

    Args:
        config: the memory's shape and options; `config.dim` is d, `config.output_dim` is d'.
        values: a table to share with other memories (pass `another.values`); None makes one.

    Attributes:
        query: hidden states -> queries. keys: queries -> slots and weights. values: the table.
        neurons: None, or the input weights of its experts.
        backend: None for the fastest on the device, or one of `pkmem.ops.BACKENDS`.

    Raises:
        ValueError: `config.dim` is None, or the shared table has another shape.

    Example:
        >>> memory = ProductKeyMemory(MemoryConfig(dim=64, num_sub_keys=32, knn=8, query_dim=32))
        >>> memory(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MemoryConfig, values: ValueTable | None = None) -> None:
        super().__init__()
        shape = (config.num_slots, config.value_width)
        if values is not None and tuple(values.weight.shape) != shape:
            raise ValueError(f"the shared table is {tuple(values.weight.shape)} but this memory needs (m, v) = {shape}")
        self.config = config
        self.query = QueryNetwork(config)
        self.keys = ProductKeys(config) if config.keys == "product" else FlatKeys(config)
        self.values = ValueTable(*shape) if values is None else values
        self.neurons = NeuronTable(config.num_slots, config.bound_dim) if config.experts else None
        self.gate = OutputGate(config) if config.gate else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reads the memory.

        Args:
            x: (..., d) hidden states.
            mask: (...) bool, True where a token is real; padding stays out of batch-norm statistics.

        Returns:
            (..., d') in the dtype of x.
        """
        tokens = x.reshape(-1, x.shape[-1])
        out = self._decode(tokens)
        if out is not None:
            return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])
        query = self.query(tokens, None if mask is None else mask.flatten())
        slots, weights = self.keys(query)
        if self.neurons is not None:
            weights = weights * F.gelu(self.neurons(slots, tokens))
        out = self.values(slots, weights).to(x.dtype)
        if self.gate is not None:
            out = self.gate(out, tokens)
        return self.dropout(out).reshape(*x.shape[:-1], out.shape[-1]).to(x.dtype)

    def _decode(self, tokens: Tensor) -> Tensor | None:
        """The output for a few tokens without gradient, by one kernel; None where that cannot stand for the parts."""
        query: Any = self.query
        keys: Any = self.keys
        values = self.values
        if len(tokens) > ops.MOST_DECODED or self.training or torch.is_grad_enabled():
            return None
        parts = (query, query.project, query.norm, query.dropout, keys, values, self.dropout)
        gate: Any = self.gate
        gates = () if gate is None else (gate, gate.gate, gate.project)
        if tuple(map(type, parts)) not in _DECODED or tuple(map(type, gates)) not in _DECODED_GATES:
            return None
        if any(p._forward_hooks or p._forward_pre_hooks for p in (*parts, *gates)):
            return None
        if any(linear.bias is not None for linear in gates[1:]):
            return None
        catches_up = values.log is not None and values.log.before_read is not None
        if catches_up or self.neurons is not None or query.project.bias is None or values.backend != keys.backend:
            return None
        norm = [getattr(query.norm, name) for name in ops.NORM_TENSORS[self.config.query_norm]]
        return ops.decode(
            tokens,
            query.project.weight,
            query.project.bias,
            self.config.query_norm,
            norm,
            getattr(query.norm, "eps", None),
            keys.sub_keys,
            values.weight,
            None if gate is None else (gate.gate.weight, gate.project.weight),
            keys.knn,
            backend=values.backend,
        )

    @property
    def backend(self) -> str | None:
        """The operators' backend; None takes the fastest for the device."""
        return self.values.backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        for part in (self.keys, *tables_in(self)):
            part.backend = backend

    def reset_parameters(self) -> None:
        """Draws all weights anew, a shared table included."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()


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
        assert self.momentum is not None
        unbiased = variance * (count / (count - 1).clamp_min(1.0))
        self.num_batches_tracked.add_(1)
        share = self.momentum * (count > 1).to(self.running_mean.dtype)  # one token has no variance to follow
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


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

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        scores, slots = ops.product_key_topk(query, self.sub_keys, self.knn, backend=self.backend)
        return slots, scores.softmax(-1)


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

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (n, h, q) -> slots and softmax weights (eq. 2), both (n, h, knn)."""
        heads, num_slots, _ = self.keys.shape
        slots = ops.flat_topk(query, self.keys, self.knn, backend=self.backend)
        first_row = torch.arange(heads, device=slots.device).unsqueeze(-1) * num_slots
        scores = ops.row_products(
            self.keys.flatten(0, 1), (slots + first_row).flatten(0, 1), query.flatten(0, 1), backend=self.backend
        )
        return slots, scores.view_as(slots).softmax(-1)


class ValueTable(nn.Module):
    """The values (m, v): one row per slot, read by all heads, possibly by several memories.

    Attributes:
        weight: (m, v) the table.
        log: None while `weight.grad` is a dense tensor; `pkmem.RowAdam` puts a reading log here.
    """

    def __init__(self, num_slots: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(prefer_huge_pages(torch.empty(num_slots, width)))
        self.log: ReadLog | None = None
        self.backend: str | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 1 / sqrt(v), as in the paper's public code."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Slots and weights (n, h, knn) -> sums over heads and neighbours (n, v) (eq. 3)."""
        if self.log is not None and self.log.before_read is not None:
            self.log.before_read(slots)
        return ops.weighted_sum(self.weight, slots.flatten(1), weights.flatten(1), log=self.log, backend=self.backend)

    def extra_repr(self) -> str:
        return f"num_slots={self.weight.shape[0]}, width={self.weight.shape[1]}"


class NeuronTable(ValueTable):
    """Input weights (m, d) of experts of one neuron, one per slot: v * gelu(u x) (He 2024, PEER, eq. 2)."""

    def forward(self, slots: Tensor, x: Tensor) -> Tensor:
        """Slots (n, h, knn) and hidden states (n, d) -> their inner products (n, h, knn)."""
        if self.log is not None and self.log.before_read is not None:
            self.log.before_read(slots)
        products = ops.row_products(self.weight, slots.flatten(1), x, log=self.log, backend=self.backend)
        return products.view_as(slots)


class OutputGate(nn.Module):
    """Memory+'s output: W2(m(x) * silu(W1 x)) (Berges et al. 2024)."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.bound_dim, config.value_width, bias=False)
        self.project = nn.Linear(config.value_width, config.bound_dim, bias=False)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Memory output (n, v) and hidden states (n, d) -> (n, d)."""
        return self.project(out * F.silu(self.gate(x)))


_DECODED = {  # what a kernel can stand for, if nobody has replaced a part
    (QueryNetwork, nn.Linear, norm, nn.Dropout, ProductKeys, ValueTable, nn.Dropout)
    for norm in (MaskedBatchNorm, nn.LayerNorm, nn.RMSNorm, nn.Identity)
}

_DECODED_GATES = ((), (OutputGate, nn.Linear, nn.Linear))


def memories_in(module: nn.Module) -> dict[str, ProductKeyMemory]:
    """The memories of a module by their qualified names, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ProductKeyMemory)}


def tables_in(module: nn.Module) -> list[ValueTable]:
    """The value tables of a module, a shared one once."""
    return [part for part in module.modules() if isinstance(part, ValueTable)]
