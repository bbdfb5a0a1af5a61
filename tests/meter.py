"""What the reference would ask of a GPU, counted on CPU tensors: how many operators run, and what memory they hold."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.ops import reference
from pkmem.ops.backends import Backend
from pkmem.ops.reference import chunks

_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive")


class Meter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        num_operators: that were dispatched, views included.
        num_waits: of them, those for which the host would wait for a GPU; a copy to the host does not show here.
        peak_bytes: the most that tensors held at once that were made meanwhile. What a kernel takes for itself, such as
            the sorting of a GPU's top-k, does not show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = self.num_waits = self.peak_bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def kept_bytes(self) -> int:
        """Bytes that are held now."""
        self._held = {place: (ref, size) for place, (ref, size) in self._held.items() if not ref.expired()}
        return sum(size for _, size in self._held.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = function(*args, **(kwargs or {}))
        if function.namespace == "pkmem":  # what runs inside is counted
            return made
        self.num_operators += 1
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(part, Tensor) and part.dtype == torch.bool for part in args[1]
        )
        self.num_waits += name in _WAITING or by_mask
        for leaf in tree_leaves(made):
            if type(leaf) is Tensor and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.kept_bytes)
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

    def size(item_bytes: int, *_: Any) -> int:
        return max(1, chunk_bytes // max(1, item_bytes))

    with mock.patch.multiple(reference, **replaced), mock.patch.object(chunks, "chunk_size", size), meter:
        yield


class Figures(NamedTuple):
    """What one part of a training step would ask of a GPU."""

    operators: int
    waits: int
    peak_bytes: int  # beyond what was there before and what is kept: the outputs


def of_a_training_step(config: MemoryConfig, tokens: int, dtype: torch.dtype, chunk_bytes: int) -> dict[str, Figures]:
    """A layer's forward, backward and RowAdam step on the reference; the moments are there already."""
    torch.manual_seed(0)
    memory = ProductKeyMemory(config).to(dtype)
    memory.backend = "reference"
    optimizer = RowAdam(memory)
    x = torch.randn(tokens, config.bound_dim, dtype=dtype, requires_grad=True)
    back = torch.randn(tokens, config.value_width, dtype=dtype)
    memory(x).backward(back)
    optimizer.step()
    figures = {}

    def count(part: str, run: Callable[[], Any]) -> Any:
        meter = Meter()
        with metered(meter, chunk_bytes):
            result = run()
        figures[part] = Figures(meter.num_operators, meter.num_waits, meter.peak_bytes - meter.kept_bytes)
        return result

    out = count("forward", lambda: memory(x))
    count("backward", lambda: out.backward(back))
    count("RowAdam step", optimizer.step)
    return figures
