"""Nested state as safetensors and JSON, bit for bit, without pickle; and the random generators' state."""

import hashlib
import json
import math
import random
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pkmem.text.durable import sync
from pkmem.training.files import CheckpointError, load_json, save_json


def save_state(path: Path, state: Any) -> None:
    """Writes a nested state, such as `optimizer.state_dict()`, to `path.safetensors` and `path.json`.

    In the JSON every object has one key, the name of a type: `{"tensor": "0"}`, `{"tuple": [...]}`,
    `{"dict": [[key, value], ...]}`, `{"float": "7ff0000000000000"}` (not finite); the rest stands for itself.
    Contiguous CPU tensors are written from where they are; others, and those that share memory, are copied.

    Args:
        path: both files without their endings.
        state: dict or OrderedDict (keys str or int), list, tuple, dense tensor, str, int, float, bool, None.

    Raises:
        CheckpointError: something else is in `state` (the message says where), or safetensors fails to write.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def put(tensor: Tensor) -> str:
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        key = str(len(tensors))
        tensors[key] = tensor
        return key

    structure, file = _encode(state, "state", put), _beside(path, ".safetensors")
    try:
        save_file(tensors, file, metadata={"structure": _fingerprint(structure)})
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype it does not know
        raise CheckpointError(f"{file}: not written, safetensors says: {error}") from error
    sync(file)
    save_json(_beside(path, ".json"), structure)


def load_state(path: Path) -> Any:
    """Reads what `save_state` wrote.

    Args:
        path: both files without their endings.

    Returns:
        the same nested state, types and bits equal; its tensors are on the CPU, contiguous, sharing no memory
        and independent of the file, and parameters have become plain tensors.

    Raises:
        CheckpointError: a file is missing or broken, or the two are not of the same save.
    """
    structure, file = load_json(_beside(path, ".json")), _beside(path, ".safetensors")
    try:
        with safe_open(file, framework="pt") as tensors:
            if (tensors.metadata() or {}).get("structure") != _fingerprint(structure):
                raise ValueError("it belongs to another save than the .json beside it")
            # The clone lets go of the mapped file: its disk space is freed when the checkpoint is pruned.
            return _decode(structure, lambda key: tensors.get_tensor(key).clone())
    except (SafetensorError, OSError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"{file}: no saved state ({error}); resume from another checkpoint") from error


def _encode(state: Any, where: str, put: Callable[[Tensor], str]) -> Any:
    """The JSON form of `state`; `put` stores a tensor and names its key."""
    kind = type(state)
    if state is None or kind in (bool, int, str):
        return state
    if kind is float:
        return state if math.isfinite(state) else {"float": struct.pack(">d", state).hex()}
    if kind in (list, tuple):
        items = [_encode(item, f"{where}[{i}]", put) for i, item in enumerate(state)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict) and all(type(key) in (str, int) for key in state):
        return {kind.__name__: [[key, _encode(v, f"{where}[{key!r}]", put)] for key, v in state.items()]}
    if kind in (Tensor, torch.nn.Parameter) and state.layout == torch.strided and not state.is_meta:
        return {"tensor": put(state)}
    allowed = "dense tensors, dicts with str or int keys, lists, tuples, numbers, strings, bools, None"
    raise CheckpointError(f"{where}: cannot save this {kind.__name__}; use {allowed}")


def _decode(node: Any, get: Callable[[str], Tensor]) -> Any:
    """The inverse of `_encode`; `get` fetches the tensor of a key."""
    match node:
        case {"tensor": str(key)}:
            return get(key)
        case {"float": str(bits)}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"tuple": list(items)}:
            return tuple(_decode(item, get) for item in items)
        case {"dict": list(pairs)}:
            return {key: _decode(value, get) for key, value in pairs}
        case {"OrderedDict": list(pairs)}:
            return OrderedDict((key, _decode(value, get)) for key, value in pairs)
        case list(items):
            return [_decode(item, get) for item in items]
        case dict():
            raise ValueError(f"unknown type in {node}")
    return node


def _fingerprint(structure: Any) -> str:
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def rng_state() -> dict[str, Any]:
    """The state of every global generator a training step may draw from, in a form `save_state` takes.

    Returns:
        `torch`: the CPU generator; `cuda`: that of the current device, if CUDA is available; `python`: module
        random; `numpy`: its global generator, if numpy is imported.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, torch.tensor(words), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if numpy := sys.modules.get("numpy"):
        name, words, *rest = numpy.random.get_state()
        state["numpy"] = [str(name), torch.tensor(words.tolist()), *rest]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where `rng_state` found them.

    Args:
        state: from `rng_state`; parts for CUDA or numpy are skipped where this process has no CUDA or no numpy.
    """
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        name, words, *rest = state["numpy"]
        numpy.random.set_state((name, words.tolist(), *rest))
