"""What is looked at before a model directory, perhaps a stranger's, is loaded: nothing in it runs or leads elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pkmem.files.documents import CheckpointError, load_json
from pkmem.files.tensor_file import Stored, TensorFile

_INDEX = "model.safetensors.index.json"
_WEIGHTS_OF_A_BYTE = 8  # at most, however they are quantised


def screen_model(folder: Path) -> nn.Module:
    """Refuses a Hugging Face directory that should not be loaded, before any of it is.

    Args:
        folder: with a config.json.

    Returns:
        the model without numbers.

    Raises:
        CheckpointError: no safetensors, a file that is none, a link out of the directory, a name in it that leads out,
            an adapter of another model, a config of far more weights than there are, or a tensor of another shape or
            kind of numbers than the config asks for.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not _is_blob_of_hub(path):
            raise CheckpointError(f"{path}: a link; put the file itself there")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: an adapter, whose model is elsewhere: merge the two and save that"
        )
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not files:
        fix = "convert it to safetensors where you trust it (`model.save_pretrained`)"
        raise CheckpointError(f"{folder} has no safetensors: a pickle can run any code when loaded; {fix}")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", _INDEX):
        if (folder / name).exists():
            _screen_document(folder / name)
    tensors = {path: TensorFile(path).stored for path in files}
    num_bytes = sum(stored.stop - stored.start for file in tensors.values() for stored in file.values())
    config, model = screen_config(folder / "config.json", sum(map(len, tensors.values())), num_bytes)
    if getattr(config.get_text_config(), "quantization_config", None) is None:  # or they are not what the model has
        for path, stored in tensors.items():
            _screen_tensors(path, stored, model)
    return model


def screen_config(file: Path, num_tensors: int, num_bytes: int) -> tuple[PreTrainedConfig, nn.Module]:
    """Refuses a config that does not go with the tensors beside it, before a weight is made.

    Args:
        file: a config.json.
        num_tensors: there are.
        num_bytes: in them.

    Returns:
        the config, and the model of it without numbers.

    Raises:
        CheckpointError: the config is none, or asks for more layers or weights than there can be.
    """
    document = _screen_document(file)
    _screen_counts(document, file, num_tensors)
    try:
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of transformers or of a config's own check, each raises its own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file}: cannot load the model: {reason}; save it again") from error
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if num_weights > _WEIGHTS_OF_A_BYTE * num_bytes:
        raise CheckpointError(
            f"{file} asks for {num_weights:,} weights but {num_bytes:,} bytes are there: save it again"
        )
    return config, model


def _screen_counts(document: Any, file: Path, num_tensors: int) -> None:
    """Refuses more blocks than tensors, at any depth of a config: the model without numbers is made of them."""
    for name, entry in document.items() if isinstance(document, dict) else []:
        if isinstance(entry, dict):
            _screen_counts(entry, file, num_tensors)
        is_count = isinstance(entry, int) and not isinstance(entry, bool) and ("layer" in name or "expert" in name)
        if is_count and entry > max(num_tensors, 1024):
            raise CheckpointError(f"{file}: {name} is {entry:,} but there are {num_tensors:,} tensors: save it again")


def _screen_tensors(path: Path, tensors: Mapping[str, Stored], model: nn.Module) -> None:
    """Refuses tensors of a file that are not what the model has under their names; others are left to who loads them."""
    wanted = model.state_dict()
    for name, stored in tensors.items():
        asked = wanted.get(name)
        if asked is None:
            continue
        alike = stored.dtype.is_floating_point == asked.dtype.is_floating_point
        if stored.shape != tuple(asked.shape) or not alike:
            raise CheckpointError(
                f"{path}: {name} is {stored.shape} {stored.dtype} but the config asks for {tuple(asked.shape)} "
                f"{asked.dtype}: save the model again"
            )


def _screen_document(file: Path) -> Any:
    """The JSON of a config, if all numbers in it are numbers and all files that it names are in its directory."""
    document = load_json(file.resolve() if _is_blob_of_hub(file) else file)
    try:
        json.dumps(document, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a config ({error}); save it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: no object; save it again")
    named = document.get("weight_map", {}) if file.name == _INDEX else {}
    if not isinstance(named, dict):
        raise CheckpointError(f"{file}: no map of weights to files; save it again")
    others = [document.get("transformers_weights"), *(document.get("fast_tokenizer_files") or [])]
    for name in {*map(str, named.values()), *(str(other) for other in others if other is not None)}:
        if PurePosixPath(name).name != name or "\\" in name or not (file.parent / name).is_file():
            raise CheckpointError(f"{file}: {name[:100]!r} is no file of this directory; save it again")
    return document


def _is_blob_of_hub(path: Path) -> bool:
    """Whether this is a link of the Hugging Face cache, from models--X/snapshots/Y/ into models--X/blobs/."""
    target, places = path.resolve(), path.absolute().parents
    snapshots = next((place for place in places if place.name == "snapshots"), None)
    return snapshots is not None and target.parent == snapshots.resolve().parent / "blobs"
