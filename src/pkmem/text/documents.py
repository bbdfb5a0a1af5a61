"""The documents of a text, streamed, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, get_args

from pkmem.text.examples import Example, example_of, text_of
from pkmem.text.files import UNREADABLE, TextFile, find_files, open_bytes, open_text
from pkmem.text.synthetic import SYNTHETIC, SyntheticFacts

Split = Literal["train", "validation"]
OnSkip = Callable[[str, str], None]

ONE_IN = 20  # one document in so many is validation: 5 %
MIN_FILES_TO_HASH = 100  # of fewer, a hash may well choose none for validation
PIECE_CHARS = 1 << 16


def read_documents(data: str, split: Split, on_skip: OnSkip | None = None) -> Iterator[str]:
    """The documents of one split as plain text: see `read_examples`, which says in what form they are given."""
    return map(text_of, read_examples(data, split, on_skip))


def read_examples(data: str, split: Split, on_skip: OnSkip | None = None) -> Iterator[Example]:
    """The documents of one split, streamed in an order that depends on the data only.

    About one document in twenty is validation: by the hash of a file's relative path, or of a line's place in its
    .jsonl file. Of fewer than a hundred text files, each is split in its text instead: its last twentieth is
    validation. A text file longer than 64 Ki characters gives several documents, cut at line ends.

    A line of a .jsonl file and a row of a dataset hold "messages", or "prompt" and "completion", or "text"; the first
    of these that is there is read (`pkmem.text.examples`). A line with none of them is skipped, and so is a file that
    cannot be read (not UTF-8, broken compression); empty documents are left out.

    Args:
        data: "python", the standard library of this Python without its tests; "python+", the same and the sources
            of torch, sympy, numpy and networkx; "hf:NAME" or "hf:NAME:CONFIG", a dataset of the Hugging Face Hub,
            streamed; "synthetic:facts:NUM" or "synthetic:facts:NUM:SEED", that many made-up facts
            (`pkmem.text.synthetic`); or a file, a directory (searched recursively, without hidden files) or a glob
            of .txt, .md, .py and .jsonl, each also with .gz, .bz2 or .zst.
        split: "train" or "validation". A Hub dataset's own validation split is used where it has one.
        on_skip: called with the name of what is skipped and the reason.

    Returns:
        The documents, none of them empty.

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

    documents = _choose(data, split, skip)

    def not_empty() -> Iterator[Example]:
        is_empty = True
        for document in documents:
            if text_of(document).strip():
                is_empty = False
                yield document
        if is_empty:
            raise ValueError(
                f"{data}: no text for the {split} split; give more documents or longer files{''.join(skipped)}"
            )

    return not_empty()


def _choose(data: str, split: Split, skip: OnSkip) -> Iterator[Example]:
    if data.startswith(SYNTHETIC):
        return SyntheticFacts.named(data).documents(held_out=split == "validation")
    if data.startswith("hf:"):
        return _hub_documents(data, split, skip)
    return _file_documents(find_files(data), split, skip)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "little")


def _split_of_file(name: str) -> Split:
    return "validation" if _hash(name) % ONE_IN == 0 else "train"


def _split_of_record(name: str, index: int) -> Split:
    """One record of each twenty in a row is validation: a short file has some too."""
    return "validation" if index % ONE_IN == _hash(f"{name}:{index // ONE_IN}") % ONE_IN else "train"


def _file_documents(files: list[TextFile], split: Split, skip: OnSkip) -> Iterator[Example]:
    split_within = sum(not file.is_json_lines for file in files) < MIN_FILES_TO_HASH
    for file in files:
        try:
            if file.is_json_lines:
                yield from _line_documents(file, split, skip)
            elif split_within:
                yield from _text_documents(file.path, split)
            elif _split_of_file(file.name) == split:
                yield from _text_documents(file.path)
        except UNREADABLE as error:
            skip(file.name, str(error))


def _text_documents(path: Path, part: Split | None = None) -> Iterator[str]:
    """A text file's pieces: all, or those of one part, where the validation part is its last twentieth."""
    with open_text(path) as file:
        # Reading to the end first also finds a broken file before any piece of it is used.
        num_chars = sum(len(chunk) for chunk in iter(lambda: file.read(PIECE_CHARS), ""))
    num_validation = 0 if part is None else -(-num_chars // ONE_IN)
    with open_text(path) as file:
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


def _line_documents(file: TextFile, split: Split, skip: OnSkip) -> Iterator[Example]:
    with open_bytes(file.path) as lines:
        for index, line in enumerate(lines):
            if _split_of_record(file.name, index) != split or not line.strip():
                continue
            try:
                yield example_of(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                skip(f"{file.name}:{index + 1}", str(error))


def _hub_documents(data: str, split: Split, skip: OnSkip) -> Iterator[Example]:
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


def _hub_rows(data: str, rows: Iterable[dict], split: Split | None, skip: OnSkip) -> Iterator[Example]:
    for index, row in enumerate(rows):
        if not {"text", "messages", "completion"} & row.keys():
            raise ValueError(
                f"{data}: its rows have no field 'text', 'messages' or 'completion' but {sorted(row)}; "
                "choose another dataset"
            )
        if split is not None and _split_of_record(data, index) != split:
            continue
        try:
            yield example_of(row)
        except ValueError as error:
            skip(f"{data}:{index}", str(error))
