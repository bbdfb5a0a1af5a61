"""Processes and hosts that fail, numbers that are none, and long runs: trials 6, 10 and 11."""

from __future__ import annotations

from benchmarks.reliability.outcome import Trial

TRIALS: dict[int, Trial] = {}
