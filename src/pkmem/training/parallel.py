"""How several processes share a model: the columns of its tables, and all else by copies (DDP) or in parts (FSDP2)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from pkmem.layer.config import require
from pkmem.layer.values import tables_in
from pkmem.training.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shared_columns(recipe: Recipe, num_processes: int, of_host: int) -> int:
    """How many processes share the columns of each table; 1 where each has all of them.

    Args:
        recipe: the run.
        num_processes: that train it together.
        of_host: of them, those on one host.

    Raises:
        ValueError: the processes cannot share the columns so.
    """
    config, memory = recipe.training, recipe.memory.bound_to(recipe.model.width)
    if num_processes > 1 and (recipe.model.pretrained is not None or config.train != "all"):
        what = "model.pretrained" if recipe.model.pretrained is not None else f"training.train={config.train}"
        raise ValueError(f"{what} is for one process and there are {num_processes}: start it without torchrun")
    if num_processes == 1 or not recipe.model.memory_layers:
        return 1
    if config.value_grad == "dense":
        require(config.columns in (None, 1), "training.columns", config.columns, "1 with training.value_grad=dense")
        require(config.parallel == "ddp", "training.parallel", config.parallel, "ddp with training.value_grad=dense")
        return 1
    width = math.gcd(memory.value_width, memory.bound_dim if memory.experts else 0)  # of all tables
    columns = math.gcd(width, of_host) if config.columns is None else config.columns
    if width % columns or num_processes % columns:
        shared = math.gcd(width, num_processes)
        raise ValueError(
            f"training.columns is {columns} but must divide the tables' width {width} and the {num_processes} processes: "
            f"try {shared}"
        )
    return columns


def table_mesh(recipe: Recipe, num_processes: int, device: torch.device) -> DeviceMesh | None:
    """The processes by groups that share the columns of a table, as the recipe says; None where nothing is shared.

    Args:
        recipe: the run.
        num_processes: that train it together.
        device: of this one.

    Raises:
        ValueError: the processes cannot share the columns so.
    """
    columns = shared_columns(recipe, num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)))
    if num_processes == 1 or not recipe.model.memory_layers or recipe.training.value_grad == "dense":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    shape = (num_processes // columns, columns)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "columns"))


def split_dense_part(model: PreTrainedModel) -> None:
    """Splits all but the tables among the processes (FSDP2): a block's weights are whole while it computes."""
    from torch.distributed.fsdp import fully_shard

    tables = {table.weight for table in tables_in(model)}
    for block in blocks_of(model):
        fully_shard(block, ignored_params=tables)
    fully_shard(model, ignored_params=tables)


def blocks_of(model: PreTrainedModel) -> Iterable[nn.Module]:
    """The blocks of a decoder, in order; none where they are in no list."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == num_layers)
    return next(lists, nn.ModuleList())
