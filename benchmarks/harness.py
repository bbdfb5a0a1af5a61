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
from pkmem.training.files import save_json

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


def start(description: str, repeats: int) -> Options:
    """Reads the command line and prepares the process: malloc settings, threads, seed.

    Args:
        description: the file's docstring.
        repeats: turns unless --repeats says otherwise; --smoke takes two.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RESULTS}; --smoke: a temporary one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every contender")
    parser.add_argument("--repeats", type=int, default=repeats, help="turns")
    given = parser.parse_args()
    tune_malloc()
    out = given.out or (Path(tempfile.mkdtemp(prefix="pkmem-bench-")) if given.smoke else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return Options(given.smoke, out, given.threads, 2 if given.smoke else given.repeats)


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
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


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


def interleave(contenders: dict[str, Callable[[], Any]], repeats: int) -> Timings:
    """Times contenders in turns, every other turn in reverse order; one that raises is left out with its reason."""
    failed: dict[str, str] = {}
    calls = {name: count for name, run in contenders.items() if (count := _calls_per_sample(name, run, failed))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            seconds[name].append(_time(contenders[name], calls[name]))
    return Timings(seconds, failed)


def _calls_per_sample(name: str, run: Callable[[], Any], failed: dict[str, str]) -> int:
    """Warms a contender up; 0 if it cannot run."""
    try:
        run()  # compiles, and touches memory for the first time
        return max(1, math.ceil(SECONDS_PER_SAMPLE / _time(run, 1)))
    except Exception as error:  # whatever a peer runs into is a line of the table
        failed[name] = one_line(error)
        return 0


def _time(run: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


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
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


# --- reporting ------------------------------------------------------------------------------------------


class Report:
    """The table of one benchmark, and its JSON.

    Args:
        name: of the files.
        options: the command line.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.lines: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.load_before = os.getloadavg()[0]

    def add(
        self, what: str, measured: Ratio | float, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """A line: a ratio or another figure, and its target if there is one."""
        ratio = measured if isinstance(measured, Ratio) else Ratio(measured, measured, measured)
        above = at_least is None or ratio.median >= at_least
        below = at_most is None or ratio.median <= at_most
        has_target = not self.options.smoke and (at_least, at_most) != (None, None)
        met = (above and below) if has_target else None
        line = {"what": what, **asdict(ratio), "at_least": at_least, "at_most": at_most, "met": met}
        self.lines.append(line)

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
        """Prints the table and leaves NAME.md and NAME.json in the folder of results."""
        text = self._table()
        print(text, flush=True)
        (self.options.out / f"{self.name}.md").write_text(text + "\n")
        document = {
            "name": self.name,
            "smoke": self.options.smoke,
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

    def _table(self) -> str:
        rows = [
            f"# {self.name}" + (" (smoke: the figures mean nothing)" if self.options.smoke else ""),
            "",
            _header(self.options),
            "",
            "| what | median (10th-90th percentile) | target | met |",
            "|---|---|---|---|",
            *(_row(line) for line in self.lines),
        ]
        return "\n".join([*rows, "", *(f"- {note}" for note in self.notes)]).rstrip()


def _row(line: dict[str, Any]) -> str:
    ratio = Ratio(line["median"], line["low"], line["high"])
    measured = f"{ratio.median:.2f}" if ratio.low == ratio.high else str(ratio)
    targets = [("at least", line["at_least"]), ("at most", line["at_most"])]
    target = " and ".join(f"{word} {bound:.4g}" for word, bound in targets if bound is not None)
    met = {None: "", True: "yes", False: "**no**"}[line["met"]]
    return f"| {line['what']} | {measured} | {target} | {met} |"


def _header(options: Options) -> str:
    where = environment()
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in ("torch", "numba") if name in where["versions"]
    )
    return (
        f"{where['processor']}, {where['cores']} cores, {options.threads} threads, {versions}, "
        f"commit {where['commit']}, {options.repeats} turns"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
