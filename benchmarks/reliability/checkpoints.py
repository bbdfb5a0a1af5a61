"""Checkpoints against kills, full disks, damage and hostile files: trials 4, 5, 7, 8, 9 and 13."""

from __future__ import annotations

from benchmarks.reliability.outcome import Trial

TRIALS: dict[int, Trial] = {}
