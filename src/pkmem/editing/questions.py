"""Facts as tokens: what a model is asked, what it shall answer, and whether it does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.lm.huggingface import context_tokens
from pkmem.text.facts import Fact

BATCH_QUESTIONS = 32
NO_LABEL = -100  # of a token that does not count


class Question(NamedTuple):
    """One phrasing of a fact, as tokens.

    Args:
        prompt: what is given.
        answer: what shall follow.
    """

    prompt: list[int]
    answer: list[int]


def questions_of(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[Question]:
    """A question for each phrasing of each fact.

    Raises:
        ValueError: there are no facts, or one is longer than the model's context.
    """
    if not facts:
        raise ValueError("there are no facts: give at least one")
    made = as_questions(facts, tokenizer)
    of_facts = [place for place, fact in enumerate(facts) for _ in fact.prompts]
    longest = context_tokens(model)
    for place, question in zip(of_facts, made, strict=True):
        length = len(question.prompt) + len(question.answer)
        if length > longest:
            raise ValueError(
                f"fact {place + 1}, {facts[place].prompts[0][:40]!r}..., takes {length} tokens but the model's context is "
                f"{longest}: shorten it"
            )
    return made


def as_questions(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """A question for each phrasing of each fact, however long."""
    asked = [(prompt, place) for place, fact in enumerate(facts) for prompt in fact.prompts]
    # A space before the answer is the answer's, as in running text, where tokens begin with one.
    prompts = tokenizer([prompt.rstrip(" ") for prompt, _ in asked])["input_ids"]
    spaced = [f" {fact.answer}" if fact.prompts[0].endswith(" ") else fact.answer for fact in facts]
    answers = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    return [Question(prompt, answers[place]) for (_, place), prompt in zip(asked, prompts, strict=True)]


def answer_logits(model: nn.Module, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """What a model expects where the answers stand.

    Args:
        model: a causal language model.
        questions: n of them, in one batch.

    Returns:
        logits: (n, k, vocabulary) fp32, differentiable; what predicts each label.
        labels: (n, k) the answers' tokens where they stand, and `NO_LABEL` elsewhere.
    """
    device = next(model.parameters()).device
    length = max(len(question.prompt) + len(question.answer) for question in questions)
    first = min(len(question.prompt) for question in questions) - 1
    tokens = torch.zeros(len(questions), length, dtype=torch.int64)
    labels = torch.full_like(tokens, NO_LABEL)
    mask = torch.zeros_like(tokens)
    for row, (prompt, answer) in enumerate(questions):
        start, stop = len(prompt), len(prompt) + len(answer)
        tokens[row, :stop] = torch.tensor(prompt + answer)
        labels[row, start:stop] = tokens[row, start:stop]
        mask[row, :stop] = 1
    # Where a decoder can leave out logits, it computes those that predict answers: they are the largest product.
    places = torch.arange(first, length - 1, device=device)
    options = forward_options(model, places)
    logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False, **options).logits
    return (logits if options else logits[:, places]).float(), labels[:, first + 1 :].to(device)


def answer_losses(model: nn.Module, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """How surprised a model is by the answers, and whether it would give them.

    Args:
        model: a causal language model.
        questions: n of them, in one batch.

    Returns:
        losses: (n,) nats per token of each answer, differentiable.
        is_right: (n,) bool, whether greedy decoding writes the answer.
    """
    logits, labels = answer_logits(model, questions)
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=NO_LABEL)
    counts = labels != NO_LABEL
    is_right = ((logits.argmax(-1) == labels) | ~counts).all(1)
    return each.sum(1) / counts.sum(1), is_right


def batches(questions: Sequence[Question], size: int = BATCH_QUESTIONS) -> Iterator[Sequence[Question]]:
    """The questions in their order, some at a time."""
    for first in range(0, len(questions), size):
        yield questions[first : first + size]


def forward_options(model: nn.Module, places: Tensor) -> dict[str, Tensor]:
    """What lets a decoder compute the logits at some places alone, where it can.

    The places as a tensor: a number of the last ones would be a slice, which torch multiplies text by text.
    """
    return {"logits_to_keep": places} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
