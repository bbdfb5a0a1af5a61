"""Counts what torch's operators do on CPU tensors as they would on a GPU: how many run, and what memory they hold."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pkmem.ops import reference
from pkmem.ops.backends import Backend

_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")
_WAITING = (*_ON_THE_HOST, "unique_consecutive")


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        num_operators: that were dispatched, views included.
        num_waits: of them, those for which the host would wait for a GPU.
        peak_bytes: the most that tensors held at once that were made meanwhile. What a kernel takes for itself, such as
            the sorting of a GPU's top-k, does not show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.num_waits = self.peak_bytes = 0
        self.names = __import__("collections").Counter()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = function(*args, **(kwargs or {}))
        if function.namespace == "pkmem":  # what runs inside is counted
            return made
        self.num_operators += 1
        self.names[str(function)] += 1
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(part, Tensor) and part.dtype == torch.bool for part in args[1]
        )
        self.num_waits += name in _WAITING or by_mask
        self._held = {place: (ref, size) for place, (ref, size) in self._held.items() if not ref.expired()}
        for leaf in tree_leaves(made):
            if type(leaf) is Tensor and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._held.values()))
        return made


@contextmanager
def metered(meter: Meter, chunk_bytes: int) -> Iterator[None]:
    """Counts what runs inside the reference, which torch's registered operators hide from a mode, and outside it.

    Args:
        meter: counts.
        chunk_bytes: what a chunk may take, as on a GPU.
    """

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any) -> Any:
            with contextlib.nullcontext() if torch._C._len_torch_dispatch_stack() else meter:
                return function(*args)

        return counted

    names = [name for name in vars(Backend) if name[0] != "_"]
    replaced: dict[str, Any] = {name: counting(getattr(reference, name)) for name in names}
    replaced["chunk_size"] = lambda item_bytes, *_: max(1, chunk_bytes // max(1, item_bytes))
    with mock.patch.multiple(reference, **replaced), meter:
        yield
