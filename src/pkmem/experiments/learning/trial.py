"""The trial on text: Python's documentation, some of it held out, and text that has nothing to do with it."""

from __future__ import annotations

import ast
import math
import pydoc_data.topics
import random
import time
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.lm.evaluation import in_eval_mode
from pkmem.text import Split, read_documents

_OPENINGS = (  # of the text that the model writes itself
    "The town lies on a river", "My grandmother used to say", "The first thing to know about horses is",
    "In the year 1850,", "Dear Anna,", "The recipe needs two eggs and", "Scientists have long wondered why",
    "It was raining when", "The history of the bicycle", "A good teacher is someone who", "On the third day they saw",
    "The market opens at", "Winter in the mountains", "What makes a song popular?", "The old ship had been",
    "Most people sleep",
)  # fmt: skip


def documentation(split: Split, seed: int) -> list[str]:
    """Python's documentation, shuffled: the docstrings of its library, and the topics of `help()`."""
    topics: dict[str, str] = pydoc_data.topics.topics
    apart = sorted(set(topics.values()))  # some stand there under several names
    texts = [text for i, text in enumerate(apart) if (i % 10 == 0) == (split == "validation")]
    for source in read_documents("python", split):
        texts += _docstrings(source)
    random.Random(seed).shuffle(texts)
    return texts


def _docstrings(source: str) -> Iterator[str]:
    """The docstrings of a piece of source; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) > 80:
                yield text


def blocks_of(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, num_blocks: int, block_tokens: int
) -> tuple[Tensor, float]:
    """The first blocks (b, t) of texts, each closed by the end-of-text token; and their bytes per token.

    Raises:
        ValueError: there is less text than that.
    """
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= num_blocks * block_tokens:
            break
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(tokens) < num_blocks * block_tokens:
        raise ValueError(f"the text has {len(tokens):,} tokens but {num_blocks * block_tokens:,} are wanted")
    tokens = tokens[: num_blocks * block_tokens]
    num_bytes = len(tokenizer.decode(tokens, skip_special_tokens=True).encode())
    return torch.tensor(tokens).view(num_blocks, block_tokens), num_bytes / len(tokens)


def written_by(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int
) -> tuple[Tensor, float]:
    """Text that the model itself writes on everyday matters: 16 pieces (16, t), and their bytes per token."""
    torch.manual_seed(seed)
    padded = tokenizer(list(_OPENINGS), padding=True, padding_side="left", return_tensors="pt")
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
    with in_eval_mode(model):
        written = model.generate(
            **inputs, do_sample=True, min_new_tokens=num_tokens, max_new_tokens=num_tokens,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    tokens = written[:, inputs["input_ids"].shape[1] :]
    return tokens, len("".join(tokenizer.batch_decode(tokens)).encode()) / tokens.numel()


def bits_per_byte(model: nn.Module, blocks: Tensor, bytes_per_token: float) -> float:
    """Of blocks (b, t), each token but the first of a block predicted."""
    nats = 0.0
    with in_eval_mode(model):
        for pair in blocks.split(2):
            nats += _loss(model, pair).item() * len(pair) / len(blocks)
    return nats / math.log(2) / bytes_per_token


def _loss(model: nn.Module, blocks: Tensor) -> Tensor:
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())


def train_on(
    model: nn.Module, optimizer: Optimizer, blocks: Tensor, num_updates: int | None, seconds: float | None
) -> tuple[int, float]:
    """Trains on blocks (b, t) in order, two an update, from the first again at the end.

    Args:
        num_updates, seconds: how long; what ends first counts, and one of them is given.

    Returns:
        the updates made, and the seconds they took.
    """
    assert num_updates is not None or seconds is not None
    model.train()
    start, made = time.perf_counter(), 0
    while (num_updates is None or made < num_updates) and (seconds is None or time.perf_counter() - start < seconds):
        first = 2 * made % (len(blocks) - 1)
        _loss(model, blocks[first : first + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        made += 1
    return made, time.perf_counter() - start
