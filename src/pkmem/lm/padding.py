"""Which tokens of a batch are real: how a decoder's attention mask reaches memories that are handed hidden states alone."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pkmem.layer.padding import may_look_at
from pkmem.layer.recomputation import is_recomputation


class _Pass(threading.local):
    """The forward pass that a thread is in; compilers trace this, and no `contextvars.ContextVar`."""

    def __init__(self) -> None:
        self.is_running = False
        self.mask: Tensor | None = None


class _Kept:
    """The mask of a pass that has not gone backward yet: its graph holds this."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask


_pass = _Pass()
_kept: weakref.WeakSet[_Kept] = weakref.WeakSet()


def real_tokens(attention_mask: Any, num_tokens: int) -> Tensor | None:
    """The mask of the last tokens, (batch, num_tokens) bool and True where one is real; None where no padding is known.

    Args:
        attention_mask: what a decoder takes: (batch, length) with 0 for padding, over what a cache holds, too. One of
            another form, such as (batch, 1, queries, keys), does not tell padding from what a token may not see.
        num_tokens: tokens of this pass, which come last.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -num_tokens:].bool()
    # Without padding there is nothing to mind; on a GPU, to look would be to wait for it.
    return None if mask.is_cpu and may_look_at(mask) and mask.all() else mask


@contextlib.contextmanager
def under_mask(mask: Tensor | None) -> Iterator[None]:
    """Lets the memories of the decoder that runs inside see a mask."""
    before = _pass.is_running, _pass.mask
    _pass.is_running, _pass.mask = True, mask
    try:
        yield
    finally:
        _pass.is_running, _pass.mask = before


def mask_of_pass() -> Tensor | None:
    """The mask of the forward pass that this thread is in, or that activation checkpointing runs again.

    Raises:
        ValueError: it is run again by a checkpoint that does not keep the mask, and there are several to choose from.
    """
    if torch.compiler.is_compiling() or _pass.is_running or not is_recomputation():
        return _pass.mask
    masks = {id(kept.mask): kept.mask for kept in _kept}
    if len(masks) > 1:
        raise ValueError(
            "activation checkpointing mixes up the attention masks of several forward passes before one backward: turn "
            "it on by gradient_checkpointing_enable of the model that add_memory returned"
        )
    return next(iter(masks.values()), None)


def keep_mask_with(outputs: Any) -> None:
    """Keeps the pass's mask as long as the graph of its outputs, for checkpoints that know nothing of masks."""
    if torch.compiler.is_compiling():
        return
    kept = _Kept(_pass.mask)
    for out in outputs.values() if isinstance(outputs, dict) else outputs:
        if isinstance(out, Tensor) and out.grad_fn is not None:
            metadata: Any = out.grad_fn.metadata
            metadata["pkmem"] = kept
            _kept.add(kept)


def keeping_mask(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function that recomputes under the mask of the first time, when that pass is over."""
    return functools.partial(_checkpoint_under_mask, checkpoint)


def _checkpoint_under_mask(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    if torch.compiler.is_compiling():  # traced once, inside the pass
        return checkpoint(function, *args)
    return checkpoint(functools.partial(_run_under_mask, _pass.mask, function), *args)


def _run_under_mask(mask: Tensor | None, function: Callable[..., Any], *args: Any) -> Any:
    with under_mask(mask):
        return function(*args)
