"""What the tests of `pkmem.text` share: texts, and files made of them.

PYTEST_DONT_REWRITE: the tests import it before pytest takes its fixture.
"""

import bz2
import gzip
import json
import os
from pathlib import Path

import pytest

from pkmem.text import END_OF_TEXT, read_documents, train_tokenizer
from pkmem.text.files import zstd

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd.compress}
STORY = "".join(f"Line {n}: the quick brown fox jumps over {n * n} lazy dogs.\r\n" for n in range(400))
HOSTILE = [
    "",
    " leading and trailing \t ",
    "tabs\t\tand\r\nold\rline ends\n\n",
    "NUL \x00 and \x7f\x1b[0m",
    "emoji 🙂👩‍👩‍👧‍👦🇫🇷",
    "lone \u0301 combining \u0308\u0308, zalgo é vs e\u0301",
    "do n't fix , this . please ?",
    f"a {END_OF_TEXT} inside{END_OF_TEXT}",
    "\ufeff bom, \u202e bidi, \U0010ffff last",
]


def write(path: Path, content: str | bytes, compression: str = "") -> Path:
    path = path.with_name(path.name + compression)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[compression](content.encode() if isinstance(content, str) else content))
    return path


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def read(data: Path | str, split: str) -> list[str]:
    """The documents of a split, in a reading that must skip nothing."""
    skipped: list[tuple[str, str]] = []
    texts = list(read_documents(str(data), split, lambda *skip: skipped.append(skip)))
    assert skipped == []
    return texts


def read_skipping(data: Path | str, split: str = "train") -> tuple[list[str], dict[str, str]]:
    skipped: dict[str, str] = {}
    return list(read_documents(str(data), split, lambda name, reason: skipped.update({name: reason}))), skipped


def broken_files() -> dict[str, bytes]:
    content = os.urandom(30_000).hex().encode()
    halves = {f"half.txt{ending}": COMPRESS[ending](content)[:-9000] for ending in (".gz", ".bz2", ".zst")}
    garbage = {f"garbage.txt{ending}": b"certainly not compressed" for ending in (".gz", ".bz2", ".zst")}
    late = {"late.txt": STORY.encode() * 20 + b"\xff", "latin.py": "# déjà\n".encode("latin-1")}
    return halves | garbage | late


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([STORY], 400)
