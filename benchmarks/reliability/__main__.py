"""Runs the trials of docs/reliability.md, all or some, and keeps what they found.

    python -m benchmarks.reliability            # all, at most 40 minutes; what `make reliability` runs
    python -m benchmarks.reliability 6 10       # some; what the others found earlier stays in the file
    python -m benchmarks.reliability --short    # seconds each, does it still hold? nothing is kept

Exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.reliability import checkpoints, failures, sharding, shares
from benchmarks.reliability.outcome import Outcome, Trial
from pkmem.experiments.environment import environment
from pkmem.files.documents import load_json, save_json

RESULTS = Path(__file__).parents[1] / "results" / "reliability.json"
TRIALS: dict[int, Trial] = dict(
    sorted({**sharding.TRIALS, **shares.TRIALS, **checkpoints.TRIALS, **failures.TRIALS}.items())
)
WORDS = {True: "holds", False: "DOES NOT HOLD", None: "not tried here"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; returns 1 if something does not hold, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="trials, as docs/reliability.md counts")
    parser.add_argument("--short", action="store_true", help="seconds each; the results are kept only with --out")
    parser.add_argument("--out", type=Path, help=f"file of the results ({RESULTS})")
    options = parser.parse_args(arguments)
    if unknown := set(options.numbers) - set(TRIALS):
        parser.error(f"no trial {sorted(unknown)}: choose from {list(TRIALS)}")
    out = options.out or (None if options.short else RESULTS)
    failed = 0
    for number in sorted(set(options.numbers)) or TRIALS:
        outcomes = []
        for outcome in outcomes_of(number, options.short):
            print(f"{number:3}  {WORDS[outcome.holds]}  {outcome.what}: {outcome.found}", end="  ")
            print(f"(required: {outcome.required}; {outcome.seconds:.0f} s)", flush=True)
            outcomes.append(outcome)
            failed += outcome.holds is False
        if out is not None:
            keep(out, number, outcomes, options.short)  # after each trial: whoever stops here loses one
    if failed:
        print(f"{failed} of these do not hold", file=sys.stderr)
    return 1 if failed else 0


def outcomes_of(number: int, short: bool) -> Iterator[Outcome]:
    """What a trial finds, each with its seconds; a trial that breaks off is one that does not hold."""
    begin = time.perf_counter()
    try:
        for outcome in TRIALS[number](short):
            assert outcome.number == number, outcome
            yield replace(outcome, seconds=time.perf_counter() - begin)
            begin = time.perf_counter()
    except Exception as error:  # the other trials are worth running all the same
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Outcome(number, "the trial itself", "it ends", found, False, time.perf_counter() - begin)


def keep(out: Path, number: int, outcomes: Sequence[Outcome], short: bool) -> None:
    """Writes a trial into the file of results, in place of what it found earlier; other trials stay as they are."""
    trials: dict[str, Any] = load_json(out)["trials"] if out.exists() else {}
    command = " ".join(["python -m benchmarks.reliability", str(number), *(["--short"] if short else [])])
    trials[str(number)] = {
        "environment": environment() | {"command": command},
        "short": short,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    save_json(out, {"trials": {key: trials[key] for key in sorted(trials, key=int)}})


if __name__ == "__main__":
    sys.exit(main())
