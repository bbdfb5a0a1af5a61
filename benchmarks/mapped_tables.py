"""What does a table cost that stays in its file: to open it, to read rows that are not in memory yet, and for each token?

    python benchmarks/mapped_tables.py      # 5 GB of disk and of memory, ten minutes; as root it limits the memory of a process, too

Rows: a file is dropped from the system's cache before each turn, then as many rows are read as a prompt of 64 or 512 tokens
reads. Many threads that wait for a row each show what the disk can give at most.
Models: a decoder of two blocks with one memory of 4.3 GB writes on in fresh processes, its table in memory, or mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit, types
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import harness
from harness import Options, Ratio, Report, in_fresh_process
from pkmem import MemoryConfig, add_memory
from pkmem.files.tensor_file import TensorFile, write_tensor_file
from pkmem.layer.memory import memories_in
from pkmem.ops.mapped_rows import MappedRows
from pkmem.ops.packing import row_bytes
from pkmem.training.tables_apart import TABLES, write_with_tables_apart

PAGE = mmap.PAGESIZE
FORMS = {"fp32": 4 * 512, "bf16": 2 * 512, "int8": row_bytes(512, 8), "int4": row_bytes(512, 4)}  # bytes of a row
TABLE_BYTES = 1 << 32
TOKENS, READS_OF_TOKEN = (64, 512), 128
THREADS = 64
WAYS = (
    "one fault after another",
    "one fault after another, told to be at random",
    f"{THREADS} threads with pread",
    "asked ahead",
)
PLAIN, AT_RANDOM, THREADED, AHEAD = WAYS
PROMPT, WRITTEN = 256, 64
LIMIT = 1 << 30  # bytes that a process may hold, pages of files counted


def main() -> None:
    """Measures both and writes mapped_tables.json and mapped_tables.md."""
    options = harness.start(__doc__, repeats=3, parts=("rows", "models"))
    report = Report("mapped_tables", options)
    _read_rows(0, np.zeros(0, np.int64), np.empty((0, 1), np.uint8), 0, 0)  # compiles it
    with tempfile.TemporaryDirectory(prefix="pkmem-mapped-") as folder:
        if "rows" in options.only:
            for form, num_bytes in FORMS.items():
                rows(report, options, Path(folder), form, num_bytes)
        if "models" in options.only:
            models(report, options, Path(folder))
    report.write()


# --- rows -----------------------------------------------------------------------------------------------


def rows(report: Report, options: Options, folder: Path, form: str, num_bytes: int) -> None:
    """A file of rows, read cold by prompts of several lengths."""
    num_rows = 4096 if options.smoke else TABLE_BYTES // num_bytes
    file = folder / f"{form}.safetensors"
    some = torch.randint(256, (min(num_rows, 1 << 12), num_bytes), dtype=torch.uint8)
    layout = {"rows": (torch.uint8, (num_rows, num_bytes))}
    write_tensor_file(file, layout, lambda name: _repeated(some, num_rows), {}, begins_at=PAGE)
    sync(file)
    for tokens in TOKENS:
        prompt(
            report,
            options,
            file,
            f"{form}, {tokens} tokens",
            num_rows,
            tokens if options.smoke else tokens * READS_OF_TOKEN,
        )
    file.unlink()


def prompt(report: Report, options: Options, file: Path, case: str, num_rows: int, reads: int) -> None:
    """The same rows of a cold file, read in several ways, in turns."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    pages: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(options.repeats):
        slots = torch.randint(num_rows, (reads,))
        sums = set()
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            drop(file)
            before, start = _read_from_disk(), time.perf_counter()
            sums.add(int(READERS[way](file, slots).sum()))
            seconds[way].append(time.perf_counter() - start)
            pages[way].append((_read_from_disk() - before) / PAGE / len(slots.unique()))
        assert len(sums) == 1, f"{case}: the ways read different rows"
    report.details[f"{case}, {reads} rows"] = seconds
    for way in WAYS:
        report.add(f"{case}: pages of {PAGE} bytes read for each distinct row, {way}", Ratio.of(pages[way]))
    for way in (PLAIN, AT_RANDOM, THREADED):
        ratios = (slow / fast for slow, fast in zip(seconds[way], seconds[AHEAD], strict=True))
        report.add(f"{case}: {way} / {AHEAD}", Ratio.of(ratios))
    report.add(f"{case}: rows a second, {AHEAD}", Ratio.of(reads / taken for taken in seconds[AHEAD]))


def _repeated(some: Tensor, num_rows: int) -> Iterator[Tensor]:
    for first in range(0, num_rows, len(some)):
        yield some[: num_rows - first]


def _fault_by_fault(file: Path, slots: Tensor) -> Tensor:
    return _picked(TensorFile(file)["rows"], slots)


def _at_random(file: Path, slots: Tensor) -> Tensor:
    opened = TensorFile(file)
    found = opened["rows"]
    opened.read_at_random()
    return _picked(found, slots)


def _asked_ahead(file: Path, slots: Tensor) -> Tensor:
    opened = TensorFile(file)
    found = opened["rows"]
    opened.read_at_random()
    MappedRows(found, opened).ask(found, slots)
    return _picked(found, slots)


def _by_threads(file: Path, slots: Tensor) -> Tensor:
    stored = TensorFile(file).stored["rows"]
    width = stored.shape[1]
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    read = np.empty((len(slots), width), np.uint8)
    starts = stored.start + slots.numpy() * width
    parts = np.array_split(np.arange(len(slots)), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda part: _read_rows(descriptor, starts, read, part[0], part[-1] + 1), parts))
    os.close(descriptor)
    return torch.from_numpy(read)


_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))


@njit(nogil=True)
def _read_rows(descriptor, starts, read, first, last):  # type: ignore[no-untyped-def]
    for row in range(first, last):
        _pread(np.int32(descriptor), np.uintp(read[row].ctypes.data), np.uintp(read.shape[1]), starts[row])


def _picked(table: Tensor, slots: Tensor) -> Tensor:
    return table.index_select(0, slots)


READERS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    PLAIN: _fault_by_fault,
    AT_RANDOM: _at_random,
    THREADED: _by_threads,
    AHEAD: _asked_ahead,
}


def drop(file: Path) -> None:
    """Takes a file out of the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def sync(file: Path) -> None:
    """Has a file on the disk: what is not there cannot be dropped."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _read_from_disk() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line)


# --- models ---------------------------------------------------------------------------------------------


class NoTokenizer:
    """Saves nothing: the benchmark reads numbers."""

    def save_pretrained(self, folder: Path) -> None:
        """Nothing."""


def models(report: Report, options: Options, folder: Path) -> None:
    """A model that writes on, its table in memory and mapped, warm, cold and with less memory than the table has."""
    in_fresh_process(make, folder / "memory", 16 if options.smoke else 2048)
    in_fresh_process(make, folder / "dense", None)
    table = folder / "memory" / TABLES
    sync(table)
    report.add("table, GB", table.stat().st_size / 1e9)
    with limited_memory(None if options.smoke else LIMIT) as join:
        ways = {
            "in memory": ("memory", "copied", False, None),
            "mapped, warm": ("memory", "mmap", False, None),
            "mapped, cold": ("memory", "mmap", True, None),
            "as transformers loads it, cold": ("memory", None, True, None),
            **({"mapped, a process of 1.1 GB, cold": ("memory", "mmap", True, join)} if join else {}),
            "no memory": ("dense", None, False, None),
        }
        if options.smoke:
            ways = {way: ways[way] for way in ("in memory", "mapped, warm")}
        if not join:
            report.note("this system let nobody limit the memory of a process")
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, (name, how, cold, place) in ways.items():
                if cold:
                    drop(table)
                found[way].append(in_fresh_process(write_on, folder / name, how, place))
    tokens = {tuple(one["tokens"]) for way in ways if way != "no memory" for one in found[way]}
    report.add("different texts written, of all that have the memory", len(tokens))
    report.details["models"] = {way: [one["decode"] for one in all_found] for way, all_found in found.items()}
    for way in ways:
        for what, unit in (("opening", "s"), ("prompt", f"s for {PROMPT} tokens"), ("decode", "ms a token")):
            scale = 1e3 if what == "decode" else 1
            report.add(f"{way}: {what}, {unit}", Ratio.of(scale * one[what] for one in found[way]))
        report.add(f"{way}: held after opening, MB", Ratio.of(one["opened_bytes"] / 1e6 for one in found[way]))
        report.add(f"{way}: held at the most, MB", Ratio.of(one["peak_bytes"] / 1e6 for one in found[way]))


def make(folder: Path, num_sub_keys: int | None) -> None:
    """Saves a small decoder, with a memory or without."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096, max_position_embeddings=512))
    if num_sub_keys is None:
        decoder.save_pretrained(folder)
        return
    memory = MemoryConfig(num_sub_keys=num_sub_keys, knn=min(32, num_sub_keys), query_norm="layer")
    model = add_memory(decoder, [0], memory, placement="parallel")
    for one in memories_in(model).values():
        one.values.weight.data.mul_(16)  # so that what is read matters to what is written
    folder.mkdir()
    write_with_tables_apart(folder, model, NoTokenizer())  # type: ignore[arg-type]


def write_on(folder: Path, how: str | None, limited: Path | None) -> dict[str, Any]:
    """Opens a model, reads a prompt and writes tokens, each the likeliest one; its table mapped, copied or as it comes."""
    _warm_up()
    if limited is not None:
        (limited / "cgroup.procs").write_text(str(os.getpid()))
    held, start = _resident(), time.perf_counter()
    options = {"values": how} if how == "mmap" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for one in memories_in(model).values() if how == "copied" else ():
        one.values.weight.data = one.values.weight.data.clone()  # transformers leaves weights in their file, too
    found: dict[str, Any] = {"opening": time.perf_counter() - start, "opened_bytes": _resident() - held}
    prompt = torch.arange(PROMPT)[None] * 7 % 4096
    with torch.no_grad():
        start = time.perf_counter()
        given = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        found["prompt"] = time.perf_counter() - start
        taken, tokens = [], [given.logits[:, -1:].argmax(-1)]
        for _ in range(WRITTEN):
            start = time.perf_counter()
            given = model(input_ids=tokens[-1], past_key_values=given.past_key_values, use_cache=True)
            tokens.append(given.logits[:, -1:].argmax(-1))
            taken.append(time.perf_counter() - start)
    found |= {"decode": statistics.fmean(taken), "tokens": [int(token) for token in tokens]}
    return found | {"peak_bytes": harness.peak_bytes() - held}


def _warm_up() -> None:
    """Loads libraries and kernels with a model that is not measured."""
    decoder = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64))
    model = add_memory(decoder, [0], MemoryConfig(num_sub_keys=64, query_norm="layer"), placement="parallel").eval()
    with torch.no_grad():
        for num_tokens in (PROMPT, 1):
            model(input_ids=torch.ones(1, num_tokens, dtype=torch.int64))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@contextlib.contextmanager
def limited_memory(limit: int | None) -> Iterator[Path | None]:
    """A group of processes that may hold so many bytes, pages of files counted; None where it cannot be made."""
    root = Path("/sys/fs/cgroup")
    for place, name in () if limit is None else ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max")):
        group = place / f"pkmem-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
        except OSError:
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


if __name__ == "__main__":
    main()
