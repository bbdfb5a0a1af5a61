"""text/documents.py on real files: formats, splits, what is skipped, what is refused."""

import gzip
import json
import os
import pickle
import shutil
import sys

import pytest

from pkmem.text import documents, read_documents, tokenize
from texts import COMPRESS, STORY, broken_files, json_lines, read, read_skipping, write

pytest_plugins = "texts"

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
    assert len(pieces) == len(content) * 95 // 100 // documents.PIECE_CHARS + 1
    assert all(piece.endswith("\n") for piece in pieces)
    assert max(map(len, pieces)) < documents.PIECE_CHARS + 100
    validation = read(tmp_path / "book.txt", "validation")
    assert "".join(pieces + validation) == content
    assert 0.049 < sum(map(len, validation)) / len(content) <= 0.05


@pytest.mark.parametrize("num_chars", [2, 20, 1000, 300_000])
def test_a_file_of_one_line_has_both_splits(tmp_path, num_chars):
    content = "é" * num_chars
    path = write(tmp_path / "line.txt", content)
    train, validation = read(path, "train"), read(path, "validation")
    assert "".join(train + validation) == content
    assert max(map(len, train + validation)) <= 2 * documents.PIECE_CHARS


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


# What is skipped


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
        ("text.gz", gzip.compress(b"x", mtime=0), r"'\.gz'.*\.jsonl"),
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


# The standard library and the Hub


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
    with pytest.raises(ValueError, match=r"no field 'text', 'messages' or 'completion' but \['body', 'id'\]"):
        list(read_documents(f"hf:{tmp_path / 'body'}", "train"))
    with pytest.raises(ValueError, match="cannot open this dataset; check its name and the network") as error:
        read_documents(f"hf:{tmp_path / 'nowhere'}", "train")
    assert "\n" not in str(error.value)
