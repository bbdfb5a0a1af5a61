"""A saved model whose tables have a file of their own: to be replaced alone, or read row by row where it lies."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.files.documents import save_text
from pkmem.files.tensor_file import write_tensor_file
from pkmem.lm.stored import INDEX, stored_tables
from pkmem.training.export import save_description
from pkmem.training.named_state import model_tensors

TABLES = "model-tables.safetensors"
_OTHERS = "model-others.safetensors"


def write_with_tables_apart(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what `from_pretrained` loads as it loads what `save_pretrained` writes; the tables begin on a page.

    So a row whose bytes divide a page lies in one page of a mapped file.

    Args:
        folder: one that exists.
        model: with memories, whole on this process.
        tokenizer: its tokenizer.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    save_description(folder, model, tokenizer)
    tensors = model_tensors(model)
    tables = {f"{name}.weight" for name in stored_tables(model)}
    file_of = {name: TABLES if name in tables else _OTHERS for name in sorted(tensors)}
    for file in (TABLES, _OTHERS):
        layout = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in tensors if file_of[name] == file}
        write_tensor_file(
            folder / file, layout, lambda name: iter([tensors[name]]), {"format": "pt"}, begins_at=mmap.PAGESIZE
        )
    metadata = {
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    save_text(folder / INDEX, json.dumps({"metadata": metadata, "weight_map": file_of}, indent=2) + "\n")
