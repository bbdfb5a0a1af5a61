"""Column-sharded tables against one process, and what they send and hold: trials 1, 2, 3, 12 and 14."""

from __future__ import annotations

from benchmarks.reliability.equality import columns_give_the_same_bits, replicas_and_columns, whole_models
from benchmarks.reliability.outcome import Trial

TRIALS: dict[int, Trial] = {1: columns_give_the_same_bits, 2: replicas_and_columns, 3: whole_models}
