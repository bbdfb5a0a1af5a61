"""The tokens of a text on disk, made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from pkmem.text.cache import cache_folder, make_cache_folder
from pkmem.text.documents import Split, read_documents
from pkmem.text.durable import replacing

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerFast

BATCH_CHARS = 1 << 20
CACHE_FORMAT = "pkmem tokens 1"


@dataclass(frozen=True)
class TokenFile:
    """One split of a text as tokens on disk, each document closed by the end-of-text token.

    Args:
        path: the file of tokens; its ending names their type.
        num_tokens: tokens in the file, end-of-text tokens included.
        num_bytes: UTF-8 bytes of the documents.
        num_documents: documents in the file.
        num_skipped: files and lines that could not be read as text.
    """

    path: Path
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token: what turns a loss per token into one per byte."""
        return self.num_bytes / self.num_tokens

    def tokens(self) -> np.memmap:
        """The tokens, (num_tokens,) uint16 or uint32, read from disk as they are used."""
        return np.memmap(self.path, dtype=self.path.suffix[1:], mode="r", shape=(self.num_tokens,))


def tokenize(
    data: str, split: Split, tokenizer: PreTrainedTokenizerFast, cache_dir: Path | None = None, progress: bool = True
) -> TokenFile:
    """The tokens of one split, from the cache or written to it.

    A cached file is found by the contents of its documents and the tokenizer, so edited data is tokenized anew and
    moved data is not. A Hub dataset is found by its name alone. A special token spelled out in a text is encoded
    as plain text, so that only a document's end is an end-of-text token.

    Args:
        data: what to read, as in `read_documents`.
        split: "train" or "validation".
        tokenizer: any fast tokenizer with an end-of-text (eos) token.
        cache_dir: where token files are kept; $PKMEM_CACHE or ~/.cache/pkmem/tokens unless given.
        progress: whether a bar on stderr counts the text encoded.

    Returns:
        The file and its counts.

    Raises:
        ValueError: nothing to read, as in `read_documents`, the tokenizer has no eos token, or the cache's folder
            cannot be written.
    """
    from tqdm import tqdm

    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end documents with; set tokenizer.eos_token")
    encoder = _Encoder(tokenizer)
    key, total_bytes = _fingerprint(data, split, encoder)
    path = (cache_dir or cache_folder("tokens")) / f"{key}.{encoder.dtype}"
    if cached := _read_cached(path):
        return cached
    make_cache_folder(path.parent, "tokens")
    bar = tqdm(desc=f"tokenize {split}", total=total_bytes, unit="B", unit_scale=True, disable=not progress)
    return _write_tokens(path, data, split, encoder, bar)


class _Encoder:
    """Texts to tokens, each closed by the end-of-text token, without a tokenizer's truncation, padding or templates."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # as text
        self._eos = tokenizer.eos_token_id
        largest = max(self._backend.get_vocab().values())
        self.dtype = "uint16" if largest < 1 << 16 else "uint32"
        self.identity = f"{self._eos} {self._backend.to_str()}"

    def __call__(self, texts: list[str]) -> np.ndarray:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array([*encoding.ids, self._eos], dtype=self.dtype) for encoding in encodings])


def _fingerprint(data: str, split: Split, encoder: _Encoder) -> tuple[str, int | None]:
    """The cache key, and the text's bytes where finding the key meant reading it."""
    digest = hashlib.sha256()

    def add(part: str) -> None:
        encoded = part.encode(errors="surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little"))  # so that parts cannot run into each other
        digest.update(encoded)

    for part in (CACHE_FORMAT, split, encoder.identity):
        add(part)
    if data.startswith("hf:"):
        add(data)
        return digest.hexdigest(), None
    # What is skipped counts too: the number of it in the cache must stay true.
    num_bytes = 0
    for text in read_documents(data, split, on_skip=lambda name, _: add(name)):
        add(text)
        num_bytes += len(text.encode())
    return digest.hexdigest(), num_bytes


def _read_cached(path: Path) -> TokenFile | None:
    try:
        cached = TokenFile(path, **json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        is_whole = path.stat().st_size == cached.num_tokens * np.dtype(path.suffix[1:]).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return cached if is_whole else None


def _write_tokens(path: Path, data: str, split: Split, encoder: _Encoder, bar: tqdm) -> TokenFile:
    num_tokens = num_bytes = num_documents = num_skipped = 0

    def skip(_name: str, _reason: str) -> None:
        nonlocal num_skipped
        num_skipped += 1

    numbers_path = path.with_suffix(".json")
    with bar, replacing(path) as file:
        for texts in _batches(read_documents(data, split, skip)):
            tokens = encoder(texts)
            file.write(tokens.tobytes())
            batch_bytes = sum(len(text.encode()) for text in texts)
            num_tokens += len(tokens)
            num_bytes += batch_bytes
            num_documents += len(texts)
            bar.update(batch_bytes)
        numbers_path.unlink(missing_ok=True)  # numbers never stand beside tokens that are not theirs
    written = TokenFile(path, num_tokens, num_bytes, num_documents, num_skipped)
    with replacing(numbers_path) as file:
        numbers = {name: number for name, number in asdict(written).items() if name != "path"}
        file.write(json.dumps(numbers).encode())
    return written


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
