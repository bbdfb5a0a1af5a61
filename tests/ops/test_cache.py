"""Compiled kernels on disk: what is damaged, foreign or cannot be written costs a compilation, and nothing else."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import numba

from pkmem.ops.cpu import cache
from pkmem.ops.cpu.kernels import kernel

KIND = "Environments"
ANNOUNCED = "pkmem compiles its CPU kernels, once (about 15 s); `pkmem warmup` does it ahead"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    for said in (cache._say_that_it_compiles, cache._say_that_nothing_is_kept):
        said.cache_clear()
    return tmp_path / "cache"


def double(numbers):  # type: ignore[no-untyped-def]
    for i in range(len(numbers)):
        numbers[i] *= 2


def was_compiled(kind: type = np.float32) -> bool:
    """Runs the kernel as a new process would; whether it had to be compiled."""
    compiled = kernel(double)
    numbers = np.arange(5, dtype=kind)
    compiled(numbers)
    assert numbers.tolist() == [0, 2, 4, 6, 8]
    hits, misses = sum(compiled.stats.cache_hits.values()), sum(compiled.stats.cache_misses.values())
    assert hits + misses == 1
    return bool(misses)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_second_process_loads_what_the_first_compiled(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert was_compiled()
    assert [record.message for record in caplog.records] == [ANNOUNCED]
    cache._say_that_it_compiles.cache_clear()
    assert not was_compiled()
    assert len(caplog.records) == 1
    assert was_compiled(np.int64)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.case(KIND, "start with a damaged or truncated file in the cache of compiled kernels", "works: it is compiled again",
    "https://github.com/numba/numba/issues/10434")  # fmt: skip
def test_a_damaged_file_is_compiled_again_and_mended(folder: Path) -> None:
    was_compiled()
    whole = (file := only_file(folder)).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (
        b"",
        whole[:10],
        whole[:40],
        whole[:-1],
        whole + b"\0",
        b"garbage",
        bytes(len(whole)),
        bytes(flipped),
    ):
        file.write_bytes(damaged)
        assert was_compiled()
        assert not was_compiled()
        assert only_file(folder) == file


def test_a_file_under_anothers_name_is_not_taken(folder: Path) -> None:
    was_compiled()
    of_floats = only_file(folder)
    was_compiled(np.int64)
    (of_integers,) = {*folder.iterdir()} - {of_floats}
    of_integers.write_bytes(of_floats.read_bytes())
    assert was_compiled(np.int64)


@pytest.mark.case(
    KIND, "upgrade pkmem, numba or Python with a cache that is filled", "works: kernels are compiled again", ""
)
@pytest.mark.parametrize("what", ["numba", "python", "sources"])
def test_another_version_is_compiled_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    was_compiled()
    match what:
        case "numba":
            monkeypatch.setattr(numba, "__version__", "0.0")
        case "python":
            monkeypatch.setattr(sys, "version", "3.99")
        case "sources":
            monkeypatch.setattr(cache, "_sources", lambda file: b"of the next release")
    assert was_compiled()
    assert not was_compiled()


def test_every_source_of_a_kernel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own.py", tmp_path / "package" / "vectors.py"
    other.parent.mkdir()
    monkeypatch.setattr(cache, "_HERE", other.parent)
    seen = set()
    for one, two in (("a", "b"), ("a", "c"), ("d", "c")):
        own.write_text(one, encoding="utf-8")
        other.write_text(two, encoding="utf-8")
        seen.add(cache._sources.__wrapped__(str(own)))
    assert len(seen) == 3


@pytest.mark.case(KIND, "a `NUMBA_CACHE_DIR` that cannot be written", "works: each process compiles, which is said once",
    "https://github.com/numba/numba/issues/5566")  # fmt: skip
def test_without_a_folder_to_write_to_each_process_compiles(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("no folder", encoding="utf-8")
    for kind in (np.float32, np.int64):
        assert was_compiled(kind)
    said = [record.message for record in caplog.records]
    assert said == [
        ANNOUNCED,
        "compiled kernels cannot be kept on disk: set NUMBA_CACHE_DIR to a folder that can be written",
    ]


def test_the_second_folder_takes_what_the_first_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "folders", lambda: iter([folder, tmp_path / "spare"]))
    folder.write_text("no folder", encoding="utf-8")
    assert was_compiled()
    assert not was_compiled()
    only_file(tmp_path / "spare")


@pytest.mark.case(KIND, "the disk fills while a compiled kernel is written", "works", "")
def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert was_compiled()
    assert list(folder.iterdir()) == []


@pytest.mark.case(KIND, "no home folder, as for a container's arbitrary user", "works", "")
def test_without_a_home_kernels_are_kept_in_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(cache, "_HERE", folder)
    folder.mkdir()
    assert was_compiled()
    assert not was_compiled()
    only_file(folder / "__pycache__")


def test_the_folders_are_the_one_named_or_the_packages_and_the_homes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(cache.__file__).parent / "__pycache__"
    assert [*cache.folders()] == [folder]
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    for named in ("", "not/from/the/root"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert [*cache.folders()] == [package, Path.home() / ".cache" / "pkmem" / "kernels"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert [*cache.folders()] == [package, folder / "pkmem" / "kernels"]


@pytest.mark.case(KIND, "kernels compiled by root when a container is built, run as another user who cannot write there",
    "works: they are loaded", "https://github.com/librosa/librosa/issues/1156")  # fmt: skip
def test_what_the_installer_compiled_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    was_compiled()
    file_of(0, monkeypatch)
    assert not was_compiled()
    file_of(Path(cache.__file__).stat().st_uid, monkeypatch)
    assert not was_compiled()


@pytest.mark.case(
    KIND,
    "a cache folder in which other users can write",
    "works: their files are not loaded, since unpickling runs code",
    "",
)
@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
def test_what_another_user_may_have_written_is_not_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was_compiled()
    file = only_file(folder)
    file.chmod(0o666)
    monkeypatch.setattr(cache.pickle, "loads", None)  # whoever unpickles fails
    assert was_compiled()
    assert not file.stat().st_mode & stat.S_IWOTH
    file_of(os.geteuid() + 4242, monkeypatch)
    assert was_compiled()


def file_of(owner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is opened from now on is this user's."""
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result((*fstat(file)[:4], owner, *fstat(file)[5:])))


# One process under `-O` in the C locale with an ASCII console, one without a home and without Python's variables.
SCRIPT = """
import atexit, sys, torch
from pkmem.ops import reference, weighted_sum
from pkmem.ops.cpu import bag, cache, threads
def check(dtype):
    values, slots, weights = torch.randn(9, 7).to(dtype), torch.randint(9, (5, 3)), torch.rand(5, 3)
    ours, expected = (f(values.double(), slots, weights.double()) for f in (weighted_sum, reference.weighted_sum))
    if not torch.allclose(weighted_sum(values, slots, weights).double(), expected, rtol=2e-2): sys.exit(str(dtype))
kinds = [torch.float32, torch.bfloat16]
for dtype in kinds if sys.argv[1] == "forwards" else reversed(kinds):
    check(dtype)
counts = [0] * 64
def count(first, last):
    for i in range(first, last): counts[i] += 1
def at_exit():  # no new thread can be started by then
    torch.set_num_threads(4)
    threads._openmp = lambda: None
    threads.run_over(count, (), 64, 1)
    print(counts == [1] * 64, flush=True)
atexit.register(at_exit)
"""


@pytest.mark.case(KIND, "two processes that fill an empty cache of compiled kernels at once", "works",
    "https://github.com/numba/numba/issues/10128")  # fmt: skip
@pytest.mark.case(KIND, "`python -O`, `python -I`, `python -W error`", "works", "")
@pytest.mark.case(KIND, "the C locale with an ASCII console", "works", "")
@pytest.mark.case(KIND, "a forward pass while the interpreter shuts down", "works", "")
def test_two_processes_fill_the_cache_at_once(folder: Path) -> None:
    shared = {k: v for k, v in os.environ.items() if k not in ("HOME", "USERPROFILE", "LANG", "PYTHONUTF8")}
    shared |= {"NUMBA_CACHE_DIR": str(folder)}
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "forwards": (
            ["-O"],
            {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kolkata"},
        ),
        "backwards": (["-I", "-W", "error"], {"OMP_NUM_THREADS": "1"}),
    }
    running: list[Any] = [
        subprocess.Popen(
            [sys.executable, *flags, "-c", SCRIPT, way],
            env=shared | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for way, (flags, more) in ways.items()
    ]
    announced = []
    for process in running:
        said, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert said.strip() == b"True"
        announced.append(error.decode().strip())
    assert ANNOUNCED in announced
    assert {*announced} <= {ANNOUNCED, ""}  # one may have found all of the other's
    assert len(list(folder.iterdir())) == 2
    from pkmem.ops.cpu import bag

    for kind in (np.float32, np.uint16):  # a third process: every file is whole and the right one
        fresh = kernel(bag.sum_rows.py_func)
        values, summed = np.ones((2, 3), kind), np.zeros((1, 3), kind)
        fresh(values, np.array([[1, 0]]), np.ones((1, 2), np.float32), summed, 0, 1)
        assert sum(fresh.stats.cache_hits.values()) == 1
