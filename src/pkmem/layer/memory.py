"""The memory layer, section 3 of Lample et al. 2019 from top to bottom.

x --QueryNetwork--> query --ProductKeys--> slots, weights --ValueTable--> sum of weighted values
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from pkmem.layer.config import MemoryConfig
from pkmem.layer.decoding import in_one_kernel_if_few
from pkmem.layer.drawing import tables_stay_undrawn
from pkmem.layer.gate import OutputGate
from pkmem.layer.keys import FlatKeys, ProductKeys
from pkmem.layer.padding import flat_mask, without_padding
from pkmem.layer.query import QueryNetwork
from pkmem.layer.room import num_weights, require_room
from pkmem.layer.values import NeuronTable, ValueTable


class Watcher(Protocol):
    """What sees the readings of a memory."""

    def count(self, slots: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """One reading: slots and weights (n, h, knn), and a mask (n,) of the real tokens or None."""


class ProductKeyMemory(nn.Module):
    """A product-key memory (Lample et al. 2019, section 3): (..., d) -> (..., d').

    Causal in eval mode, and in training mode with query_norm "layer", "rms" or "none". With "batch" (the
    paper's) a training batch is normalised together, so a later token touches an earlier one's query.

    Args:
        config: the memory's shape and options; `config.dim` is d, `config.output_dim` is d'.
        values: a table to share with other memories (pass `another.values`); None makes one.

    Attributes:
        query: hidden states -> queries.
        keys: queries -> slots and weights.
        values: the table.
        neurons: None, or the input weights of its experts.
        watchers: what sees every reading, such as a `MemoryUsage`. Compilers ask for it, as they do not for hooks.
        backend: None for the fastest on the device, or one of `pkmem.ops.BACKENDS`.

    Raises:
        ValueError: `config.dim` is None, the shared table has another shape, or the memory does not fit the device.

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
        size = num_weights(config, shares_values=values is not None, without_tables=tables_stay_undrawn())
        require_room(f"a memory of {config.num_slots:,} slots", size)
        self.config = config
        self.query = QueryNetwork(config)
        self.keys = ProductKeys(config) if config.keys == "product" else FlatKeys(config)
        self.values = ValueTable(*shape) if values is None else values
        self.neurons = NeuronTable(config.num_slots, config.bound_dim) if config.experts else None
        self.gate = OutputGate(config) if config.gate else None
        self.dropout = nn.Dropout(config.dropout)
        self.watchers: tuple[Watcher, ...] = ()

    @in_one_kernel_if_few
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reads the memory.

        Args:
            x: (..., d) hidden states.
            mask: (...) bool, True where a token is real. Padding reads nothing: it stays out of outputs, gradients,
                batch-norm statistics, usage and updates. None where all are.

        Returns:
            (..., d') in the dtype of x, zeros where there is padding.

        Raises:
            ValueError: x or the mask has another shape or dtype, with what is needed.
        """
        if x.dim() == 0 or x.shape[-1] != self.config.bound_dim or not x.is_floating_point():
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} but this memory reads hidden states (..., {self.config.dim}) "
                "of a floating dtype"
            )
        mask = None if mask is None else flat_mask(mask, x)
        tokens = without_padding(x.reshape(-1, x.shape[-1]), mask)
        query = self._queries(tokens, mask)
        slots, weights = self.keys(query, mask)
        for watcher in self.watchers:
            watcher.count(slots, weights, mask)
        if self.neurons is not None:
            weights = weights * F.gelu(self.neurons(slots, tokens))
        out = self.values(slots, weights).to(x.dtype)
        if self.gate is not None:
            out = self.gate(out, tokens)
        out = without_padding(self.dropout(out), mask)
        return out.reshape(*x.shape[:-1], out.shape[-1]).to(x.dtype)

    def _queries(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        try:
            return self.query(tokens, mask)
        except RuntimeError as error:
            dtypes = {weight.dtype for weight in self.query.parameters() if weight.is_floating_point()}
            if tokens.dtype in dtypes or not dtypes:
                raise
            raise ValueError(
                f"x is {tokens.dtype} but the memory's queries are {', '.join(map(str, dtypes))}: convert one of them "
                "with .to(), or use torch.autocast for halves"
            ) from error

    @property
    def backend(self) -> str | None:
        """The operators' backend; None takes the fastest for the device."""
        return self.values.backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        for part in (self.keys, self.values, self.neurons):
            if part is not None:
                part.backend = backend

    def reset_parameters(self) -> None:
        """Draws all weights anew, a shared table included."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()


def memories_in(module: nn.Module) -> dict[str, ProductKeyMemory]:
    """The memories of a module by their qualified names, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, ProductKeyMemory)}
