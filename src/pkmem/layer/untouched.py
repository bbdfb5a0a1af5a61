"""Whether a module still is what it was built as, so that something faster may stand for its `forward`."""

from __future__ import annotations

from typing import Any


def is_untouched(part: Any) -> bool:
    """Whether a module has no hook, and no `forward` of its own as libraries give it that offload weights."""
    state = part.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )
