"""How every benchmark here measures and reports.

Contenders take turns (A B A B), a ratio is taken within a turn, and what is reported is the median of the ratios and
their 10th to 90th percentile: a noisy machine moves both sides of a ratio alike, and absolute times not at all alike.
All contenders run with the malloc settings that suit them best, since page faults are a third of the peers' time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pkmem.experiments.environment import environment
from pkmem.files.documents import save_json

RESULTS = Path(__file__).parent / "results"
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "99999999999",
    "MALLOC_TOP_PAD_": str(64 << 20),
}
SECONDS_PER_SAMPLE = 0.02  # a shorter call is repeated within its turn


@dataclass(frozen=True)
class Options:
    """What the command line of every benchmark says."""

    smoke: bool
    out: Path
    threads: int
    repeats: int
    only: tuple[str, ...]


def start(description: str, repeats: int, parts: Iterable[str] = ()) -> Options:
    """Reads the command line and prepares the process: malloc settings, threads, seed.

    Args:
        description: the file's docstring.
        repeats: turns unless --repeats says otherwise; --smoke takes two.
        parts: what --only may choose from.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RESULTS}; --smoke: a temporary one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every contender")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns")
    parts = tuple(parts)
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some parts alone")
    given = parser.parse_args()
    tune_malloc()
    out = given.out or (Path(tempfile.mkdtemp(prefix="pkmem-bench-")) if given.smoke else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    repeats = 2 if given.smoke else given.repeats
    return Options(given.smoke, out, given.threads, repeats, tuple(given.only) if parts else ())


def tune_malloc() -> None:
    """Starts the process again with `TUNED_MALLOC`, which malloc reads only once, if it runs without."""
    if any(os.environ.get(name) != setting for name, setting in TUNED_MALLOC.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | TUNED_MALLOC)


# --- measuring ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """The median of per-turn ratios, and their 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Ratio:
        ordered = sorted(ratios)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])

    def __str__(self) -> str:
        median, low, high = (f"{x:.1e}" if 0 < x < 0.01 else f"{x:.2f}" for x in (self.median, self.low, self.high))
        return median if self.low == self.high else f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Timings:
    """Seconds per call of every contender, one for each turn, and why some could not run."""

    seconds: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    def ratio(self, above: str, below: str) -> Ratio:
        """Time of one contender over that of another, turn by turn."""
        return Ratio.of(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Iterable[str]) -> str:
        """The contender with the lowest median among those of the names that ran."""
        return min((name for name in names if name in self.seconds), key=self.median)

    def with_sum(self, name: str, factors: dict[str, float]) -> Timings:
        """The same and a weighted sum of contenders under a new name: how a floor is put together."""
        turns = zip(*(self.seconds[part] for part in factors), strict=True)
        total = [sum(f * t for f, t in zip(factors.values(), turn, strict=True)) for turn in turns]
        return Timings(self.seconds | {name: total}, self.failed)


def wall_seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds per call of so many calls, by the clock of this process."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def interleave(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[Callable[[], Any], int], float] = wall_seconds,
) -> Timings:
    """Times contenders in turns, every other turn in reverse order; one that raises is left out with its reason.

    Args:
        contenders: what is called, by name.
        repeats: turns.
        clock: seconds per call of so many calls.
    """
    failed: dict[str, str] = {}
    calls = {name: count for name, run in contenders.items() if (count := _calls_per_sample(name, run, clock, failed))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            seconds[name].append(clock(contenders[name], calls[name]))
    return Timings(seconds, failed)


def _calls_per_sample(
    name: str, run: Callable[[], Any], clock: Callable[[Callable[[], Any], int], float], failed: dict[str, str]
) -> int:
    """Warms a contender up; 0 if it cannot run."""
    try:
        run()  # compiles, and touches memory for the first time
        return max(1, math.ceil(SECONDS_PER_SAMPLE / clock(run, 1)))
    except Exception as error:  # whatever a peer runs into is a line of the table
        failed[name] = one_line(error)
        return 0


def one_line(error: BaseException) -> str:
    """An exception as a line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def check_same(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuses to go on unless two results agree, but for 2 in 1,000: two correct products may round a near-tie apart.

    Raises:
        ArithmeticError: more of them differ by over 1e-4 of the largest element.
    """
    bound = 1e-4 * theirs.abs().max()
    wrong = 1 - ((ours - theirs).abs() <= bound).float().mean().item()
    if wrong > 2e-3:
        raise ArithmeticError(f"{what}: {wrong:.2%} of the results differ; a wrong result is not worth timing")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a new process, with this one's threads and malloc settings.

    Raises:
        BrokenProcessPool: the process died, most likely for lack of memory.
    """
    settings = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **settings) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """The most memory this process has had resident so far."""
    return _kibibytes("/proc/self/status", "VmHWM") << 10


def available_bytes() -> int:
    """Memory that can still be had without swapping."""
    return _kibibytes("/proc/meminfo", "MemAvailable") << 10


def _kibibytes(file: str, name: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


# --- reporting ------------------------------------------------------------------------------------------


class Report:
    """The table of one benchmark, and its JSON.

    Args:
        name: of the files.
        options: the command line.
        device: what is measured, "cpu" or "cuda".
    """

    def __init__(self, name: str, options: Options, device: str = "cpu") -> None:
        self.name, self.options, self.device = name, options, device
        self.lines: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.load_before = os.getloadavg()[0]

    def add(self, what: str, measured: Ratio | float) -> None:
        """A line: a ratio or another figure."""
        ratio = measured if isinstance(measured, Ratio) else Ratio(measured, measured, measured)
        self.lines.append({"what": what, **asdict(ratio)})

    def note(self, text: str) -> None:
        """A remark under the table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def keep(self, case: str, timings: Timings) -> None:
        """Writes a case's absolute times into the JSON, and who could not run under the table."""
        self.details[case] = timings.seconds
        for name, reason in timings.failed.items():
            self.note(f"{name} could not run ({case}): {reason}")

    def write(self) -> None:
        """Prints the table and saves."""
        print(table(self.save()), flush=True)

    def save(self) -> dict[str, Any]:
        """Leaves NAME.json and NAME.md in the folder of results; returns the content of the first."""
        document = {
            "name": self.name,
            "smoke": self.options.smoke,
            "device": self.device,
            "environment": environment(),
            "malloc": {name: os.environ.get(name) for name in TUNED_MALLOC},
            "peers": {name: _version(name) for name in ("product-key-memory", "PEER-pytorch")},
            "repeats": self.options.repeats,
            "load_average": {"before": self.load_before, "after": os.getloadavg()[0]},
            "lines": self.lines,
            "notes": self.notes,
            "seconds_not_to_be_quoted": self.details,
        }
        save_json(self.options.out / f"{self.name}.json", document)
        (self.options.out / f"{self.name}.md").write_text(table(document) + "\n", encoding="utf-8")
        return document


def table(document: dict[str, Any]) -> str:
    """The Markdown of a benchmark, from its JSON."""
    rows = [
        f"# {document['name']}" + (" (smoke: the figures mean nothing)" if document["smoke"] else ""),
        "",
        _header(document),
        "",
        "| what | median (10th-90th percentile) |",
        "|---|---|",
        *(f"| {line['what']} | {Ratio(line['median'], line['low'], line['high'])} |" for line in document["lines"]),
    ]
    return "\n".join([*rows, "", *(f"- {note}" for note in document["notes"])]).rstrip()


def _header(document: dict[str, Any]) -> str:
    where, versions = document["environment"], document["environment"]["versions"]
    processor = f"{where['processor']}, {where['cores']} cores, {where['torch_threads']} threads"
    compiler = "triton" if document["device"] == "cuda" else "numba"
    parts = [where["gpu"] or processor] if document["device"] == "cuda" else [processor]
    parts += [f"{name} {versions[name]}" for name in ("torch", compiler) if name in versions]
    return ", ".join([*parts, f"commit {where['commit']}", f"{document['repeats']} turns"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
