"""The state of a model and its optimizer under names, which are the same on any number of devices.

    model.<parameter or buffer>            as in `model.state_dict()`, tied weights once
    optimizer.<parameter>.<moment, step>   found by the parameter's name, not by its place in a list

A tensor is plain, the same in all processes, or a DTensor, of which each process holds its shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pkmem.files.documents import CheckpointError
from pkmem.training.shards import Shards


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name; of tied ones the name that `save_pretrained` keeps."""
    repeated = _repeated_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in repeated}


def load_model(model: nn.Module, shards: Shards) -> None:
    """Puts back what `model_tensors` gave.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    tensors = model_tensors(model)
    shards.read_into({f"model.{name}": tensor for name, tensor in tensors.items()})
    model.load_state_dict(tensors, strict=False)  # where a state dict holds copies


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer by parameter name.

    Returns:
        tensors: `<parameter>.<name>` -> moments, step counts; plain or DTensors.
        others: the rest, fit for `save_state`: `groups`, each with its options and the names of its parameters, and
            `state`, what is no tensor, by the same names as the tensors.
    """
    state_dict, names = optimizer.state_dict(), _names_in(model, optimizer)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, state in state_dict["state"].items():
        for key, part in state.items():
            (tensors if isinstance(part, Tensor) else rest)[f"{names[index]}.{key}"] = part
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state_dict["param_groups"]]
    return tensors, {"groups": groups, "state": rest}


def load_optimizer(model: nn.Module, optimizer: Optimizer, shards: Shards, others: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_state` gave, whatever the order and the sharding of the parameters are now.

    Raises:
        CheckpointError: the checkpoint is of another optimizer or model.
    """
    names, own = _names_in(model, optimizer), optimizer.state_dict()["param_groups"]
    index_of = {name: index for index, name in enumerate(names)}
    saved = {frozenset(group["params"]): group for group in others["groups"]}
    groups = []
    for group in own:
        members = frozenset(names[index] for index in group["params"])
        if members not in saved:
            raise CheckpointError(f"{shards.folder} is of another optimizer: it has no group of {min(members)}")
        groups.append({**saved[members], "params": group["params"]})
    tensors = _room_for_state(model, shards, index_of)
    shards.read_into(tensors)
    state: dict[int, dict[str, Any]] = {}
    for full, part in [*tensors.items(), *((f"optimizer.{name}", part) for name, part in others["state"].items())]:
        name, key = _parameter_and_key(full)
        state.setdefault(index_of[name], {})[key] = part
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _room_for_state(model: nn.Module, shards: Shards, index_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Empty tensors for the state that a checkpoint holds: placed as their parameter where they have its shape."""
    parameters, room = model_tensors(model), {}
    for full, shape in shards.shapes.items():
        if not full.startswith("optimizer."):
            continue
        name, _ = _parameter_and_key(full)
        if name not in index_of:
            raise CheckpointError(f"{shards.folder} is of another model: it has state of {name}")
        like, dtype = parameters[name], shards.dtype(full)
        if tuple(like.shape) == shape:
            room[full] = torch.empty_like(like, dtype=dtype, requires_grad=False)
        else:
            room[full] = torch.empty(shape, dtype=dtype, device="cpu" if not shape else like.device)
    return room


def _parameter_and_key(full: str) -> tuple[str, str]:
    """`optimizer.<parameter>.<key>` taken apart."""
    name, _, key = full.removeprefix("optimizer.").rpartition(".")
    return name, key


def _names_in(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order in which torch numbers them in its state dict."""
    repeated = _repeated_names(model)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name not in repeated}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _repeated_names(model: nn.Module) -> set[str]:
    """Further names of tied parameters and buffers: those that the model declares to be ties, else all but the first."""
    model.state_dict()  # FSDP2 puts a process's shards in place of whole parameters for this
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
    return {
        name
        for tied in names.values()
        for name in tied
        if name != next((one for one in tied if one not in declared), tied[0])
    }
