"""text/files.py on real files: what is found, how it is opened, what is refused."""

import gzip
import importlib.util
import sys

import pytest

from pkmem.text import files as text_files
from pkmem.text import read_documents
from pkmem.text.files import zstd
from texts import STORY, json_lines, read, write


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


def test_zstd_frames_follow_each_other(tmp_path):
    half = len(STORY) // 2
    frames = zstd.compress(STORY[:half].encode()) + zstd.compress(STORY[half:].encode())
    path = write(tmp_path / "frames.txt.zst", frames)
    assert "".join(read(path, "train") + read(path, "validation")) == STORY


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


def test_a_home_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no such home folder; give the whole path"):
        read_documents("~nobody-of-this-name/texts", "train")


def test_missing_zstd_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "story.txt", STORY, ".zst")
    monkeypatch.setattr(text_files, "zstd", None)
    with pytest.raises(ValueError, match=r'backports\.zstd is not installed; run: pip install "pkmem\[lm\]"'):
        list(read_documents(str(path), "train"))


def test_the_standard_library_is_there_without_its_tests():
    files = text_files.find_files("python")
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
    monkeypatch.setattr(text_files, "CORPUS_PACKAGES", ("corpus_probe",))
    names = [file.name for file in text_files.find_files("python+")]
    assert names[-1] == "corpus_probe/__init__.py"
    assert names[:-1] == [file.name for file in text_files.find_files("python")]
    assert "corpus_probe" not in sys.modules


def test_a_missing_package_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "networkx" else find_spec(name))
    with pytest.raises(ValueError, match=r'networkx is not installed; run: pip install "pkmem\[corpus\]"'):
        read_documents("python+", "train")
