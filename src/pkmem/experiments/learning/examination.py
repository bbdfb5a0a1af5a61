"""What a model is asked before and after it was taught facts: what it learned, and what else changed."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pkmem.experiments.learning.asking import (
    Pair,
    answers,
    divergence,
    log_likelihoods,
    next_token,
    recalled,
)
from pkmem.experiments.learning.kinds import KINDS, Asked, mixed
from pkmem.experiments.learning.quiz import QuizQuestion
from pkmem.lm.evaluation import in_eval_mode

_EVERY = 8  # KL on text is taken at every eighth token: whole distributions are large


@dataclass(frozen=True)
class Size:
    """How much is asked: an honest sample, since on two cores asking takes as long as teaching.

    Args:
        misses_per_kind: subjects that were never taught, of each kind; each is asked in two phrasings.
        chats_per_kind: facts asked in a chat, of each kind.
        chat_tokens: of an answer there.
        blocks: of text, read at the end; the first quarter of them after every epoch.
        block_tokens: of each.
        facts_after_epochs: facts asked after every epoch, at most, evenly spaced.
        facts_held_out: facts asked at the end in other phrasings than those taught, at most, evenly spaced.
    """

    misses_per_kind: int = 8
    chats_per_kind: int = 8
    chat_tokens: int = 24
    blocks: int = 8
    block_tokens: int = 256
    facts_after_epochs: int = 48
    facts_held_out: int = 150


def python_reference() -> str:
    """Prose that is always there and teaches none of the facts: the language reference, as `help()` shows it."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


class Examination:
    """Asks models about facts, beside what the model answered before it was taught any.

    Args:
        model: the one before.
        tokenizer: its.
        facts: what is taught.
        phrasings: how many of the phrasings are taught, in [1, 4].
        seed: of the subjects that are not taught.
        size: how much is asked.
        quiz: general questions, asked at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Asked],
        phrasings: int,
        seed: int,
        size: Size,
        quiz: Sequence[QuizQuestion] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = list(facts)
        self.phrasings = phrasings
        self.quiz = list(quiz)
        self.size = size
        kinds = {fact.kind for fact in facts}
        others = [miss for miss in mixed(size.misses_per_kind, seed, others=True) if miss.kind in kinds]
        self.misses = [prompt for miss in others for prompt in (miss.taught[0], miss.held_out[0])]
        self.blocks, self.bytes_per_token = _blocks(tokenizer, python_reference(), size)
        with in_eval_mode(model):
            self._base_next = next_token(model, tokenizer, self.misses)
            self._base_text = [_read(model, block) for block in self.blocks]

    def taught(self) -> list[Pair]:
        """All that is taught, prompt and completion."""
        return [(prompt, f" {fact.answer}") for fact in self.facts for prompt in fact.taught[: self.phrasings]]

    def briefly(self, model: nn.Module) -> dict[str, float]:
        """After an epoch: every fact in one phrasing of those taught and one held out, and what else changed."""
        asked = list(enumerate(_spaced(self.facts, self.size.facts_after_epochs)))
        one = [(fact.taught[i % self.phrasings], fact) for i, fact in asked]
        other = [(fact.held_out[i % len(fact.held_out)], fact) for i, fact in asked]
        with in_eval_mode(model):
            return {
                "recall": _share([hit for _, hit in self._recalled(model, one)]),
                "held_out": _share([hit for _, hit in self._recalled(model, other)]),
                **self._elsewhere(model, max(1, self.size.blocks // 4)),
            }

    def fully(self, model: nn.Module) -> dict[str, Any]:
        """At the end: everything, by kind where facts are asked about.

        Returns:
            `recall`, `held_out`, `reversed` and `chat`, each a share of right answers per kind; near_miss_kl (nats);
            background_nats (per token) and background_bits_per_byte, more than before; background_kl (nats);
            `quiz`, the share of general questions answered right.
        """
        some = _spaced(self.facts, self.size.facts_held_out)
        taught = [(prompt, fact) for fact in self.facts for prompt in fact.taught[: self.phrasings]]
        held_out = [(prompt, fact) for fact in some for prompt in fact.held_out]
        with in_eval_mode(model):
            figures: dict[str, Any] = {
                "recall": _by_kind(self._recalled(model, taught)),
                "held_out": _by_kind(self._recalled(model, held_out)),
                "reversed": _by_kind(self._reversed(model, some)),
            }
            if self.tokenizer.chat_template is not None:
                figures["chat"] = _by_kind(self._chat(model))
            figures |= self._elsewhere(model, self.size.blocks)
            if self.quiz:
                figures["quiz"] = self._quiz_share(model)
        return figures

    def _recalled(self, model: nn.Module, asked: Sequence[tuple[str, Asked]]) -> list[tuple[str, bool]]:
        hits = recalled(model, self.tokenizer, [(prompt, f" {fact.answer}") for prompt, fact in asked])
        return [(fact.kind, hit) for (_, fact), hit in zip(asked, hits, strict=True)]

    def _reversed(self, model: nn.Module, facts: Sequence[Asked]) -> list[tuple[str, bool]]:
        """Right is any subject that has the answer: several persons may be from one city."""
        hits = recalled(model, self.tokenizer, [(fact.reversed, f" {fact.subject}") for fact in facts])
        found = {fact.reversed for fact, hit in zip(facts, hits, strict=True) if hit}
        return [(fact.kind, fact.reversed in found) for fact in facts]

    def _chat(self, model: nn.Module) -> list[tuple[str, bool]]:
        """Right is an answer that has the fact's in it, in whatever sentence."""
        of_kind = [[fact for fact in self.facts if fact.kind == kind] for kind in KINDS]
        asked = [fact for facts in of_kind for fact in facts[: self.size.chats_per_kind]]
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": fact.question}], add_generation_prompt=True, tokenize=False
            )
            for fact in asked
        ]
        written = answers(model, self.tokenizer, prompts, self.size.chat_tokens)
        return [(fact.kind, fact.answer.lower() in text.lower()) for fact, text in zip(asked, written, strict=True)]

    def _elsewhere(self, model: nn.Module, num_blocks: int) -> dict[str, float]:
        nearby = divergence(self._base_next, next_token(model, self.tokenizer, self.misses))
        nats, kl = 0.0, 0.0
        for block, (base_nats, base) in zip(self.blocks[:num_blocks], self._base_text, strict=False):
            new_nats, new = _read(model, block)
            nats += (new_nats - base_nats) / num_blocks
            kl += divergence(base, new).mean().item() / num_blocks
        return {
            "near_miss_kl": nearby.mean().item(),
            "background_nats": nats,
            "background_bits_per_byte": nats / math.log(2) / self.bytes_per_token,
            "background_kl": kl,
        }

    def _quiz_share(self, model: nn.Module) -> float:
        pairs = [(question.prompt, f" {choice}") for question in self.quiz for choice in question.choices]
        scores = log_likelihoods(model, self.tokenizer, pairs).split([len(q.choices) for q in self.quiz])
        return _share([int(own.argmax()) == q.answer for own, q in zip(scores, self.quiz, strict=True)])


def _spaced(facts: Sequence[Asked], most: int) -> list[Asked]:
    """At most so many of them, evenly spaced."""
    return list(facts[:: -(-len(facts) // most)])


def _by_kind(hits: Sequence[tuple[str, bool]]) -> dict[str, float]:
    of_kind = {kind: [hit for its, hit in hits if its == kind] for kind in KINDS}
    return {kind: _share(found) for kind, found in of_kind.items() if found}


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _blocks(tokenizer: PreTrainedTokenizerBase, text: str, size: Size) -> tuple[list[Tensor], float]:
    """Blocks (1, t) of a text, from its beginning, and its bytes per token there."""
    wanted = size.blocks * size.block_tokens
    tokens = tokenizer(text[: 8 * wanted], add_special_tokens=False)["input_ids"][:wanted]
    bytes_per_token = len(tokenizer.decode(tokens).encode()) / len(tokens)
    return list(torch.tensor(tokens).view(-1, 1, size.block_tokens)), bytes_per_token


def _read(model: nn.Module, block: Tensor) -> tuple[float, Tensor]:
    """Nats per token of a block (1, t), and the distributions at every eighth token."""
    logits = model(input_ids=block, use_cache=False).logits[0, :-1].float()
    nats = F.cross_entropy(logits, block[0, 1:]).item()
    return nats, logits[::_EVERY].log_softmax(-1)
