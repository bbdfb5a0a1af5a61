"""Activation checkpointing runs a forward again during backward; what a forward counts must not count twice."""

from __future__ import annotations

import torch


def is_recomputation() -> bool:
    """Whether this forward repeats an earlier one for activation checkpointing, of either kind.

    Both kinds recompute inside the backward pass, and nothing else runs a forward there. Ask this where no compiler
    traces: compiled code meets backward when it runs, not when it is traced.
    """
    return torch._C._current_graph_task_id() != -1
