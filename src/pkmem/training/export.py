"""The Hugging Face directory of a checkpoint, however many processes wrote it, without holding a table in memory."""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.files.documents import CheckpointError, save_text
from pkmem.files.durable import move, sync
from pkmem.files.tensor_file import write_tensor_file
from pkmem.training.checkpoint import newest_valid_checkpoint, open_shards, verify_checkpoint
from pkmem.training.screening import screen_config
from pkmem.training.shards import Shards

_CHUNK_BYTES = 8 << 20
_OF_THE_RUN = ("manifest.json", "optimizer.json", "schedule.json", "journal.json", "trainer_state.json")


def save_description(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes all that `model.save_pretrained` writes but the weights, and the tokenizer."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_run(run: Path, out: Path | None = None, step: int | None = None, overwrite: bool = False) -> Path:
    """Exports a checkpoint of a run.

    Args:
        run: the run directory.
        out: where to; None is `RUN/model-step-N`.
        step: of the checkpoint; None takes the newest that is valid.
        overwrite: replace `out` if it is there.

    Returns:
        the directory.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not as it was written.
        ValueError: `out` is there already.
    """
    if step is None:
        checkpoint = newest_valid_checkpoint(run, lambda line: print(line, file=sys.stderr))
        if checkpoint is None:
            raise CheckpointError(f"{run} has no checkpoint to export: give a run directory")
    else:
        checkpoint = run / "checkpoints" / f"step-{step}"
        verify_checkpoint(checkpoint)
    out = out or run / f"model-{checkpoint.name.removesuffix('.old')}"
    export_checkpoint(checkpoint, out, overwrite)
    return out


def export_checkpoint(checkpoint: Path, out: Path, overwrite: bool = False, max_file_bytes: int = 50 * 10**9) -> None:
    """Writes what `save_pretrained` would have written, weights bit for bit, streamed from the checkpoint's shards.

    Args:
        checkpoint: the folder `step-N`, verified.
        out: the directory to make, whole or not at all.
        overwrite: replace it if it is there.
        max_file_bytes: weights beyond these go to several files with an index, as in `save_pretrained`.

    Raises:
        CheckpointError: the checkpoint's tensors are not whole.
        ValueError: `out` is there already.
    """
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists: choose another --out, or --overwrite it")
    shards = open_shards(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = (out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("tmp", "old"))
    try:
        tmp.mkdir()
        for file in checkpoint.iterdir():
            if file.is_file() and file.name not in _OF_THE_RUN and not file.name.startswith(("shard-", "random-")):
                shutil.copyfile(file, tmp / file.name)
        _write_weights(shards, tmp, max_file_bytes)
        for file in [*tmp.iterdir(), tmp]:
            sync(file)
        if out.exists():
            move(out, old)
        move(tmp, out)
        sync(out.parent)
    finally:
        for left in (tmp, old):
            shutil.rmtree(left, ignore_errors=True)


def _write_weights(shards: Shards, folder: Path, max_file_bytes: int) -> None:
    names = [name.removeprefix("model.") for name in shards.shapes if name.startswith("model.")]
    layout = {name: (shards.dtype(f"model.{name}"), shards.shapes[f"model.{name}"]) for name in names}
    weightless = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    split = split_torch_state_dict_into_shards(
        weightless, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file_bytes
    )
    for file, members in split.filename_to_tensors.items():
        part = {name: layout[name] for name in members}
        write_tensor_file(
            folder / file, part, lambda name: shards.rows(f"model.{name}", _CHUNK_BYTES), {"format": "pt"}
        )
    if split.is_sharded:
        num_bytes = sum(tensor.nbytes for tensor in weightless.values())
        _, model = screen_config(folder / "config.json", len(names), num_bytes)  # which of them are parameters
        counted = sum(parameter.numel() for parameter in model.parameters())
        index = {"metadata": {"total_parameters": counted, **split.metadata}, "weight_map": split.tensor_to_filename}
        save_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
