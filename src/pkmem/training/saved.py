"""A trained model from where it was saved (a run, a checkpoint, any saved model directory), and what it can be asked."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

from pkmem.files.documents import CheckpointError
from pkmem.layer.config import require
from pkmem.layer.counting import count_parameters
from pkmem.lm.evaluation import evaluate
from pkmem.lm.huggingface import PkmemConfig, PkmemForCausalLM
from pkmem.lm.huggingface import context_tokens as longest_context
from pkmem.lm.inspection import describe_memories, describe_reads
from pkmem.lm.recall import measure_recall
from pkmem.lm.speed import measure_speed
from pkmem.text import Split, TokenBlocks, tokenize
from pkmem.text.synthetic import SYNTHETIC, SyntheticFacts
from pkmem.training.checkpoint import newest_valid_checkpoint, open_shards, verify_checkpoint
from pkmem.training.screening import screen_config, screen_model

_OF_A_MODEL = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # nothing that could be run


def find_saved(path: Path) -> Path:
    """The folder of a saved model as `locate_saved` finds it, after a look at whether it is whole and safe to load.

    Raises:
        CheckpointError: nothing there, or what is there is incomplete, damaged or not safe to load.
    """
    folder = locate_saved(path)
    if is_checkpoint(folder):
        verify_checkpoint(folder)
    else:
        screen_model(folder)
    return folder


def locate_saved(path: Path) -> Path:
    """The folder with a model's config.json: RUN/model, else the newest valid checkpoint of RUN, else the path itself.

    Raises:
        CheckpointError: nothing there, or a link.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give a run or a saved model directory")
    if (path / "model" / "config.json").exists():
        folder = path / "model"
    else:
        folder = newest_valid_checkpoint(path, lambda line: print(line, file=sys.stderr)) or path
    if folder != path and folder.is_symlink():
        raise CheckpointError(f"{folder}: a link; put the folder itself there, or name where it leads")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{path} holds no model (no config.json): give a run or a saved model directory")
    return folder


def find_pretrained(place: str) -> Path:
    """Where a pretrained model lies: its directory, or the copy of a model of the Hugging Face Hub.

    Args:
        place: a directory, or a name on the Hub, of which configs, tokenizer and safetensors are fetched if they are not
            here yet.

    Raises:
        ValueError: neither.
    """
    if Path(place).exists():
        return Path(place)
    try:
        return Path(snapshot_download(place, allow_patterns=_OF_A_MODEL))
    except (OSError, ValueError) as error:  # of huggingface_hub and its connections
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no model {place}: give a saved model's directory, or a name on the Hugging Face Hub ({reason})"
        ) from error


def load_saved(path: Path, values: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    Args:
        path: a run, a checkpoint, or a saved model's directory.
        values: how its value tables are kept, as `from_pretrained` of a model with memories takes it.

    Raises:
        CheckpointError: nothing there, or what is there is incomplete, damaged or not safe to load, or its tables cannot
            be kept so.
    """
    folder = find_saved(path)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    try:
        if is_checkpoint(folder):
            if values is not None:
                raise ValueError(
                    f"values is {values!r}, but this is a training checkpoint: `pkmem export {path}` first"
                )
            config, kind, tensors = _from_checkpoint(folder)
            model, info = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
        elif values is None:
            model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
        elif AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type != PkmemConfig.model_type:
            raise ValueError(f"values is {values!r}, but the model has no memories")
        else:
            model, info = PkmemForCausalLM.from_pretrained(folder, values=values, **options)
        if info["missing_keys"]:
            raise ValueError(f"weights are missing, {min(info['missing_keys'])} among them")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot load the model in {folder}: {reason}; save it again, or use another checkpoint"
        ) from error
    return model.eval(), tokenizer


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a training checkpoint in shards; those of earlier versions are model directories."""
    return (folder / "manifest.json").exists() and not (folder / "model.safetensors").exists()


def _from_checkpoint(folder: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel], dict[str, Tensor]]:
    """Config, class and whole tensors of the model in a verified checkpoint."""
    shards = open_shards(folder)
    stored = {name: shards.shapes[name] for name in shards.shapes if name.startswith("model.")}
    num_bytes = sum(math.prod(shape) * shards.dtype(name).itemsize for name, shape in stored.items())
    config, model = screen_config(folder / "config.json", len(stored), num_bytes)
    tensors = {name: torch.empty(shape, dtype=shards.dtype(name), device="cpu") for name, shape in stored.items()}
    shards.read_into(tensors)
    kind = cast(type[PreTrainedModel], type(model))
    return config, kind, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def evaluate_saved(
    path: Path,
    data: str,
    split: Split = "validation",
    max_tokens: int | None = None,
    context_tokens: int | None = None,
    speed: bool = False,
    values: str | None = None,
) -> dict[str, float]:
    """What a saved model is worth on a text: parameters, loss, use of its memories, recall of made-up facts, speed.

    Args:
        path, values: as in `load_saved`. data, split: as in `pkmem.text.read_documents`.
        max_tokens: evaluate about so many tokens; None takes all.
        context_tokens: tokens of a block, in [2, the model's longest]; None is the longest.
        speed: measure prefill and decode as well.

    Raises:
        ValueError: the model or the data cannot be read, or `context_tokens` is outside its range.
    """
    model, tokenizer = load_saved(path, values)
    longest = longest_context(model)
    context = longest if context_tokens is None else context_tokens
    require(2 <= context <= longest, "context_tokens", context, f"in [2, {longest}], the model's")
    file = tokenize(data, split, tokenizer)
    if file.num_skipped:
        print(f"skipped {file.num_skipped} files or lines that are not readable text", file=sys.stderr)
    blocks, batch = TokenBlocks(file, context), max(1, min(8, 8192 // context))
    figures: dict[str, float] = dict(count_parameters(model))
    figures |= evaluate(model, blocks, file.bytes_per_token, batch, max_tokens, progress=True)
    if data.startswith(SYNTHETIC):
        figures |= measure_recall(model, tokenizer, SyntheticFacts.named(data), progress=True)
    if speed:
        figures |= measure_speed({"model": model}, context)["model"]
    return figures


def continue_text(
    path: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    values: str | None = None,
) -> None:
    """Prints a saved model's continuation of a prompt as it is written, to the end of its context at most.

    Args:
        path, values: as in `load_saved`. prompt: empty for the end-of-text token.
        max_new_tokens: tokens to write, >= 1. seed: of the draws.
        temperature: >= 0; 0 takes the likeliest token every time. top_k: likeliest tokens to draw among, >= 1.

    Raises:
        ValueError: the model cannot be read, a number is out of range, or the prompt fills the context.
    """
    if max_new_tokens < 1 or temperature < 0 or top_k < 1:
        raise ValueError("max_new_tokens and top_k must be >= 1, temperature >= 0")
    model, tokenizer = load_saved(path, values)
    set_seed(seed)
    inputs = tokenizer(
        prompt or tokenizer.bos_token or tokenizer.eos_token, return_tensors="pt", return_token_type_ids=False
    )
    context = longest_context(model)
    room = context - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {context - room} tokens but the model's context is {context}: shorten it")
    draws = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    model.generate(
        **inputs,
        max_new_tokens=min(max_new_tokens, room),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(draws if temperature else {"do_sample": False}),
    )


def describe_saved(path: Path, data: str | None, max_tokens: int, hottest: int) -> str:
    """A look inside a saved model's memories, and at who reads what on about `max_tokens` held-out tokens of a text.

    Args:
        path: as in `load_saved`. data: as in `pkmem.text.read_documents`; None reads nothing.
        hottest: slots to show per memory, >= 0.

    Raises:
        ValueError: the model or the data cannot be read, or a number is out of range.
    """
    require(hottest >= 0, "hottest", hottest, ">= 0")
    model, tokenizer = load_saved(path)
    if data is None:
        return describe_memories(model)
    blocks = TokenBlocks(tokenize(data, "validation", tokenizer), longest_context(model))
    return f"{describe_memories(model)}\n{describe_reads(model, tokenizer, blocks, max_tokens, hottest)}"
