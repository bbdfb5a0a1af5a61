"""Text -> tokenizer -> token blocks, resumable, with never more than a few pieces of text in memory.

`read_documents` streams the documents of one split, `train_tokenizer` learns a vocabulary from them, `tokenize`
writes their tokens once to a cached file, and `TokenBlocks` cuts that file into training or evaluation blocks.
"""

import bz2
import gzip
import hashlib
import importlib.util
import io
import json
import os
import sysconfig
import uuid
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation"]
OnSkip = Callable[[str, str], None]

END_OF_TEXT = "<|endoftext|>"
TEXT_ENDINGS = (".txt", ".md", ".py")
JSON_LINES = ".jsonl"
COMPRESSED_ENDINGS = (".gz", ".bz2", ".zst")
ENDINGS_READ = f"{' '.join(TEXT_ENDINGS)} {JSON_LINES}, each also with {' '.join(COMPRESSED_ENDINGS)}"

CORPUS_PACKAGES = ("torch", "sympy", "numpy", "networkx")
LEFT_OUT = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})

ONE_IN = 20  # one document in so many is validation: 5 %
MIN_FILES_TO_HASH = 100  # of fewer, a hash may well choose none for validation
PIECE_CHARS = 1 << 16
BATCH_CHARS = 1 << 20
CACHE_FORMAT = "pkmem tokens 1"


# Documents ---------------------------------------------------------------------------------------------------


def read_documents(data: str, split: Split, on_skip: OnSkip | None = None) -> Iterator[str]:
    """The documents of one split, streamed in an order that depends on the data only.

    About one document in twenty is validation: by the hash of a file's relative path, or of a line's place in its
    .jsonl file. Of fewer than a hundred text files, each is split in its text instead: its last twentieth is
    validation. A text file longer than 64 Ki characters gives several documents, cut at line ends.

    A file that cannot be read (not UTF-8, broken compression) is skipped, and so is a line of a .jsonl file without
    a "text"; empty documents are left out.

    Args:
        data: "python", the standard library of this Python without its tests; "python+", the same and the sources
            of torch, sympy, numpy and networkx; "hf:NAME" or "hf:NAME:CONFIG", a dataset of the Hugging Face Hub with
            a field "text", streamed; or a file, a directory (searched recursively, without hidden files) or a glob
            of .txt, .md, .py and .jsonl (a field "text" per line), each also with .gz, .bz2 or .zst.
        split: "train" or "validation". A Hub dataset's own validation split is used where it has one.
        on_skip: called with the name of what is skipped and the reason.

    Returns:
        The texts, none of them empty.

    Raises:
        ValueError: nothing there to read, an ending that is not read, a package that is missing, or (while
            iterating) no text in the split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'validation'")
    skipped: list[str] = []

    def skip(name: str, reason: str) -> None:
        if not skipped:
            skipped.append(f"; skipped {name}: {reason}")
        if on_skip is not None:
            on_skip(name, reason)

    is_hub = data.startswith("hf:")
    documents = _hub_documents(data, split, skip) if is_hub else _file_documents(_find_files(data), split, skip)

    def not_empty() -> Iterator[str]:
        is_empty = True
        for text in documents:
            if text and not text.isspace():
                is_empty = False
                yield text
        if is_empty:
            raise ValueError(
                f"{data}: no text for the {split} split; give more documents or longer files{''.join(skipped)}"
            )

    return not_empty()


@dataclass(frozen=True)
class _TextFile:
    path: Path
    name: str  # relative to what was asked for: the same on every machine

    @property
    def is_json_lines(self) -> bool:
        return _text_ending(self.path) == JSON_LINES


def _text_ending(path: Path) -> str:
    """The ending of a file's name under its compression's."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED_ENDINGS else path
    return inner.suffix.lower()


def _is_read(path: Path) -> bool:
    return _text_ending(path) in (*TEXT_ENDINGS, JSON_LINES)


def _find_files(data: str) -> list[_TextFile]:
    if data == "python":
        return _standard_library()
    if data == "python+":
        return _standard_library() + [file for name in CORPUS_PACKAGES for file in _package(name)]
    path = Path(data).expanduser()
    if path.is_file() and not _is_read(path):
        raise ValueError(f"{data}: cannot read a {path.suffix or path.name!r} file as text; read are {ENDINGS_READ}")
    if path.is_file():
        return [_TextFile(path, path.name)]
    if data and path.is_dir():
        files = _named(_walk(path), path)
    elif any(char in data for char in "*?["):
        files = _glob(path)
    else:
        raise ValueError(f"{data!r}: no such file or directory; give one, a glob, 'python', 'python+' or 'hf:NAME'")
    if not files:
        raise ValueError(f"{data}: no file to read there; read are {ENDINGS_READ}")
    return files


def _standard_library() -> list[_TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _sources(root, root)
    if not files:
        raise ValueError(f"python: this Python has no .py files in {root}; give a file or a directory of text")
    return files


def _package(name: str) -> list[_TextFile]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'python+: {name} is not installed; run: pip install "pkmem[corpus]"')
    folder = Path(next(iter(spec.submodule_search_locations)))
    return _sources(folder, folder.parent)


def _sources(folder: Path, root: Path) -> list[_TextFile]:
    return [file for file in _named(_walk(folder, LEFT_OUT), root) if file.path.suffix == ".py"]


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _glob(pattern: Path) -> list[_TextFile]:
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if any(char in part for char in "*?["))
    root = Path(*parts[:first])
    return _named(root.glob(str(Path(*parts[first:]))), root)


def _named(paths: Iterable[Path], root: Path) -> list[_TextFile]:
    """The files to read among paths, hidden ones left out, named relative to the root and sorted by name."""
    chosen = (path for path in paths if _is_read(path) and not path.name.startswith(".") and path.is_file())
    return sorted((_TextFile(path, path.relative_to(root).as_posix()) for path in chosen), key=lambda file: file.name)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "little")


def _split_of_file(name: str) -> Split:
    return "validation" if _hash(name) % ONE_IN == 0 else "train"


def _split_of_record(name: str, index: int) -> Split:
    """One record of each twenty in a row is validation: a short file has some too."""
    return "validation" if index % ONE_IN == _hash(f"{name}:{index // ONE_IN}") % ONE_IN else "train"


def _file_documents(files: list[_TextFile], split: Split, skip: OnSkip) -> Iterator[str]:
    split_within = sum(not file.is_json_lines for file in files) < MIN_FILES_TO_HASH
    for file in files:
        try:
            if file.is_json_lines:
                yield from _line_documents(file, split, skip)
            elif split_within:
                yield from _text_documents(file.path, split)
            elif _split_of_file(file.name) == split:
                yield from _text_documents(file.path)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            skip(file.name, str(error))


def _text_documents(path: Path, part: Split | None = None) -> Iterator[str]:
    """A text file's pieces: all, or those of one part, where the validation part is its last twentieth."""
    with _open_text(path) as file:
        # Reading to the end first also finds a broken file before any piece of it is used.
        num_chars = sum(len(chunk) for chunk in iter(lambda: file.read(PIECE_CHARS), ""))
    num_validation = 0 if part is None else -(-num_chars // ONE_IN)
    with _open_text(path) as file:
        # Finishing a line may take half of the validation part, never all of it.
        head = _pieces(file, num_chars - num_validation, num_validation // 2 if part else PIECE_CHARS)
        if part != "validation":
            yield from head
            return
        for _ in head:
            pass
        yield from _pieces(file, num_chars, PIECE_CHARS)


def _pieces(file: IO[str], num_chars: int, max_overrun: int) -> Iterator[str]:
    """Pieces of the next `num_chars` characters, each going on to its line's end if that is near enough."""
    while num_chars > 0 and (piece := file.read(min(PIECE_CHARS, num_chars))):
        if not piece.endswith("\n"):
            piece += file.readline(min(PIECE_CHARS, max_overrun))
        num_chars -= len(piece)
        yield piece


def _line_documents(file: _TextFile, split: Split, skip: OnSkip) -> Iterator[str]:
    with _open(file.path) as lines:
        for index, line in enumerate(lines):
            if _split_of_record(file.name, index) != split or not line.strip():
                continue
            try:
                yield _checked_text(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                skip(f"{file.name}:{index + 1}", str(error))


def _checked_text(record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError('no string "text"')
    text.encode()  # JSON can spell lone surrogates, which are no text: UnicodeEncodeError is a ValueError
    return text


def _hub_documents(data: str, split: Split, skip: OnSkip) -> Iterator[str]:
    name, _, config = data.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f'{data}: datasets is not installed; run: pip install "pkmem[hub]"') from error
    try:
        names = datasets.get_dataset_split_names(name, config or None)
        source = split if split in names else "train"
        rows = datasets.load_dataset(name, config or None, split=source, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{data}: cannot open this dataset; check its name and the network: {reason}") from error
    return _hub_rows(data, rows, None if "validation" in names else split, skip)


def _hub_rows(data: str, rows: Iterable[dict], split: Split | None, skip: OnSkip) -> Iterator[str]:
    for index, row in enumerate(rows):
        if "text" not in row:
            raise ValueError(f"{data}: its rows have no field 'text' but {sorted(row)}; choose another dataset")
        if split is not None and _split_of_record(data, index) != split:
            continue
        try:
            yield _checked_text(row)
        except ValueError as error:
            skip(f"{data}:{index}", str(error))


# Files -------------------------------------------------------------------------------------------------------


def _open_text(path: Path) -> IO[str]:
    # newline="\n": nothing is translated, and lines end at "\n" alone.
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")


def _open(path: Path) -> io.BufferedReader:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".bz2":
            return io.BufferedReader(bz2.open(path))
        case ".zst":
            return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed .zst, in which a truncated file is an error: zstandard's own reader takes it for the end."""

    def __init__(self, path: Path) -> None:
        self._chunks = _zstd_chunks(path)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        num_bytes = min(len(buffer), len(self._rest))
        buffer[:num_bytes] = self._rest[:num_bytes]
        self._rest = self._rest[num_bytes:]
        return num_bytes

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _zstd_chunks(path: Path) -> Generator[bytes, None, None]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(f'{path}: zstandard is not installed; run: pip install "pkmem[lm]"') from error
    frame = None
    with path.open("rb") as file:
        while compressed := file.read(io.DEFAULT_BUFFER_SIZE):
            while compressed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(compressed)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                compressed = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("compressed file ended before the end-of-stream marker was reached")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once all of it is on disk, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Tokenizer ---------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer learned from texts; the same texts give the same tokenizer.

    It has no unknown token: `decode(encode(text)) == text` for any text. Its one special token, "<|endoftext|>",
    stands for beginning, end and padding.

    Args:
        texts: what to learn from, read once.
        vocab_size: tokens wanted, at least 257: every byte and the special token. Few texts may give fewer.

    Returns:
        A Hugging Face tokenizer, ready for `save_pretrained`.

    Raises:
        ValueError: `vocab_size` is below 257.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size is {vocab_size}; every byte and one special token need {len(alphabet) + 1}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


# Tokens on disk ----------------------------------------------------------------------------------------------


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
    data: str,
    split: Split,
    tokenizer: "PreTrainedTokenizerFast",
    cache_dir: Path | None = None,
    progress: bool = True,
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
        ValueError: nothing to read, as in `read_documents`, or the tokenizer has no eos token.
    """
    from tqdm import tqdm

    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to end documents with; set tokenizer.eos_token")
    encoder = _Encoder(tokenizer)
    key, total_bytes = _fingerprint(data, split, encoder)
    path = (cache_dir or _default_cache_dir()) / f"{key}.{encoder.dtype}"
    if cached := _read_cached(path):
        return cached
    bar = tqdm(desc=f"tokenize {split}", total=total_bytes, unit="B", unit_scale=True, disable=not progress)
    return _write_tokens(path, data, split, encoder, bar)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("PKMEM_CACHE") or Path.home() / ".cache" / "pkmem" / "tokens")


class _Encoder:
    """Texts to tokens, each closed by the end-of-text token, without a tokenizer's truncation, padding or templates."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
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
        cached = TokenFile(path, **json.loads(path.with_suffix(".json").read_text()))
        is_whole = path.stat().st_size == cached.num_tokens * np.dtype(path.suffix[1:]).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return cached if is_whole else None


def _write_tokens(path: Path, data: str, split: Split, encoder: _Encoder, bar: "tqdm") -> TokenFile:
    num_tokens = num_bytes = num_documents = num_skipped = 0

    def skip(_name: str, _reason: str) -> None:
        nonlocal num_skipped
        num_skipped += 1

    numbers_path = path.with_suffix(".json")
    with bar, _replacing(path) as file:
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
    with _replacing(numbers_path) as file:
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


# Blocks ------------------------------------------------------------------------------------------------------


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of consecutive tokens, read from disk one at a time.

    For evaluation (`num_blocks` is None) they are all blocks, once, in order. For training they are `num_blocks`
    blocks, epoch after epoch: an epoch takes the tokens as a ring, cuts it from a start of its own into blocks that
    do not overlap, and shuffles them. Block i depends on the seed and i alone, so a run that is resumed at block i
    reads on exactly as if it had never stopped. The tokens left over, less than a block, are dropped.

    Args:
        tokens: what `tokenize` returns.
        block_tokens: tokens per block.
        num_blocks: blocks of a whole training run; None for all blocks once.
        seed: of the starts and the shuffles.

    Raises:
        ValueError: a number is below 1, the seed below 0, or the file holds less than one block.
    """

    def __init__(self, tokens: TokenFile, block_tokens: int, num_blocks: int | None = None, seed: int = 0) -> None:
        if block_tokens < 1 or (num_blocks is not None and num_blocks < 1) or seed < 0:
            raise ValueError(
                f"block_tokens {block_tokens} and num_blocks {num_blocks} must be at least 1, seed {seed} at least 0"
            )
        if tokens.num_tokens < block_tokens:
            raise ValueError(
                f"the text has {tokens.num_tokens} tokens and a block needs {block_tokens}; "
                "use shorter blocks (context_tokens) or give more data"
            )
        self._arguments = (tokens, block_tokens, num_blocks, seed)
        self._tokens = tokens.tokens()
        self._block_tokens = block_tokens
        self._blocks_per_epoch = tokens.num_tokens // block_tokens
        self._num_blocks = num_blocks
        self._seed = seed
        self._epoch = -1  # whose order is held; the order is a function of it, so this changes no block

    def __reduce__(self) -> tuple:
        # A pickled memmap would carry all tokens to each worker of a DataLoader.
        return type(self), self._arguments

    def __len__(self) -> int:
        return self._blocks_per_epoch if self._num_blocks is None else self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index`: its `input_ids`, (block_tokens,) int64, and `labels` equal to them.

        Raises:
            IndexError: `index` is outside [0, len(self)).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} is outside [0, {len(self)})")
        start = index * self._block_tokens if self._num_blocks is None else self._shuffled_start(index)
        block = self._tokens.take(np.arange(start, start + self._block_tokens), mode="wrap")
        input_ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def _shuffled_start(self, index: int) -> int:
        epoch, place = divmod(index, self._blocks_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._offset = int(rng.integers(len(self._tokens)))
            self._order = rng.permutation(self._blocks_per_epoch)
            self._epoch = epoch
        return self._offset + int(self._order[place]) * self._block_tokens
