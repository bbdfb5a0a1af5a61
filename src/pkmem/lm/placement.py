"""Where memories go in a decoder, for every Hugging Face family alike.

The blocks are the model's one `nn.ModuleList` with `num_hidden_layers` entries that each have an MLP. In a block, the
attribute `mlp_name` ("mlp" in GPT-2, Llama, Qwen, Mistral, Gemma and GPT-NeoX) is replaced by the memory, or the memory
is added beside it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pkmem.layer.config import MemoryConfig, is_integer
from pkmem.layer.drawing import tables_stay_undrawn
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.room import num_weights, require_room
from pkmem.layer.values import Table
from pkmem.lm.padding import mask_of_pass

Placement = Literal["replace", "parallel"]


class MemoryMLP(nn.Module):
    """Stands where a block had its MLP: the memory alone, or the MLP's output plus the memory's."""

    def __init__(self, memory: ProductKeyMemory, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.memory = memory
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(..., d) -> (..., d), and beside an MLP that returns more, such as router scores, those too."""
        mask = mask_of_pass()
        if mask is not None:
            mask = mask.to(hidden_states.device)  # another one's, where a model is spread over several
            mask = mask.flatten() if hidden_states.dim() == 2 else mask
        out: Tensor = self.memory(hidden_states, mask)
        if self.mlp is None:
            return out
        mlps = self.mlp(hidden_states, *args, **kwargs)
        return (out + mlps[0], *mlps[1:]) if isinstance(mlps, tuple) else out + mlps


def find_blocks(model: PreTrainedModel, mlp_name: str = "mlp") -> nn.ModuleList:
    """The decoder's blocks: its one list of `num_hidden_layers` modules that each have an MLP.

    Raises:
        ValueError: there is none; the message names what the blocks do have.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_layers]
    for blocks in lists:
        if all(isinstance(getattr(block, mlp_name, None), nn.Module) for block in blocks):
            return blocks
    children = [name for name, _ in lists[0][0].named_children()] if lists and num_layers else []
    raise ValueError(
        f"{type(model).__name__} has no block with an MLP called {mlp_name!r}"
        + (f": its blocks have {', '.join(children)}; name the MLP with mlp_name=..." if children else "")
    )


def insert_memories(
    model: PreTrainedModel,
    layers: list[int],
    config: MemoryConfig,
    placement: str,
    *,
    share_values: bool,
    mlp_name: str,
) -> list[str]:
    """Puts memories into a decoder, see `pkmem.add_memory`; returns their names.

    Raises:
        ValueError: something does not fit; the decoder is as it was.
    """
    if placement not in ("replace", "parallel"):
        raise ValueError(f"placement is {placement!r} but must be 'replace' or 'parallel'")
    blocks = find_blocks(model, mlp_name)
    layers = _checked_layers(layers, len(blocks))
    if config.output_dim != config.bound_dim:
        raise ValueError(
            f"value_dim is {config.value_dim} but the block needs the model's width "
            f"{config.bound_dim}: leave value_dim out, or set gate=True"
        )
    mlps = [getattr(blocks[layer], mlp_name) for layer in layers]
    if placement == "replace":
        for mlp in mlps:
            _require_replaceable(mlp)
    homes = [_home_beside(mlp, model) for mlp in mlps]
    _require_room_for_memories(homes, config, share_values)
    shared = None
    for layer, mlp, home in zip(layers, mlps, homes, strict=True):
        memory = ProductKeyMemory(config, values=shared)
        _move(memory, *home)
        if share_values:
            shared = memory.values
        for module in memory.modules():  # drawn already: not to be drawn again by the decoder's own rule
            module._is_hf_initialized = True  # type: ignore[assignment]
        made = MemoryMLP(memory, mlp if placement == "parallel" else None)
        setattr(blocks[layer], mlp_name, made.train(model.training))
    return list(memories_in(model))


def _home_beside(mlp: nn.Module, model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of a memory: the MLP's, or where that is quantised the dtype that the model computes in."""
    like = next(mlp.parameters())
    return like.device, like.dtype if like.is_floating_point() else model.dtype


def _move(memory: ProductKeyMemory, device: torch.device, dtype: torch.dtype) -> None:
    """Moves all but a table without numbers, which has its device from `shard_values`."""
    for part in memory.children():
        is_undrawn = isinstance(part, Table) and part.weight.is_meta
        part.to(None if is_undrawn else device, dtype)


def _require_room_for_memories(
    homes: list[tuple[torch.device, torch.dtype]], memory: MemoryConfig, share_values: bool
) -> None:
    """Refuses memories that do not fit together, before a block is edited."""
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for place, home in enumerate(homes):
        shares = share_values and place > 0
        sizes[home] += num_weights(memory, shares_values=shares, without_tables=tables_stay_undrawn())
    for (device, dtype), size in sizes.items():
        require_room(f"{len(homes)} memories of {memory.num_slots:,} slots", size, device, dtype)


def _require_replaceable(mlp: nn.Module) -> None:
    """Refuses an MLP that takes or returns more than hidden states.

    BLOOM's is handed the residual, which the block would lose; GPT-OSS's returns router scores, and the block would
    take a memory's output apart, silently in a batch of two.
    """
    inputs = [p.name for p in inspect.signature(mlp.forward).parameters.values() if p.default is p.empty]
    if len(inputs) > 1:
        raise ValueError(
            f"{type(mlp).__name__} takes {', '.join(inputs)}, a memory hidden states alone: use placement='parallel'"
        )
    outputs = _tuple_returned(type(mlp))
    if outputs:
        raise ValueError(
            f"{type(mlp).__name__} ends with `{outputs}`, a memory returns hidden states alone: use placement='parallel'"
        )


def _tuple_returned(kind: type[nn.Module]) -> str | None:
    """The statement by which a module's forward returns several values; None where there is none, or no source."""
    try:
        source = textwrap.dedent(inspect.getsource(kind.forward))
    except OSError:  # typed into an interpreter, or installed without source
        return None
    returns = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return))
    return next((ast.unparse(node) for node in returns if isinstance(node.value, ast.Tuple)), None)


def _checked_layers(layers: list[int], num_layers: int) -> list[int]:
    for layer in layers:
        if not (is_integer(layer, 0) and layer < num_layers):
            raise ValueError(f"layer {layer!r} is outside [0, {num_layers}): layers are integers counted from 0")
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"layer {twice[0]} is named twice in layers={layers}")
    if not layers:
        raise ValueError("layers is empty: name at least one block, counted from 0")
    return sorted(layers)
