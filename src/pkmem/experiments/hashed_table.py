"""A table read by a hash of the last tokens, as Engram reads its own (Cheng et al. 2026): what product keys are compared with.

In a decoder it stands in the place of a memory, or beside one. It has to see the tokens, and whole texts: it keeps none
of those that a cache stands for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pkmem.layer.config import require
from pkmem.layer.memory import ProductKeyMemory
from pkmem.layer.values import ValueTable
from pkmem.lm.placement import MemoryMLP, find_blocks

Hashed = Mapping[str, str]  # blocks, counted from 0, and "instead" of their memory or "beside" it: keys as in JSON

_ORDERS = (2, 3)  # tokens that are hashed together
_HASHES = 4  # of each order
_SEED = 0


class _Tokens:
    """Those of the forward pass that a decoder is in."""

    last: Tensor

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.last = inputs[0]


class HashedTable(nn.Module):
    """The rows of the last two and three tokens, summed, and gated by the hidden state (..., d) -> (..., d).

    Equal tokens read equal rows; others share some by chance, and few share all. The gate compares hidden state and sum,
    as one number a token (Cheng et al. 2026, section 2.3). Left out of Engram: its convolution, and that it takes
    tokens of like meaning for one.

    Args:
        num_slots: rows of the table, >= 1, shared by all hashes.
        width: d.
        tokens: holds the tokens (b, t) of the pass.
    """

    multipliers: Tensor

    def __init__(self, num_slots: int, width: int, tokens: _Tokens) -> None:
        super().__init__()
        self._tokens = tokens
        self.values = ValueTable(num_slots, width)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key_norm, self.query_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        drawn = torch.randint(1 << 62, (len(_ORDERS) * _HASHES, max(_ORDERS)), generator=_generator(), device="cpu")
        used = torch.tensor([[place < order for place in range(max(_ORDERS))] for order in _ORDERS], device="cpu")
        multipliers = (drawn | 1) * used.repeat_interleave(_HASHES, 0)
        self.register_buffer("multipliers", multipliers.to(self.values.weight.device), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reads the rows of the pass's tokens; x (..., d) has as many. The mask of padding is not looked at."""
        tokens = self._tokens.last
        require(x.numel() == tokens.numel() * x.shape[-1], "x", tuple(x.shape), f"of the tokens {tuple(tokens.shape)}")
        slots = self.slots(tokens).flatten(0, 1).unsqueeze(1)
        read = self.values(slots, torch.full(slots.shape, slots.shape[-1] ** -0.5, device=slots.device))
        agreement = (self.query_norm(x.flatten(0, -2)) * self.key_norm(self.key(read))).sum(-1, keepdim=True)
        out: Tensor = torch.sigmoid(agreement / x.shape[-1] ** 0.5) * self.value(read)
        return out.view_as(x)

    @property
    def read_flops(self) -> int:
        """Operations of the sum of one token's rows."""
        return 2 * len(self.multipliers) * self.values.weight.shape[1]

    def slots(self, tokens: Tensor) -> Tensor:
        """Tokens (b, t) -> slots (b, t, hashes), each of the tokens up to its own: before the first there are zeros."""
        longest = max(_ORDERS)
        padded = F.pad(tokens + 1, (longest - 1, 0))
        ends = [padded[:, longest - 1 - back : padded.shape[1] - back] for back in range(longest)]
        mixed = (torch.stack(ends, -1).unsqueeze(-2) * self.multipliers).sum(-1)  # past 2 ** 63 it begins anew
        mixed = (mixed ^ (mixed >> 31)) * 0x2545F4914F6CDD1D
        return (mixed ^ (mixed >> 29)) % len(self.values.weight)


class Both(nn.Module):
    """A memory and a hashed table, summed."""

    def __init__(self, memory: ProductKeyMemory, table: HashedTable) -> None:
        super().__init__()
        self.memory, self.table = memory, table

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d)."""
        out: Tensor = self.memory(x, mask) + self.table(x, mask)
        return out


def put_hashed_tables(model: PreTrainedModel, hashed: Hashed) -> None:
    """Puts hashed tables in the place of a decoder's memories, or beside them, each with as many slots.

    Args:
        model: a fresh decoder with memories.
        hashed: in which blocks, and how.

    Raises:
        ValueError: a block has no memory, or is to have its table neither instead of it nor beside it.
    """
    blocks, tokens = find_blocks(model), _Tokens()
    for layer, how in hashed.items():
        require(how in ("instead", "beside"), f"hashed, layer {layer}", how, "'instead' of the memory or 'beside' it")
        place = blocks[int(layer)].mlp if layer.isdecimal() and int(layer) < len(blocks) else None
        if not isinstance(place, MemoryMLP):
            raise ValueError(f"hashed names layer {layer}, which has no memory: name it in model.memory_layers, too")
        memory = place.memory
        table = HashedTable(memory.config.num_slots, memory.config.bound_dim, tokens)
        place.memory = table if how == "instead" else Both(memory, table)  # type: ignore[assignment]
        for part in table.modules():
            part._is_hf_initialized = True  # type: ignore[assignment]
    if hashed:
        model.get_input_embeddings().register_forward_pre_hook(tokens)


def _generator() -> torch.Generator:
    """The hashes are the same in every run."""
    return torch.Generator("cpu").manual_seed(_SEED)
