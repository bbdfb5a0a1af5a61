"""Prompts and completions as batches, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

NO_TARGET = -100
BATCH_PROMPTS = 24

Pair = tuple[str, str]


class Batch(NamedTuple):
    """Prompts with their completions, on the right of a batch.

    Args:
        tokens: (n, t) both, padded on the left.
        mask: (n, t) 1 where a token is real.
        targets: (n, k) the completions' tokens, k of the longest; `NO_TARGET` on the left of shorter ones.
    """

    tokens: Tensor
    mask: Tensor
    targets: Tensor


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Pair]) -> Batch:
    """The batch of pairs of a prompt and a completion, joined as they stand."""
    pairs = list(pairs)
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    filler = tokenizer.eos_token_id or 0
    return Batch(
        _on_the_right(whole, filler),
        _on_the_right([[1] * len(tokens) for tokens in whole], 0),
        _on_the_right(completions, NO_TARGET),
    )


def _on_the_right(rows: Sequence[list[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[filler] * (width - len(row)) + row for row in rows])


def batches(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], size: int = BATCH_PROMPTS) -> Iterator[Batch]:
    """All pairs in order, so many at a time."""
    return (encode(tokenizer, pairs[first : first + size]) for first in range(0, len(pairs), size))


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """What predicts the completions' tokens, (n, k, vocabulary) fp32."""
    positions = (batch.mask.cumsum(1) - 1).clamp_min(0)
    kept = batch.targets.shape[1] + 1
    out = model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=kept,
    )
    return out.logits[:, -kept:-1].float()


def losses_of(logits: Tensor, batch: Batch) -> Tensor:
    """Nats per token of each completion, (n,)."""
    nats = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=NO_TARGET)
    return nats.sum(1) / (batch.targets != NO_TARGET).sum(1)


def is_recalled(logits: Tensor, batch: Batch) -> Tensor:
    """Whether greedy decoding writes each completion, (n,) bool."""
    return ((logits.argmax(-1) == batch.targets) | (batch.targets == NO_TARGET)).all(1)


def recalled(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[bool]:
    """Of each pair, whether the model in eval mode writes the completion after the prompt."""
    return [hit for batch in batches(tokenizer, pairs) for hit in is_recalled(logits_of(model, batch), batch).tolist()]


def next_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities of the token after each prompt, (n, vocabulary)."""
    parts = []
    for batch in batches(tokenizer, [(prompt, " x") for prompt in prompts]):
        first = (batch.targets == NO_TARGET).sum(1)
        parts.append(logits_of(model, batch)[torch.arange(len(first)), first].log_softmax(-1))
    return torch.cat(parts)


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """KL of the base's distributions from the changed ones', in nats: (..., vocabulary) log-probabilities -> (...)."""
    return (base.exp() * (base - changed)).sum(-1)


def log_likelihoods(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Tensor:
    """Log-probability of each completion after its prompt, (n,)."""
    return torch.cat([
        -losses_of(logits_of(model, batch), batch) * (batch.targets != NO_TARGET).sum(1)
        for batch in batches(tokenizer, pairs)
    ])  # fmt: skip


def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_tokens: int) -> list[str]:
    """What the model writes after each prompt, token by token the likeliest."""
    texts = []
    for batch in batches(tokenizer, [(prompt, "") for prompt in prompts]):
        written = model.generate(  # type: ignore[operator]
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts += tokenizer.batch_decode(written[:, batch.tokens.shape[1] :], skip_special_tokens=True)
    return texts
