"""Examples to tokens, and which of the tokens count for the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from pkmem.text.examples import Completion, Conversation, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COUNTS, BEGINS = 1, 2  # bits of a token's mark: it counts for the loss, it is the first of an example
_GENERATION = re.compile(r"\{%-?\s*generation\b")  # the tag in a chat template around what the model is to write


class Encoder:
    """Examples to tokens, without a tokenizer's truncation, padding or templates, but for a conversation its chat template.

    Text is closed by the end-of-text token, and so is a completion, before whose prompt stands the beginning-of-text
    token if the tokenizer puts it there. A conversation is what the chat template makes of it.

    Args:
        tokenizer: any fast tokenizer with an end-of-text (eos) token.

    Attributes:
        dtype: of the tokens, "uint16" or "uint32".
        identity: all that tokens of plain text depend on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # as text
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        largest = max(self._backend.get_vocab().values())
        self.dtype = "uint16" if largest < 1 << 16 else "uint32"
        self.identity = f"{self._eos} {self._backend.to_str()}"

    def identity_of_examples(self) -> str:
        """All else that the tokens of prompts and conversations depend on."""
        return f"{self._before_prompts()} {self._tokenizer.chat_template}"

    def __call__(self, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens (t,) of examples, in a row, and their marks (t,) uint8 of the bits COUNTS and BEGINS.

        Raises:
            ValueError: there is a conversation, and the tokenizer's chat template is not there or cannot be used.
        """
        texts = [example for example in examples if isinstance(example, str)]
        plain = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        tokens, marks = [], []
        for example in examples:
            match example:
                case Completion():
                    ids, counts = self._completion(example)
                case Conversation():
                    ids, counts = self._conversation(example)
                case _:
                    ids = [*next(plain).ids, self._eos]
                    counts = np.ones(len(ids), dtype=bool)
            tokens.append(np.array(ids, dtype=self.dtype))
            marks.append(np.where(counts, COUNTS, 0).astype(np.uint8))
            marks[-1][:1] |= BEGINS
        return np.concatenate(tokens), np.concatenate(marks)

    def _completion(self, example: Completion) -> tuple[list[int], np.ndarray]:
        """The prompt's tokens are those of the prompt alone, as when the model is asked."""
        prompt, whole = self._ids(example.prompt), self._ids(example.text)
        is_seam = whole[: len(prompt)] == prompt
        completion = whole[len(prompt) :] if is_seam else self._ids(example.completion)
        prompt = [*self._before_prompts(), *prompt]
        ids = [*prompt, *completion, self._eos]
        return ids, np.arange(len(ids)) >= len(prompt)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _before_prompts(self) -> list[int]:
        """What the tokenizer puts before a text: the beginning-of-text token, or nothing."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []

    def _conversation(self, example: Conversation) -> tuple[list[int], np.ndarray]:
        messages = [{"role": role, "content": content} for role, content in example.messages]
        place = f"the conversation that begins {example.messages[0][1][:40]!r}"
        spelled = [token for token in self._tokenizer.all_special_tokens if token in example.text]
        if spelled:
            raise ValueError(f"{place} spells the tokenizer's special token {spelled[0]!r} out: take it from the data")
        try:
            if _GENERATION.search(self._tokenizer.get_chat_template()):
                options = {"return_dict": True, "return_assistant_tokens_mask": True}
                made: Any = self._tokenizer.apply_chat_template(messages, tokenize=True, **options)
                ids, counts = made["input_ids"], np.array(made["assistant_masks"], dtype=bool)
            else:
                text, spans = self._spans(messages)
                encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                ids, places = encoded["input_ids"], np.array(encoded["offset_mapping"])
                counts = _touch(places, spans)
        except Exception as error:  # jinja raises its own kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            fix = "use a tokenizer whose template marks the assistant's text by {% generation %}, or prompt and completion"
            raise ValueError(f"{place} cannot be put into the tokenizer's chat template: {reason}; {fix}") from error
        if not counts.any():
            raise ValueError(f"the tokenizer's chat template marks nothing of {place} as the assistant's")
        return ids, counts

    def _spans(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and from where to where the assistant speaks.

        That is what a message adds to the messages before it and the template's invitation to answer them.

        Raises:
            ValueError: a later message changes how an earlier one is written.
        """
        whole, spans = self._rendered(messages), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._rendered(messages[:index], add_generation_prompt=True)
                through = self._rendered(messages[: index + 1])
                if not (whole.startswith(through) and through.startswith(before)):
                    raise ValueError(f"message {index + 1} is written in another way when others stand beside it")
                spans.append((len(before), len(through)))
        return whole, spans

    def _rendered(self, messages: list[dict[str, str]], **options: bool) -> str:
        text: Any = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return str(text)


def _touch(places: np.ndarray, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Which tokens at places (t, 2) in a text have a character in one of the spans."""
    touch = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        touch |= (places[:, 0] < stop) & (places[:, 1] > start)
    return touch
