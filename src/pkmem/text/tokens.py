"""The tokens of a text on disk, made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pkmem.files.durable import replacing
from pkmem.text.cache import cache_folder, make_cache_folder
from pkmem.text.documents import Split, read_examples
from pkmem.text.encoder import COUNTS, Encoder
from pkmem.text.examples import Completion, Conversation, Example, text_of

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerFast

BATCH_CHARS = 1 << 20
CACHE_FORMAT = "pkmem tokens 1"


@dataclass(frozen=True)
class TokenFile:
    """One split of a text as tokens on disk, each document closed by the end-of-text token.

    Where some documents are prompts with completions, or conversations, a second file of the same name ending in .marks
    says which tokens count for the loss and where documents begin.

    Args:
        path: the file of tokens; its ending names their type.
        num_tokens: tokens in the file, end-of-text tokens included.
        num_bytes: UTF-8 bytes of the documents, without what does not count.
        num_documents: documents in the file.
        num_skipped: files and lines that could not be read as text.
        num_counted: tokens that count for the loss; None where all do, and there are no marks.
    """

    path: Path
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped: int
    num_counted: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token that counts: what turns a loss per token into one per byte."""
        return self.num_bytes / (self.num_counted or self.num_tokens)

    def tokens(self) -> np.memmap:
        """The tokens, (num_tokens,) uint16 or uint32, read from disk as they are used."""
        return np.memmap(self.path, dtype=self.path.suffix[1:], mode="r", shape=(self.num_tokens,))

    def marks(self) -> np.memmap | None:
        """The marks, (num_tokens,) uint8 of the bits that `pkmem.text.encoder` names; None where all tokens count."""
        if self.num_counted is None:
            return None
        return np.memmap(self.path.with_suffix(".marks"), dtype="uint8", mode="r", shape=(self.num_tokens,))


def tokenize(
    data: str, split: Split, tokenizer: PreTrainedTokenizerFast, cache_dir: Path | None = None, progress: bool = True
) -> TokenFile:
    """The tokens of one split, from the cache or written to it.

    A cached file is found by the contents of its documents and the tokenizer, so edited data is tokenized anew and
    moved data is not. A Hub dataset is found by its name alone. A special token spelled out in a text is encoded
    as plain text, so that only a document's end is an end-of-text token. Of a prompt with its completion the completion
    and its end count for the loss; of a conversation, in the form of the tokenizer's chat template, what the assistant says.

    Args:
        data: what to read, as in `read_documents`.
        split: "train" or "validation".
        tokenizer: any fast tokenizer with an end-of-text (eos) token.
        cache_dir: where token files are kept; $PKMEM_CACHE or ~/.cache/pkmem/tokens unless given.
        progress: whether a bar on stderr counts the text encoded.

    Returns:
        The file and its counts.

    Raises:
        ValueError: nothing to read, as in `read_documents`, the tokenizer has no eos token, there are conversations
            that its chat template cannot be used for, or the cache's folder cannot be written.
    """
    from tqdm import tqdm

    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end documents with; set tokenizer.eos_token")
    encoder = Encoder(tokenizer)
    key, total_bytes, is_marked = _fingerprint(data, split, encoder)
    path = (cache_dir or cache_folder("tokens")) / f"{key}.{encoder.dtype}"
    if cached := _read_cached(path):
        return cached
    make_cache_folder(path.parent, "tokens")
    bar = tqdm(desc=f"tokenize {split}", total=total_bytes, unit="B", unit_scale=True, disable=not progress)
    return _write_tokens(path, data, split, encoder, is_marked, bar)


def _fingerprint(data: str, split: Split, encoder: Encoder) -> tuple[str, int | None, bool]:
    """The cache key, the text's bytes where finding the key meant reading it, and whether not all tokens count."""
    digest = hashlib.sha256()

    def add(part: str) -> None:
        encoded = part.encode(errors="surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little"))  # so that parts cannot run into each other
        digest.update(encoded)

    for part in (CACHE_FORMAT, split, encoder.identity):
        add(part)
    if data.startswith("hf:"):
        add(data)
        is_marked = not isinstance(next(read_examples(data, split)), str)  # rows of a dataset have the same fields
        if is_marked:
            add(encoder.identity_of_examples())
        return digest.hexdigest(), None, is_marked
    # What is skipped counts too: the number of it in the cache must stay true.
    num_bytes, is_marked = 0, False
    for example in read_examples(data, split, on_skip=lambda name, _: add(name)):
        if not isinstance(example, str) and not is_marked:
            is_marked = True
            add(encoder.identity_of_examples())
        add(example if isinstance(example, str) else repr(example))
        num_bytes += len(text_of(example).encode())
    return digest.hexdigest(), num_bytes, is_marked


def _read_cached(path: Path) -> TokenFile | None:
    try:
        cached = TokenFile(path, **json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        is_whole = path.stat().st_size == cached.num_tokens * np.dtype(path.suffix[1:]).itemsize
        if cached.num_counted is not None:
            is_whole &= path.with_suffix(".marks").stat().st_size == cached.num_tokens
    except (OSError, ValueError, TypeError):
        return None
    return cached if is_whole else None


def _write_tokens(path: Path, data: str, split: Split, encoder: Encoder, is_marked: bool, bar: tqdm) -> TokenFile:
    num_tokens = num_bytes = num_documents = num_skipped = num_counted = 0

    def skip(_name: str, _reason: str) -> None:
        nonlocal num_skipped
        num_skipped += 1

    numbers_path, marks_path = path.with_suffix(".json"), path.with_suffix(".marks")
    with bar, replacing(path) as file, replacing(marks_path) if is_marked else contextlib.nullcontext() as marks_file:
        for examples in _batches(read_examples(data, split, skip)):
            tokens, marks = encoder(examples)
            file.write(tokens.tobytes())
            if marks_file:
                marks_file.write(marks.tobytes())
            num_tokens += len(tokens)
            num_counted += int(np.count_nonzero(marks & COUNTS))
            num_bytes += sum(map(_counted_bytes, examples))
            num_documents += len(examples)
            bar.update(sum(len(text_of(example).encode()) for example in examples))
        numbers_path.unlink(missing_ok=True)  # numbers never stand beside tokens that are not theirs
    written = TokenFile(path, num_tokens, num_bytes, num_documents, num_skipped, num_counted if is_marked else None)
    with replacing(numbers_path) as file:
        numbers = {name: number for name, number in asdict(written).items() if name != "path"}
        file.write(json.dumps(numbers).encode())
    return written


def _counted_bytes(example: Example) -> int:
    match example:
        case Completion():
            return len(example.completion.encode())
        case Conversation():
            return sum(len(content.encode()) for role, content in example.messages if role == "assistant")
    return len(example.encode())


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    num_chars = 0
    for example in examples:
        batch.append(example)
        num_chars += len(text_of(example))
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
