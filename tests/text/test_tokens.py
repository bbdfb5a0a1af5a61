"""text/tokens.py on real files: tokens, counts, and a cache that is never wrong."""

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from pkmem.text import END_OF_TEXT, documents, tokenize, train_tokenizer
from pkmem.text import tokens as token_files
from texts import HOSTILE, STORY, broken_files, json_lines, read, write

pytest_plugins = "texts"


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
    monkeypatch.setattr(documents, "PIECE_CHARS", 900)
    pieces = tokenize(str(path), "train", tokenizer, tmp_path / "two", progress=False)
    monkeypatch.setattr(token_files, "BATCH_CHARS", 2000)
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
    monkeypatch.setattr(token_files.Encoder, "__call__", None)  # whoever encodes again fails
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
    monkeypatch.setattr(token_files, "BATCH_CHARS", 1000)
    encode, num_calls = token_files.Encoder.__call__, 0

    def interrupted(self, texts):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(token_files.Encoder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_numbers_never_stand_beside_other_tokens(corpus, tmp_path, tokenizer, monkeypatch):
    first = tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)
    os.truncate(first.path, 0)
    monkeypatch.setattr(token_files, "asdict", None)  # the rebuild fails between its tokens and their numbers
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


@pytest.mark.case("Environments", "no home folder to keep tokens in", "refused: ValueError, set PKMEM_CACHE", "")
def test_without_a_home_a_folder_has_to_be_named(corpus, tokenizer, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PKMEM_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(ValueError, match="no home folder to keep tokens in: set PKMEM_CACHE"):
        tokenize(str(corpus), "train", tokenizer, progress=False)


@pytest.mark.case("Environments", "a home folder, or `PKMEM_CACHE`, that cannot be written",
    "refused: ValueError, set PKMEM_CACHE to another folder", "")  # fmt: skip
@pytest.mark.parametrize("why", ["read-only", "a file"])
def test_a_folder_that_takes_no_tokens_is_named(corpus, tmp_path, tokenizer, monkeypatch, why):
    if why == "a file":
        (tmp_path / "cache").write_text("", encoding="utf-8")
    else:
        monkeypatch.setattr("os.access", lambda path, mode: False)  # as for another user than root
    with pytest.raises(ValueError, match=r"tokens cannot be written to .*cache \(.*\): set PKMEM_CACHE"):
        tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_request(corpus, tmp_path, tokenizer, capsys, progress):
    tokenize(str(corpus), "train", tokenizer, tmp_path / "cache", progress=progress)
    output = capsys.readouterr()
    assert ("tokenize train: 100%" in output.err) == progress
    assert output.out == ""
