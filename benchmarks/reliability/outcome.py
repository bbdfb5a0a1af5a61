"""What a trial found, beside what it had to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One row of the table in docs/reliability.md.

    Args:
        number: of the trial, as in docs/reliability.md.
        what: what was done, in a few words that a stranger understands.
        required: what had to come out.
        found: what came out, with its unit; why it was not tried, where it was not.
        holds: whether what came out is what had to; None where this machine does not permit the trial.
        seconds: how long it took; whoever runs the trial fills it in.
    """

    number: int
    what: str
    required: str
    found: str
    holds: bool | None
    seconds: float = 0.0


Trial = Callable[[bool], Iterator[Outcome]]
"""Takes whether to be short (seconds, for `make test`) and yields each outcome as soon as it is known."""
