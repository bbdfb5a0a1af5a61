"""Facts to teach: what stands before an answer, in one phrasing or several, and the answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkmem.text.files import open_text

_FORM = 'write {"prompt": "...", "completion": "..."}, or "prompts": [...] for several phrasings'


@dataclass(frozen=True)
class Fact:
    """Prompts that all have one completion.

    Args:
        prompts: phrasings up to the answer, one or more; all of them end with white space, or none does.
        completion: the answer.

    Raises:
        ValueError: there is no prompt, one is empty, the completion is, or some prompts end with white space only.
    """

    prompts: tuple[str, ...]
    completion: str

    def __post_init__(self) -> None:
        if not (isinstance(self.prompts, tuple) and self.prompts):
            raise ValueError(f"prompts is {self.prompts!r} but must be a tuple of one prompt or more")
        for prompt in self.prompts:
            _require_text(prompt, "a prompt")
        _require_text(self.completion, "the completion")
        if len({prompt[-1].isspace() for prompt in self.prompts}) > 1:
            raise ValueError("some prompts end with a space and some do not: write them alike")

    @property
    def answer(self) -> str:
        """What follows each prompt: the completion, after a space if there is no white space between them."""
        is_apart = self.prompts[0][-1].isspace() or self.completion[0].isspace()
        return self.completion if is_apart else f" {self.completion}"

    @classmethod
    def from_dict(cls, document: Any) -> Fact:
        """A fact from what `to_dict` gives, or from `{"prompt": ..., "completion": ...}`.

        Raises:
            ValueError: a field is missing, unknown or empty.
        """
        if not isinstance(document, dict):
            raise ValueError(f"no object: {_FORM}")
        unknown = document.keys() - {"prompt", "prompts", "completion"}
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}: {_FORM}")
        if "completion" not in document:
            raise ValueError(f"no completion: {_FORM}")
        if ("prompt" in document) == ("prompts" in document):
            raise ValueError(f"{'both prompt and prompts' if 'prompt' in document else 'no prompt'}: {_FORM}")
        prompts = [document["prompt"]] if "prompt" in document else document["prompts"]
        if not (isinstance(prompts, list) and prompts):
            raise ValueError(f"prompts is no list of one prompt or more: {_FORM}")
        return cls(tuple(prompts), document["completion"])

    def to_dict(self) -> dict[str, Any]:
        """The fact as JSON holds it."""
        return {"prompts": list(self.prompts), "completion": self.completion}


def read_facts(file: Path) -> list[Fact]:
    """The facts of a JSON Lines file, a fact a line; empty lines are skipped.

    Args:
        file: UTF-8, compressed if its name ends so; its lines are `{"prompt": "...", "completion": "..."}` or
            `{"prompts": ["...", ...], "completion": "..."}`.

    Returns:
        the facts, in the file's order, at least one.

    Raises:
        ValueError: a line is no fact, two lines complete the same prompt differently, or there is no line.
        OSError: the file cannot be read.
    """
    facts: list[Fact] = []
    first: dict[str, tuple[int, str]] = {}  # prompt -> the line that has it, and its answer
    try:
        with open_text(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file}, line {number}"
                fact = _parse(line, where)
                for prompt in map(str.rstrip, fact.prompts):
                    before, answer = first.setdefault(prompt, (number, fact.completion.strip()))
                    if answer != fact.completion.strip():
                        raise ValueError(
                            f"{where}: the prompt {prompt[:80]!r} has another completion in line {before}: "
                            "keep the right one"
                        )
                facts.append(fact)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason}): save it as UTF-8") from error
    if not facts:
        raise ValueError(f"{file}: no fact in it; a line each: {_FORM}")
    return facts


def _parse(line: str, where: str) -> Fact:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}): {_FORM}") from error
    try:
        return Fact.from_dict(document)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _require_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what} is {str(text)[:80]}, no text: put it between quotation marks")
    if not text.strip():
        raise ValueError(f"{what} is empty: write it out, or leave the fact out")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{what} has half of a surrogate pair, which no text can hold: write the whole character")
