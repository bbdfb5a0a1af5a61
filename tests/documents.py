"""What the tests of README and of the pages share: their blocks of code and the commands they show.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import io
import re
import shlex
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pkmem.cli import VERBS, build_parser

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_COMMAND = re.compile(r"(?:pkmem|torchrun .* -m pkmem) ([a-z].*)")
_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")  # `memory.knn=8` is an option of train


class Block(NamedTuple):
    """A block of code: its language, its text, where it begins, and the text block right behind it."""

    language: str
    code: str
    line: int
    printed: str | None


def blocks_of(document: str) -> list[Block]:
    """All fenced blocks, in order."""
    fences = list(_FENCE.finditer(document))
    blocks = []
    for fence, following in zip_longest(fences, fences[1:]):
        behind = following is not None and document[fence.end() : following.start()].strip() == ""
        printed = following[2] if following is not None and behind and following[1] == "text" else None
        blocks.append(Block(fence[1], fence[2], document[: fence.start()].count("\n") + 2, printed))
    return blocks


def prose_of(document: str) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", document)


def run(block: Block, path: Path, names: dict[str, Any]) -> str:
    """Runs a python block as if it stood in the document; returns what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), names)
    return printed.getvalue()


def commands_of(document: str) -> list[list[str]]:
    """The arguments of every call of pkmem: in blocks that are not Python, and in running text."""
    shown = [block.code for block in blocks_of(document) if block.language in ("", "sh")]
    lines = [line for code in shown for line in code.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in _INLINE.findall(prose_of(document))]
    found = [_COMMAND.fullmatch(line.split(" #")[0].strip()) for line in lines]
    return [shlex.split(match[1]) for match in found if match is not None]


def check_command(arguments: list[str]) -> None:
    """Parses a call with the real parser, from the root of the repository; a verb alone has to exist.

    Raises:
        ValueError: the parser refuses it.
        KeyError: there is no such verb.
    """
    verb, *options = arguments
    VERBS[verb]
    if options and not {"--help", "--print_config"} & set(options):
        build_parser().parse_args([verb, *(f"--{text}" if _OVERRIDE.match(text) else text for text in options)])
