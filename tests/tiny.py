"""A language model that trains in a second, shared by the tests of what trains, saves and reads one.

PYTEST_DONT_REWRITE: the tests import it before pytest takes its fixtures.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.training.recipe import Recipe, TrainingConfig

MODEL = ModelConfig(
    num_layers=2, width=32, num_heads=2, context_tokens=32, vocab_size=300, dropout=0.1, memory_layers=[1]
)
MEMORY = MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8, query_dropout=0.1)
TRAINING = TrainingConfig(
    num_tokens=1280,  # ten updates
    batch_tokens=128,
    micro_batches=2,
    log_every_steps=4,
    eval_every_steps=5,
    checkpoint_every_steps=3,
    eval_tokens=256,
)


def tiny(data: Path, out: Path, model: Any = (), memory: Any = (), training: Any = ()) -> Recipe:
    """A recipe of ten small updates, with changes."""
    changed = replace(MODEL, **dict(model)), replace(MEMORY, **dict(memory)), replace(TRAINING, **dict(training))
    return Recipe(str(data), out, None, *changed)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of text; while it is there, tokens are cached beside it."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # as the command line does
    logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("text")
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "two",
        "dogs",
        "run",
        "far",
        "away",
        "from",
        "an",
        "old",
        "red",
        "house",
    ]
    draw = random.Random(0)
    for name in ("one.txt", "two.md"):
        lines = (" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(300))
        (folder / name).write_text("".join(lines))
    previous = os.environ.get("PKMEM_CACHE")
    os.environ["PKMEM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield folder
    os.environ.pop("PKMEM_CACHE")
    if previous is not None:
        os.environ["PKMEM_CACHE"] = previous


@pytest.fixture(scope="session")
def config(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe as a YAML file."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny(text, Path("runs/tiny")).to_dict()))
    return file


@pytest.fixture(scope="session")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the tiny recipe, trained without interruption; not to be changed."""
    from pkmem.training.run import train

    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(tiny(text, out), progress=False)
    return out


@pytest.fixture(scope="session")
def plain_gpt2(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a memory, saved the Hugging Face way with its tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
