"""What a model makes of prompts and completions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pkmem.editing.questions import NO_LABEL, Question, answer_logits, answer_losses, batches

Pair = tuple[str, str]


def as_questions(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Question]:
    """Prompts and their completions, joined as they stand, as tokens."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
    return [Question(*both) for both in zip(prompts, completions, strict=True)]


def recalled(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[bool]:
    """Of each pair, whether the model in eval mode writes the completion after the prompt."""
    asked = as_questions(tokenizer, pairs)
    return [hit for batch in batches(asked) for hit in answer_losses(model, batch)[1].tolist()]


def next_token(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities of the token after each prompt, (n, vocabulary)."""
    asked = [question._replace(answer=[0]) for question in as_questions(tokenizer, [(text, "") for text in prompts])]
    return torch.cat([
        logits[labels != NO_LABEL].log_softmax(-1)
        for logits, labels in (answer_logits(model, batch) for batch in batches(asked))
    ])  # fmt: skip


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """KL of the base's distributions from the changed ones', in nats: (..., vocabulary) log-probabilities -> (...)."""
    return (base.exp() * (base - changed)).sum(-1)


def log_likelihoods(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Tensor:
    """Log-probability of each completion after its prompt, (n,)."""
    asked = as_questions(tokenizer, pairs)
    lengths = torch.tensor([len(question.answer) for question in asked])
    return -torch.cat([answer_losses(model, batch)[0] for batch in batches(asked)]) * lengths


def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_tokens: int) -> list[str]:
    """What the model writes after each prompt, token by token the likeliest."""
    padded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    given = {name: padded[name] for name in ("input_ids", "attention_mask")}
    written = model.generate(  # type: ignore[operator]
        **given, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    texts: list[str] = tokenizer.batch_decode(written[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
