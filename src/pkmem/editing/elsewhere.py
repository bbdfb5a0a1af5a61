"""What shall stay as it is while a model is taught: other text, and prompts that almost ask for the facts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.kept_answers import KeptAnswers
from pkmem.editing.near_misses import near_misses
from pkmem.editing.others import Others
from pkmem.editing.questions import Question, as_questions, forward_options
from pkmem.editing.reads import Reads, reading, weight_of_rows
from pkmem.editing.rehearsal import Rehearsal
from pkmem.layer.memory import memories_in
from pkmem.lm.huggingface import context_tokens
from pkmem.lm.placement import MemoryMLP
from pkmem.text.facts import Fact

_NEAR_MISSES = 200
_MOST_TOKENS = 16_384  # of a background that is given
_BLOCK_TOKENS = 256
_OWN_TEXTS, _OWN_TOKENS = 96, 48  # that the model writes itself where no background is given: many at once, for speed
_BATCH_TOKENS = 1024


class Elsewhere:
    """What each memory of a model reads for all that shall stay as it is; read off once.

    Args:
        model: with memories, in eval mode.
        tokenizer: its tokenizer.
        facts: what will be taught.
        others: edits; what shall stay is what the model says without them, so that their harm does not add up.
        known: of each of these the facts that it taught, which shall stay as well.
        background: texts; None lets the model write some.
        seed: of near misses and of what the model writes.

    Attributes:
        texts: the background, as tokens.
        background, near: of each memory, its reads; `near` is of near misses and of what is known, None without any.
        near_answers: what the model says to near misses; None where there are none.
        known: questions about what is known; None where there are none.
        energy: of each memory, the mean square norm of what it and its MLP give on the background.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        others: Others,
        known: Sequence[Sequence[Fact]],
        background: Iterable[str] | None,
        seed: int,
    ) -> None:
        others.hold_none()
        blocks = None if background is None else _blocks(model, tokenizer, background)
        squares: list[list[Tensor]] = [[] for _ in memories_in(model)]
        hooks = [
            part.register_forward_hook(
                lambda _, __, out, kept=kept: kept.append(
                    (out[0] if isinstance(out, tuple) else out).float().square().sum(-1).mean()
                )
            )
            for part, kept in zip(_mlps(model), squares, strict=True)
        ]
        try:
            with _reads_of(model) as self.background:
                if blocks is None:
                    self.texts = _write(model, tokenizer, seed)
                else:
                    self.texts = blocks
                    _read(model, blocks)
        finally:
            for hook in hooks:
                hook.remove()
        self.energy = [torch.stack(kept).mean().clamp_min(1e-12) for kept in squares]
        near = near_questions(model, tokenizer, [*facts, *itertools.chain(*known)], seed)
        self.near = self.near_answers = self.known = None
        if near or any(known):
            with _reads_of(model) as self.near:
                self.near_answers = KeptAnswers(model, near) if near else None
                others.hold_all()
                self.known = Rehearsal(model, tokenizer, known, seed) if any(known) else None

    def weight_of_rows(self, place: int, num_rows: int) -> Tensor:
        """The weight with which a token reads each row through the memory at a place, (m,) fp64."""
        weight = weight_of_rows(self.background[place], num_rows) / len(self.background[place].slots)
        if self.near is not None:
            weight += weight_of_rows(self.near[place], num_rows) / len(self.near[place].slots)
        return weight


def near_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], seed: int
) -> list[Question]:
    """Near misses of facts, but for those that are longer than the context; none where none can be made."""
    near = near_misses(facts, _NEAR_MISSES, seed)
    made = as_questions(near, tokenizer) if near else []
    return [question for question in made if len(question.prompt) + len(question.answer) <= context_tokens(model)]


def _mlps(model: PreTrainedModel) -> list[MemoryMLP]:
    return [part for part in model.modules() if isinstance(part, MemoryMLP)]


def _blocks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The first tokens of texts, in blocks.

    Raises:
        ValueError: there are none.
    """
    length = min(_BLOCK_TOKENS, context_tokens(model))
    blocks: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        blocks += [ids[first : first + length] for first in range(0, len(ids), length)]
        if sum(map(len, blocks)) >= _MOST_TOKENS:
            break
    if not blocks:
        raise ValueError("the background has no text: give some, or leave it out and the model writes its own")
    return blocks[: -(-_MOST_TOKENS // length)]


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[list[int]]:
    """Lets the model write by itself, drawn from all its tokens, each text after a word drawn at random."""
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    words = [token for token in range(len(tokenizer)) if tokenizer.decode([token])[1:].isalpha()]
    starts = torch.tensor(words or range(len(tokenizer)))  # a tokenizer of bytes has no words
    first = starts[torch.randint(len(starts), (_OWN_TEXTS,), generator=draw)]
    num_tokens = min(_OWN_TOKENS, context_tokens(model)) - 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written: Tensor = model.generate(
            input_ids=first[:, None].to(device),
            attention_mask=torch.ones(_OWN_TEXTS, 1, dtype=torch.int64, device=device),
            min_new_tokens=num_tokens,  # so that none ends, and every token read is one written
            max_new_tokens=num_tokens,
            do_sample=True,
            top_k=0,
            temperature=1.0,
            pad_token_id=tokenizer.eos_token_id,
        )
    return written.tolist()


@contextlib.contextmanager
def _reads_of(model: PreTrainedModel) -> Iterator[list[Reads]]:
    """At the end of the block the list has what each memory read within it."""
    found: list[list[Reads]] = [[] for _ in memories_in(model)]
    together: list[Reads] = []
    with torch.no_grad(), reading(model, lambda place, reads: found[place].append(reads)):
        yield together
    together += [Reads(*(torch.cat(parts) for parts in zip(*reads, strict=True))) for reads in found]


def _read(model: PreTrainedModel, texts: Sequence[list[int]]) -> None:
    for tokens, mask in _padded(texts):
        given = {"input_ids": tokens.to(model.device), "attention_mask": mask.to(model.device)}
        model(**given, use_cache=False, **forward_options(model, tokens.new_zeros(1).to(model.device)))


def _padded(texts: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and attention masks, some texts of a like length at a time."""
    waiting = sorted((text for text in texts if text), key=len)
    while waiting:
        num = max(1, _BATCH_TOKENS // len(waiting[-1]))
        some, waiting = waiting[-num:], waiting[:-num]
        lengths = torch.tensor([len(text) for text in some])
        tokens = pad_sequence([torch.tensor(text) for text in some], batch_first=True)
        yield tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
