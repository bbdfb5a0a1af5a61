"""text.py on real files: formats, splits, what is skipped, what is refused; the tokenizer; the cache; the blocks."""

import bz2
import gzip
import importlib.util
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pkmem import text as pkmem_text
from pkmem.text import END_OF_TEXT, TokenBlocks, TokenFile, read_documents, tokenize, train_tokenizer

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
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


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([STORY], 400)


# Formats and splits


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".md", ".py", ".TXT"])
def test_a_single_text_file_is_split_in_its_text(tmp_path, ending, compression):
    path = write(tmp_path / f"story{ending}", STORY, compression)
    train, validation = "".join(read(path, "train")), "".join(read(path, "validation"))
    assert train + validation == STORY
    assert train.endswith("\n")
    assert 0.03 < len(validation) / len(STORY) <= 0.05


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_lines_give_a_document_per_line(tmp_path, compression):
    texts = [f"document {n}\nof two lines, é🙂" for n in range(60)]
    path = write(tmp_path / "data.jsonl", json_lines(texts), compression)
    train, validation = read(path, "train"), read(path, "validation")
    assert len(validation) == 3
    assert sorted(train + validation) == sorted(texts)


def test_a_large_file_is_read_in_pieces_cut_at_line_ends(tmp_path):
    content = STORY * 40
    pieces = read(write(tmp_path / "book.txt", content), "train")
    assert len(pieces) == len(content) * 95 // 100 // pkmem_text.PIECE_CHARS + 1
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) < pkmem_text.PIECE_CHARS + 100
    validation = read(tmp_path / "book.txt", "validation")
    assert "".join(pieces + validation) == content
    assert 0.049 < sum(map(len, validation)) / len(content) <= 0.05


@pytest.mark.parametrize("num_chars", [2, 20, 1000, 300_000])
def test_a_file_of_one_line_has_both_splits(tmp_path, num_chars):
    content = "é" * num_chars
    path = write(tmp_path / "line.txt", content)
    train, validation = read(path, "train"), read(path, "validation")
    assert "".join(train + validation) == content
    assert max(map(len, train + validation)) <= 2 * pkmem_text.PIECE_CHARS


def test_a_few_files_are_each_split_in_their_text(tmp_path):
    for name in ("a.txt", "b.md"):
        write(tmp_path / name, f"{name}\n" + STORY)
    train, validation = read(tmp_path, "train"), read(tmp_path, "validation")
    assert [text[:5] for text in train] == ["a.txt", "b.md\n"]
    assert [a + b for a, b in zip(train, validation, strict=True)] == ["a.txt\n" + STORY, "b.md\n" + STORY]


def test_many_files_are_split_by_the_hash_of_their_names(tmp_path):
    names = {f"{n % 7}/{n}.txt" for n in range(400)}
    for name in names:
        write(tmp_path / "here" / name, name)
    train, validation = read(tmp_path / "here", "train"), read(tmp_path / "here", "validation")
    assert len(train) + len(validation) == 400
    assert {*train, *validation} == names
    assert 8 <= len(validation) <= 34
    shutil.move(tmp_path / "here", tmp_path / "there")
    write(tmp_path / "there" / "0" / "another.txt", "another")
    assert [text for text in read(tmp_path / "there", "train") if text != "another"] == train
    assert [text for text in read(tmp_path / "there", "validation") if text != "another"] == validation


def test_lines_stay_in_their_split_when_others_are_appended(tmp_path):
    texts = [f"document {n}" for n in range(100)]
    path = write(tmp_path / "data.jsonl", json_lines(texts[:50]))
    before = read(path, "validation")
    write(path, json_lines(texts))
    assert read(path, "validation")[: len(before)] == before
    assert len(read(path, "validation")) == 5


def test_lines_of_different_files_are_split_apart(tmp_path):
    texts = [str(n) for n in range(400)]
    chosen = {tuple(read(write(tmp_path / f"{n}.jsonl", json_lines(texts)), "validation")) for n in range(3)}
    assert len(chosen) == 3


def test_a_directory_is_read_in_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md.gz", "c.py", ".hidden.txt", ".git/x.txt", "weights.bin", "notes"):
        write(tmp_path / name, gzip.compress(name.encode()) if name.endswith("gz") else name)
    train, validation = read(tmp_path, "train"), read(tmp_path, "validation")
    assert [a + b for a, b in zip(train, validation, strict=True)] == ["a/z.md.gz", "b.txt", "c.py"]


def test_a_glob_chooses_files(tmp_path, monkeypatch):
    for name in ("one/a.txt", "one/b.md", "two/c.txt", "d.txt"):
        write(tmp_path / name, name + "\n" + STORY)
    assert [text.split()[0] for text in read(tmp_path / "*" / "*.txt", "train")] == ["one/a.txt", "two/c.txt"]
    monkeypatch.chdir(tmp_path)
    assert [text.split()[0] for text in read("**/[cd].txt", "train")] == ["d.txt", "two/c.txt"]


def test_a_file_named_in_full_is_read_whatever_its_name(tmp_path):
    for name in ("book[1].txt", ".secret.txt"):
        assert "".join(read(write(tmp_path / name, STORY), "train")) in STORY


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "bom.txt", b"\xef\xbb\xbf" + STORY.encode()), "train")[0].startswith("Line 0")
    assert len(read(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + json_lines(["x"] * 20).encode()), "train")) == 19


def test_zstandard_frames_follow_each_other(tmp_path):
    half = len(STORY) // 2
    frames = zstandard.compress(STORY[:half].encode()) + zstandard.compress(STORY[half:].encode())
    path = write(tmp_path / "frames.txt.zst", frames)
    assert "".join(read(path, "train") + read(path, "validation")) == STORY


# What is skipped


def broken_files() -> dict[str, bytes]:
    content = os.urandom(30_000).hex().encode()
    halves = {f"half.txt{ending}": COMPRESS[ending](content)[:-9000] for ending in (".gz", ".bz2", ".zst")}
    garbage = {f"garbage.txt{ending}": b"certainly not compressed" for ending in (".gz", ".bz2", ".zst")}
    late = {"late.txt": STORY.encode() * 20 + b"\xff", "latin.py": "# déjà\n".encode("latin-1")}
    return halves | garbage | late


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_broken_file_is_skipped_whole(tmp_path, split):
    broken = broken_files()
    for name, content in broken.items():
        write(tmp_path / name, content)
    write(tmp_path / "good.txt", STORY)
    texts, skipped = read_skipping(tmp_path, split)
    assert skipped.keys() == broken.keys()
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert len(texts) == 1
    assert texts[0] in STORY


def test_a_broken_line_is_skipped_alone(tmp_path):
    broken = [b"not json", b'["text"]', b'{"txt": "x"}', b'{"text": 1}', b'{"text": "\\ud800"}', b'{"text": "\xff"}']
    broken += [b"[" * 100_000]
    lines = [json.dumps({"text": f"good {n}"}).encode() for n in range(33)]
    write(tmp_path / "data.jsonl", b"\n".join(broken + lines))
    results = [read_skipping(tmp_path, split) for split in ("train", "validation")]
    assert sum(len(texts) for texts, _ in results) == 33
    assert {*results[0][1], *results[1][1]} == {f"data.jsonl:{n + 1}" for n in range(len(broken))}


def test_a_truncated_archive_of_lines_gives_what_came_before(tmp_path):
    texts = [os.urandom(500).hex() for _ in range(100)]
    write(tmp_path / "cut.jsonl.gz", gzip.compress(json_lines(texts).encode())[:-9000])
    read_texts, skipped = read_skipping(tmp_path)
    assert list(skipped) == ["cut.jsonl.gz"]
    assert 10 < len(read_texts) < 95
    assert set(read_texts) < set(texts)


def test_empty_documents_are_left_out_and_not_counted(tmp_path):
    write(tmp_path / "data.jsonl", json_lines(["", " \n\t"] + ["x"] * 58) + "\n\n")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.txt", "\n\n   \n" * 100)
    texts = read(tmp_path, "train") + read(tmp_path, "validation")
    assert texts == ["x"] * 58


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "model.pkl",
            pickle.dumps([1]),
            r"cannot read a '\.pkl' file as text; read are \.txt \.md \.py \.jsonl.*\.zst",
        ),
        ("model.pt", b"x", r"'\.pt'.*\.jsonl"),
        ("array.npy", b"x", r"'\.npy'.*\.jsonl"),
        ("noending", b"x", r"'noending'.*\.jsonl"),
        ("text.gz", gzip.compress(b"x"), r"'\.gz'.*\.jsonl"),
        ("empty.txt", b"", r"empty\.txt: no text for the train split; give more documents or longer files$"),
        ("latin.txt", b"\xff" * 90, r"no text for the train split.*skipped latin\.txt: 'utf-8' codec"),
        ("fields.jsonl", b'{"body": "x"}\n' * 90, r"no text for the train split.*skipped fields\.jsonl:1: no .*text"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        list(read_documents(str(write(tmp_path / name, content)), "train"))
    assert "\n" not in str(error.value)


def test_a_validation_split_without_text_is_refused(tmp_path):
    texts = ["x"] * 19
    names = [write(tmp_path / f"{n}.jsonl", json_lines(texts)) for n in range(400)]
    without = next(name for name in names if len(read(name, "train")) == 19)
    with pytest.raises(ValueError, match="no text for the validation split; give more documents"):
        list(read_documents(str(without), "validation"))


def test_a_place_without_files_is_refused_before_iterating(tmp_path):
    write(tmp_path / "weights.bin", b"x")
    for data in (tmp_path, tmp_path / "*.bin", tmp_path / "*.txt", tmp_path / "nowhere" / "*.txt"):
        with pytest.raises(ValueError, match=r"no file to read there; read are \.txt \.md \.py \.jsonl"):
            read_documents(str(data), "train")
    for missing in (str(tmp_path / "missing.txt"), ""):
        with pytest.raises(ValueError, match=r"no such file or directory; give one, a glob, 'python'"):
            read_documents(missing, "train")
    with pytest.raises(ValueError, match="split is 'test'; it must be 'train' or 'validation'"):
        read_documents(str(tmp_path), "test")


def test_missing_zstandard_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "story.txt", STORY, ".zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r'zstandard is not installed; run: pip install "pkmem\[lm\]"'):
        list(read_documents(str(path), "train"))


# The standard library and the Hub


def test_the_standard_library_is_there_without_its_tests():
    files = pkmem_text._find_files("python")
    names = [file.name for file in files]
    assert {"json/decoder.py", "collections/__init__.py", "asyncio/tasks.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert names == sorted(names)
    train, validation = read("python", "train"), read("python", "validation")
    num_bytes = [sum(len(text.encode()) for text in texts) for texts in (train, validation)]
    assert sum(num_bytes) > 8_000_000
    assert 0.01 < num_bytes[1] / sum(num_bytes) < 0.1
    assert not set(train) & set(validation)


def test_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    write(tmp_path / "corpus_probe" / "__init__.py", "raise RuntimeError('imported')\n")
    write(tmp_path / "corpus_probe" / "tests" / "test_it.py", "raise RuntimeError('a test')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pkmem_text, "CORPUS_PACKAGES", ("corpus_probe",))
    names = [file.name for file in pkmem_text._find_files("python+")]
    assert names[-1] == "corpus_probe/__init__.py"
    assert names[:-1] == [file.name for file in pkmem_text._find_files("python")]
    assert "corpus_probe" not in sys.modules


def test_a_missing_package_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "networkx" else find_spec(name))
    with pytest.raises(ValueError, match=r'networkx is not installed; run: pip install "pkmem\[corpus\]"'):
        read_documents("python+", "train")


def test_missing_datasets_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'hf:name: datasets is not installed; run: pip install "pkmem\[hub\]"'):
        read_documents("hf:name", "train")


def test_a_hub_dataset_is_streamed(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    texts = [f"document {n}" for n in range(60)]
    write(tmp_path / "plain" / "train.jsonl", json_lines(texts))
    plain = f"hf:{tmp_path / 'plain'}"
    assert len(read(plain, "validation")) == 3
    assert sorted(read(plain, "train") + read(plain, "validation")) == sorted(texts)
    tokens = tokenize(plain, "train", tokenizer, tmp_path / "cache", progress=False)
    assert tokens.num_documents == 57
    assert tokenize(plain, "train", tokenizer, tmp_path / "cache", progress=False) == tokens
    assert tokenize(plain, "validation", tokenizer, tmp_path / "cache", progress=False).num_documents == 3

    write(tmp_path / "own" / "train.jsonl", json_lines(texts))
    write(tmp_path / "own" / "validation.jsonl", json_lines(["held out"]))
    assert read(f"hf:{tmp_path / 'own'}", "train") == texts
    assert read(f"hf:{tmp_path / 'own'}:default", "validation") == ["held out"]

    write(tmp_path / "body" / "train.jsonl", '{"body": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"no field 'text' but \['body', 'id'\]"):
        list(read_documents(f"hf:{tmp_path / 'body'}", "train"))
    with pytest.raises(ValueError, match="cannot open this dataset; check its name and the network") as error:
        read_documents(f"hf:{tmp_path / 'nowhere'}", "train")
    assert "\n" not in str(error.value)


# Tokenizer


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(st.sampled_from(["<|", "endoftext", "|>", " ", "\n", "é", " the", ","])).map("".join))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_depends_on_the_texts_alone(tokenizer):
    assert train_tokenizer([STORY], 400).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer([STORY[::-1]], 400).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


def test_one_special_token_ends_begins_and_pads(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    assert tokenizer.eos_token_id not in tokenizer.encode("The quick brown fox")
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2


def test_a_tokenizer_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert all(loaded.decode(loaded.encode(text)) == text for text in HOSTILE)
    assert loaded.encode(STORY) == tokenizer.encode(STORY)


def test_every_byte_needs_a_token():
    assert len(train_tokenizer([], 257)) == 257
    with pytest.raises(ValueError, match="vocab_size is 256; every byte and one special token need 257"):
        train_tokenizer([], 256)


# Token files


@pytest.fixture
def corpus(tmp_path):
    texts = [*HOSTILE, *(f"{n}: {STORY[n : 3 * n]}" for n in range(300))]
    return write(tmp_path / "corpus" / "data.jsonl", json_lines(texts)).parent


def test_tokens_are_those_of_each_document_and_an_end(corpus, tmp_path, tokenizer):
    for split in ("train", "validation"):
        tokens = tokenize(str(corpus), split, tokenizer, tmp_path / "cache", progress=False)
        texts = read(corpus, split)
        plain = [tokenizer.encode(text, split_special_tokens=True) for text in texts]
        assert tokens.tokens().tolist() == [token for ids in plain for token in (*ids, tokenizer.eos_token_id)]
        assert tokens.tokens().dtype == np.uint16
        assert tokens.num_tokens == len(tokens.tokens())
        assert tokens.num_documents == len(texts) == tokens.tokens().tolist().count(tokenizer.eos_token_id)
        assert tokens.num_bytes == sum(len(text.encode()) for text in texts)
        assert tokens.bytes_per_token == tokens.num_bytes / tokens.num_tokens
        assert tokens.num_skipped == 0


def test_tokens_are_read_only_and_the_folder_is_clean(corpus, tmp_path, tokenizer):
    tokens = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    with pytest.raises(ValueError, match="read-only"):
        tokens.tokens()[0] = 1
    assert Counter(path.suffix for path in (tmp_path / "cache").iterdir()) == {".uint16": 1, ".json": 1}


def test_encoding_goes_on_across_batches(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "book.txt", STORY)
    whole = tokenize(str(path), "train", tokenizer, tmp_path / "one", progress=False)
    monkeypatch.setattr(pkmem_text, "PIECE_CHARS", 900)
    pieces = tokenize(str(path), "train", tokenizer, tmp_path / "two", progress=False)
    monkeypatch.setattr(pkmem_text, "BATCH_CHARS", 2000)
    batches = tokenize(str(path), "train", tokenizer, tmp_path / "three", progress=False)
    assert batches.tokens().tolist() == pieces.tokens().tolist()
    assert batches.num_documents > 20
    assert whole.num_bytes == pieces.num_bytes == batches.num_bytes


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range((1 << 16) + 1)} | {END_OF_TEXT: (1 << 16) + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    path = write(tmp_path / "data.jsonl", json_lines(["w65536 w7"] * 20))
    tokens = tokenize(str(path), "validation", large, tmp_path / "cache", progress=False)
    assert tokens.tokens().dtype == np.uint32
    assert tokens.tokens().tolist() == [65536, 7, 65537]


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(corpus, tmp_path, tokenizer):
    expected = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    cutting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=8)
    assert tokenize(str(corpus), "train", cutting, tmp_path / "cache", progress=False) == expected
    assert cutting.backend_tokenizer.truncation["max_length"] == 5


def test_a_tokenizer_without_an_end_is_refused(corpus, tmp_path, tokenizer):
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no eos token"):
        tokenize(str(corpus), "train", endless, tmp_path, progress=False)


def test_the_cache_is_used(corpus, tmp_path, tokenizer, monkeypatch):
    first = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    monkeypatch.setattr(pkmem_text._Encoder, "__call__", None)  # whoever encodes again fails
    assert tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False) == first
    shutil.move(corpus, tmp_path / "moved")
    assert tokenize(str(tmp_path / "moved"), "train", tokenizer, tmp_path / "cache", progress=False) == first


@pytest.mark.parametrize("damage", ["truncated", "longer", "no numbers", "half numbers", "other numbers", "no tokens"])
def test_a_damaged_cache_is_rebuilt(corpus, tmp_path, tokenizer, damage):
    first = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    expected, numbers = first.path.read_bytes(), first.path.with_suffix(".json")
    match damage:
        case "truncated":
            os.truncate(first.path, len(expected) // 2)
        case "longer":
            first.path.write_bytes(expected + b"xx")
        case "no tokens":
            first.path.unlink()
        case "no numbers":
            numbers.unlink()
        case "half numbers":
            numbers.write_text(numbers.read_text()[:20])
        case "other numbers":
            numbers.write_text('{"num_tokens": null}')
    assert tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False) == first
    assert first.path.read_bytes() == expected
    assert json.loads(numbers.read_text())["num_tokens"] == first.num_tokens


def test_other_contents_splits_and_tokenizers_have_their_own_tokens(tmp_path, tokenizer):
    path = write(tmp_path / "book.txt", STORY)

    def token_path(split="train", by=tokenizer):
        return tokenize(str(path), split, by, tmp_path / "cache", progress=False).path

    paths = [token_path(), token_path("validation"), token_path(by=train_tokenizer([STORY], 300))]
    write(path, STORY.replace("Line 7", "line 7"))
    paths += [token_path()]
    write(tmp_path / "two" / "book.txt", STORY)
    write(tmp_path / "two" / "none.txt", b"\xff")
    path = tmp_path / "two"
    paths += [token_path()]  # the same documents, but one file skipped
    assert len(set(paths)) == 5


def test_where_a_document_ends_is_part_of_the_contents(tmp_path, tokenizer):
    paths = set()
    for texts in (["ab", "c"], ["a", "bc"]):
        path = write(tmp_path / "data.jsonl", json_lines(texts))
        assert read(path, "train") == texts
        paths.add(tokenize(str(path), "train", tokenizer, tmp_path / "cache", progress=False).path)
    assert len(paths) == 2


def test_what_is_skipped_is_counted_once(tmp_path, tokenizer):
    for name, content in broken_files().items():
        write(tmp_path / "corpus" / name, content)
    write(tmp_path / "corpus" / "good.txt", STORY)
    tokens = tokenize(str(tmp_path / "corpus"), "train", tokenizer, tmp_path / "cache", progress=False)
    assert tokens.num_skipped == len(broken_files())
    assert tokens.num_documents == 1


def test_an_interrupted_tokenization_leaves_nothing_behind(corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(pkmem_text, "BATCH_CHARS", 1000)
    encode, num_calls = pkmem_text._Encoder.__call__, 0

    def interrupted(self, texts):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(pkmem_text._Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_numbers_never_stand_beside_other_tokens(corpus, tmp_path, tokenizer, monkeypatch):
    first = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    os.truncate(first.path, 0)
    monkeypatch.setattr(pkmem_text, "asdict", None)  # the rebuild fails between its tokens and their numbers
    with pytest.raises(TypeError):
        tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == [first.path]


def test_the_cache_folder_comes_from_the_environment(corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PKMEM_CACHE", str(tmp_path / "elsewhere"))
    assert tokenize(str(corpus), "train", tokenizer, progress=False).path.parent == tmp_path / "elsewhere"
    monkeypatch.delenv("PKMEM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    home_cache = tmp_path / ".cache" / "pkmem" / "tokens"
    assert tokenize(str(corpus), "train", tokenizer, progress=False).path.parent == home_cache


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_request(corpus, tmp_path, tokenizer, capsys, progress):
    tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=progress)
    output = capsys.readouterr()
    assert ("tokenize train: 100%" in output.err) == progress
    assert output.out == ""


# Blocks


def counting_tokens(tmp_path: Path, num_tokens: int) -> TokenFile:
    """Every token its own position."""
    path = tmp_path / f"{num_tokens}.uint32"
    np.arange(num_tokens, dtype=np.uint32).tofile(path)
    return TokenFile(path, num_tokens, num_bytes=num_tokens, num_documents=1, num_skipped=0)


def blocks_of(blocks: TokenBlocks, indices) -> list[list[int]]:
    return [blocks[index]["input_ids"].tolist() for index in indices]


def test_evaluation_blocks_cover_the_text_in_order(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 107), 10)
    assert len(blocks) == 10
    assert list(chain(*blocks_of(blocks, range(10)))) == list(range(100))
    assert len(list(blocks)) == 10
    item = blocks[3]
    assert item.keys() == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    item["labels"][0] = -100
    assert item["input_ids"][0] == 30


@pytest.mark.parametrize("num_tokens", [10, 19, 100, 107])
def test_an_epoch_reads_no_token_twice_and_drops_less_than_a_block(tmp_path, num_tokens):
    per_epoch = num_tokens // 10
    blocks = TokenBlocks(counting_tokens(tmp_path, num_tokens), 10, num_blocks=3 * per_epoch)
    for epoch in range(3):
        read_blocks = blocks_of(blocks, range(epoch * per_epoch, (epoch + 1) * per_epoch))
        assert all(block == [(block[0] + n) % num_tokens for n in range(10)] for block in read_blocks)
        tokens = list(chain(*read_blocks))
        assert len(set(tokens)) == len(tokens) == 10 * per_epoch


def test_epochs_differ_in_cuts_and_order(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 1000), 10, num_blocks=400)
    starts = [block[0] for block in blocks_of(blocks, range(400))]
    epochs = [starts[first : first + 100] for first in range(0, 400, 100)]
    assert len({start % 10 for epoch in epochs for start in epoch}) > 1
    assert all(epoch != sorted(epoch) for epoch in epochs)
    orders = [[(start - min(epoch)) // 10 for start in epoch] for epoch in epochs]
    assert len({tuple(order) for order in orders}) == 4


def test_a_block_depends_on_seed_and_index_alone(tmp_path):
    tokens = counting_tokens(tmp_path, 500)
    straight = blocks_of(TokenBlocks(tokens, 10, num_blocks=170), range(170))
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170), range(120, 170)) == straight[120:]
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170), reversed(range(170))) == straight[::-1]
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=900), range(170)) == straight
    assert blocks_of(TokenBlocks(tokens, 10, num_blocks=170, seed=1), range(170)) != straight


def test_blocks_travel_to_workers_without_their_tokens(tmp_path):
    blocks = TokenBlocks(counting_tokens(tmp_path, 100_000), 10, num_blocks=50)
    before = blocks_of(blocks, range(50))
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 2000
    assert blocks_of(pickle.loads(pickled), range(50)) == before


def test_too_short_a_text_is_refused_with_its_fixes(tmp_path):
    message = "a block needs 10; use shorter blocks .context_tokens. or give more data"
    with pytest.raises(ValueError, match=message):
        TokenBlocks(counting_tokens(tmp_path, 9), 10)
    assert blocks_of(TokenBlocks(counting_tokens(tmp_path, 9), 9), [0]) == [list(range(9))]


@pytest.mark.parametrize("arguments", [{"block_tokens": 0}, {"num_blocks": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="at least"):
        TokenBlocks(counting_tokens(tmp_path, 100), **{"block_tokens": 10, **arguments})


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(tmp_path, index):
    with pytest.raises(IndexError, match=rf"block {index} is outside \[0, 10\)"):
        TokenBlocks(counting_tokens(tmp_path, 100), 10)[index]
