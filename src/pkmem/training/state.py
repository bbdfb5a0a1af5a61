"""Nested state as JSON, bit for bit, without pickle; and the random generators' state."""

import json
import math
import random
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkmem.files.documents import CheckpointError, load_json, save_text


def save_state(path: Path, state: Any) -> None:
    """Writes a small nested state, such as `scheduler.state_dict()` or `rng_state()`, as JSON.

    In it every object has one key, the name of a type: `{"tensor": ["float32", [2], "0000803f00000040"]}`,
    `{"tuple": [...]}`, `{"dict": [[key, value], ...]}`, `{"float": "7ff0000000000000"}` (not finite); the rest stands
    for itself. Large tensors belong into `save_checkpoint`.

    Args:
        path: the file; its folder exists.
        state: dict or OrderedDict (keys str or int), list, tuple, dense tensor, str, int, float, bool, None.

    Raises:
        CheckpointError: something else is in `state` (the message says where).
    """
    save_text(path, json.dumps(_encode(state, "state")) + "\n")


def load_state(path: Path) -> Any:
    """Reads what `save_state` wrote.

    Args:
        path: the file.

    Returns:
        the same nested state, types and bits equal; its tensors are on the CPU, contiguous and share no memory, and
        parameters have become plain tensors.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    document = load_json(path)
    try:
        return _decode(document)
    except (ValueError, TypeError, RuntimeError, struct.error) as error:
        raise CheckpointError(f"{path}: no saved state ({error}); resume from another checkpoint") from error


def _encode(state: Any, where: str) -> Any:
    """The JSON form of `state`."""
    kind = type(state)
    if state is None or kind in (bool, int, str):
        return state
    if kind is float:
        return state if math.isfinite(state) else {"float": struct.pack(">d", state).hex()}
    if kind in (list, tuple):
        items = [_encode(item, f"{where}[{i}]") for i, item in enumerate(state)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict) and all(type(key) in (str, int) for key in state):
        return {kind.__name__: [[key, _encode(v, f"{where}[{key!r}]")] for key, v in state.items()]}
    if kind in (Tensor, torch.nn.Parameter) and state.layout == torch.strided and not state.is_meta:
        plain = state.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        bits = plain.flatten().view(torch.uint8).numpy().tobytes().hex()
        return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape), bits]}
    allowed = "dense tensors, dicts with str or int keys, lists, tuples, numbers, strings, bools, None"
    raise CheckpointError(f"{where}: cannot save this {kind.__name__}; use {allowed}")


def _decode(node: Any) -> Any:
    """The inverse of `_encode`."""
    match node:
        case {"tensor": [str(dtype), list(shape), str(bits)]} if isinstance(getattr(torch, dtype, None), torch.dtype):
            plain = torch.tensor(list(bytes.fromhex(bits)), dtype=torch.uint8, device="cpu")
            return plain.view(getattr(torch, dtype)).reshape(shape)
        case {"float": str(bits)}:
            return struct.unpack(">d", bytes.fromhex(bits))[0]
        case {"tuple": list(items)}:
            return tuple(_decode(item) for item in items)
        case {"dict": list(pairs)}:
            return {key: _decode(value) for key, value in pairs}
        case {"OrderedDict": list(pairs)}:
            return OrderedDict((key, _decode(value)) for key, value in pairs)
        case list(items):
            return [_decode(item) for item in items]
        case dict():
            raise ValueError(f"unknown type in {str(node)[:100]}")
    return node


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
