"""Which model this is: a hash of all that edits leave alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pkmem.files.tensor_file import name_of
from pkmem.layer.memory import memories_in
from pkmem.layer.values import tables_in

_IN_TRAINING = ("query_dropout", "dropout")  # settings of a memory that change nothing of how it answers
_MOST_SAMPLES = 256  # of a tensor: each may cost a page of the file that holds it


def fingerprint(model: nn.Module) -> str:
    """Which model this is, whatever edits are in.

    Args:
        model: on any device.

    Returns:
        16 hex digits of a hash over how the memories read, over names, shapes and dtypes of all weights and saved
        buffers, and over up to 256 numbers of each but the tables, evenly spaced.
    """
    return fingerprint_of(saved_tensors(model), model)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that a saved model holds, by name; of a tensor with several names, under the first."""
    named = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor.detach() for name, tensor in named.items() if first[id(tensor)] == name}


def table_names(model: nn.Module) -> list[str]:
    """The names of the tables' weights, a shared one's first."""
    weights = {id(table.weight) for table in tables_in(model)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def fingerprint_of(tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    """The fingerprint of a model that has these tensors instead of its own, which may be on no device."""
    digest, tables = hashlib.sha256(), table_names(model)
    for name, memory in memories_in(model).items():
        settings = {key: setting for key, setting in memory.config.to_dict().items() if key not in _IN_TRAINING}
        digest.update(f"{name} {sorted(settings.items())}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {name_of(tensor.dtype)} {list(tensor.shape)}\n".encode())
        if name not in tables:
            digest.update(_samples(tensor))
    return digest.hexdigest()[:16]


def _samples(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    count = min(len(flat), _MOST_SAMPLES)
    places = torch.arange(count, device=flat.device) * len(flat) // max(1, count)
    return flat[places].cpu().view(torch.uint8).numpy().tobytes()
