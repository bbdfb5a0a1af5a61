"""The examples of a .jsonl file: plain text, a prompt with its completion, a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, which alone counts for the loss.

    Args:
        prompt: may be empty.
        completion: not empty; begins with a space if neither it nor the prompt has one where they meet.
    """

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The two as one text."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the assistant's count for the loss.

    Args:
        messages: (role, content) of each; at least one is the assistant's.
    """

    messages: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """What is said, without the form that a chat template gives it."""
        return "\n".join(content for _, content in self.messages)


Example = str | Completion | Conversation


def text_of(example: Example) -> str:
    """The text of an example, all of it."""
    return example if isinstance(example, str) else example.text


def example_of(record: Any) -> Example:
    """The example that a line of JSON or a row of a dataset holds.

    Raises:
        ValueError: it holds none, or one that is not text.
    """
    given = record if isinstance(record, dict) else {}
    example: Example
    if "messages" in given:
        example = Conversation(tuple(map(_message, _listed(given["messages"]))))
        if "assistant" not in (role for role, _ in example.messages):
            raise ValueError('no message of role "assistant", so nothing to learn')
    elif "prompt" in given and "completion" in given:
        prompt, completion = _string(given, "prompt"), _string(given, "completion")
        if not completion.strip():
            raise ValueError('an empty "completion"')
        has_space = not prompt or prompt[-1].isspace() or completion[0].isspace()
        example = Completion(prompt, completion if has_space else f" {completion}")
    else:
        example = _string(given, "text")
    text_of(example).encode()  # JSON can spell lone surrogates, which are no text: UnicodeEncodeError is a ValueError
    return example


def _listed(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise ValueError('"messages" is no list')
    return messages


def _message(message: Any) -> tuple[str, str]:
    given = message if isinstance(message, dict) else {}
    return _string(given, "role"), _string(given, "content")


def _string(record: dict[str, Any], name: str) -> str:
    text = record.get(name)
    if not isinstance(text, str):
        raise ValueError(f'no string "{name}"')
    return text
