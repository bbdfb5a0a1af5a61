"""Column-sharded tables against one process, and what they send and hold: trials 1, 2, 3, 12 and 14."""

from __future__ import annotations

from benchmarks.reliability.outcome import Trial

TRIALS: dict[int, Trial] = {}
