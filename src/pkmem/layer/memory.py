"""The memory layer, section 3 of Lample et al. 2019 from top to bottom.

x --QueryNetwork--> query --ProductKeys--> slots, weights --ValueTable--> sum of weighted values
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.config import MemoryConfig
from pkmem.layer.gate import OutputGate
from pkmem.layer.keys import FlatKeys, ProductKeys
from pkmem.layer.query import MaskedBatchNorm, QueryNetwork
from pkmem.layer.values import NeuronTable, ValueTable, tables_in


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


_DECODED = {  # what a kernel can stand for, if nobody has replaced a part
    (QueryNetwork, nn.Linear, norm, nn.Dropout, ProductKeys, ValueTable, nn.Dropout)
    for norm in (MaskedBatchNorm, nn.LayerNorm, nn.RMSNorm, nn.Identity)
}

_DECODED_GATES = ((), (OutputGate, nn.Linear, nn.Linear))


def memories_in(module: nn.Module) -> dict[str, ProductKeyMemory]:
    """The memories of a module by their qualified names, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ProductKeyMemory)}
