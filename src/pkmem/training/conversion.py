"""A saved model with its value tables in few bits, or laid out to be mapped, for inference."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch

from pkmem.files.durable import move, sync
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import Table
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.training.saved import load_saved
from pkmem.training.tables_apart import write_with_tables_apart

AS_THEY_ARE = "same"


@torch.no_grad()
def convert_saved(path: Path, out: Path, values: str) -> str:
    """Saves a model anew with its value tables in few bits and in a file of their own; all else stays, bit for bit.

    Args:
        path: as in `load_saved`.
        out: the directory to make, whole or not at all.
        values: "bf16", "int8" or "int4"; or "same", which lays the tables out anew to be mapped, and changes no bit.

    Returns:
        what was made, in two lines.

    Raises:
        ValueError: `out` is there already, the model cannot be read, it has no memories, or its tables are quantised
            already or cannot be.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists: choose another --out")
    model, tokenizer = load_saved(path)
    if not isinstance(model, PkmemForCausalLM):
        raise ValueError(f"{path} has no memories: there are no value tables to convert")
    before = _table_bytes(model)
    if values != AS_THEY_ARE:
        model.quantise_values(values)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        made.mkdir()
        write_with_tables_apart(made, model, tokenizer)
        for file in [*made.iterdir(), made]:
            sync(file)
        if out.exists():
            out.rmdir()  # empty, and Windows moves over no folder
        move(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return (
        f"values of {path} {'as they were' if values == AS_THEY_ARE else f'in {values}'}: {before / 1e6:,.1f} MB became {_table_bytes(model) / 1e6:,.1f} MB\n"
        f"saved in {out}; next: pkmem eval {out} --data FILE"
    )


def _table_bytes(model: PkmemForCausalLM) -> int:
    return sum(part.weight.nbytes for part in model.modules() if isinstance(part, Table | QuantisedValues))
