"""What a backend is, and the only place where one is chosen and imported."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from importlib.util import find_spec
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from pkmem.ops import verdict
from pkmem.ops.arguments import AdamStep, LayerWeights, SortedReads
from pkmem.ops.verdict import DTYPES, HUGE_ELEMENTS, LEAST_CAPABILITY

BACKENDS = ("reference", "cpu", "triton")
_ADVISED = Event()  # one line per process says what `pkmem doctor` would do


class Backend(Protocol):
    """A module with these functions: what the operators of `pkmem.ops` and `pkmem.RowAdam` run on one kind of device.

    All tensors of a call are on one device; shapes, ranges and dtypes were checked by the caller. Floating inputs are
    fp64, fp32, bf16 or fp16, of any strides, with n, b, r >= 0. Sums are accumulated in fp32, in fp64 where an input is
    fp64, in the same order in every run on the same device and shapes. A NaN or an infinity stays with its token and
    its row; only in the gradients of query and sub_keys it may reach all of its head.
    """

    def product_key_topk(self, query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
        """The `knn` slots of the best pairs of sub-keys, by brute force's own rule (section 3.1, eq. 4).

        Args:
            query: (n, h, q). sub_keys: (h, 2, s, q / 2). knn: in [1, s].

        Returns:
            scores: (n, h, knn) fp32 (fp64 for fp64 queries), best first. A NaN counts as a number above infinity, or
                below minus infinity if its sign is set.
            slots: (n, h, knn) int64, always in [0, s ** 2) and different; equal scores by lower slot.
        """

    def product_key_topk_backward(
        self, grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the scores of `slots` in query and sub_keys, in their shapes and dtypes.

        Args:
            grad_scores: (n, h, knn) in the dtype of the scores. query, sub_keys: as in `product_key_topk`.
            slots: (n, h, knn) as it returned them.
        """

    def flat_topk(self, query: Tensor, keys: Tensor, knn: int) -> Tensor:
        """The slots (n, h, knn) int64 of the best of the keys (h, m, q), in the order of `product_key_topk`."""

    def weighted_sum(self, values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Sums of weighted rows (section 3.1, eq. 3).

        Args:
            values: (m, v). slots: (n, b) int64 in [0, m). weights: (n, b).

        Returns:
            (n, v) in the dtype of values.
        """

    def packed_sum(self, rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> Tensor:
        """Sums of weighted rows that are packed in few bits, see `pkmem.ops.packing`.

        Args:
            rows: (m, row_bytes) uint8. slots: (n, b) int64 in [0, m). weights: (n, b).
            width: of an unpacked row. bits: of a number, 8 or 4.

        Returns:
            (n, width) fp32.
        """

    def row_products(self, table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        """The inner product of each row read with its token; also the gradient of `weighted_sum` in its weights.

        Args:
            table: (m, d). slots: (n, b) int64 in [0, m). x: (n, d).

        Returns:
            (n, b) fp32 (fp64 for an fp64 table).
        """

    def sort_reads(
        self, slots: list[Tensor], weights: list[Tensor], grad_outputs: list[Tensor], num_rows: int
    ) -> SortedReads:
        """Groups the reads of several backward passes by row, stably; at least one pass.

        Args:
            slots, weights: per pass (n, b). grad_outputs: per pass (n, v), of one dtype.
            num_rows: rows of the table, above every slot.
        """

    def weighted_sum_grad_values(self, reads: SortedReads, num_rows: int) -> Tensor:
        """The dense gradient (m, v) of a table of `num_rows` rows, in the dtype of grad_output."""

    def row_gradient_norm(self, reads: SortedReads) -> Tensor:
        """The Euclidean norm of the table's gradient, an fp64 scalar; not finite if any entry is not."""

    def row_gradient_norm_bound(self, reads: SortedReads) -> float:
        """At least `row_gradient_norm`, found without summing a row; not finite if any entry is not, or on a GPU.

        The square of a sum of n vectors is at most n times the sum of their squares (Cauchy-Schwarz). A GPU would have
        to be waited for.
        """

    def gradient_is_finite(self, reads: SortedReads) -> Tensor:
        """Whether every entry of the table's gradient is finite, a bool scalar."""

    def row_mean_squares(self, reads: SortedReads) -> Tensor:
        """The mean square of the gradient of each segment's row, (u,) fp64; anything where a segment is empty."""

    def adam_rows(
        self,
        values: Tensor,
        first_moment: Tensor | None,
        second_moment: Tensor,
        reads: SortedReads,
        update: AdamStep,
        mean_squares: Tensor | None = None,
    ) -> None:
        """Adam in place on the rows of a table that were read and their moments, and on no other.

        Args:
            values: (m, v).
            first_moment: (m, v); None keeps none, as with a first beta of 0.
            second_moment: (m, v); or (m,), of each row the mean square of its gradient.
            reads: of the table.
            update: the step.
            mean_squares: what `row_mean_squares` gives, where other columns of a row count as well; None takes these.
        """

    def decode(self, x: Tensor, layer: LayerWeights) -> Tensor | None:
        """The whole layer for a few tokens without gradient, in one call.

        Args:
            x: (n, d) fp32.
            layer: its weights, of shapes that agree.

        Returns:
            (n, v) in the dtype of values, fp32 where they are packed, or (n, d') fp32 behind a gate; None where the backend has no such kernel.
        """


def choose_backend(table: Tensor, backend: str | None = None, query: Tensor | None = None) -> str:
    """The backend of a call: the one asked for, else the fastest that has been found right for such tensors.

    On the CPU that is "cpu" where numba can be used. On CUDA and ROCm it is "triton" where `pkmem doctor` has found its
    kernels right, on this very GPU and with these versions, for the dtype of the call and for such a size: up to 2 ** 31
    elements, or more. What it finds counts from the next process on. Else it is "reference".

    Args:
        table: the rows that the call reads: values, sub-keys or keys.
        backend: one of `BACKENDS`; None for the fastest.
        query: what the rows are compared with, in a selection: the dtype of the call is what both promote to.

    Raises:
        ValueError: `backend` is not in `BACKENDS`.
    """
    if backend is None:
        if table.is_cpu:
            return _fastest_on_the_cpu()
        dtype = table.dtype if query is None else torch.promote_types(table.dtype, query.dtype)
        shapes = "huge" if table.numel() > HUGE_ELEMENTS else "usual"
        return _fastest_on(table.device.type, table.device.index, DTYPES.get(dtype), shapes)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r} but must be one of {', '.join(BACKENDS)}")
    return backend


def _fastest_on_the_cpu() -> str:
    if _why_no_kernels() is None:
        return "cpu"
    _warn_of_the_reference()
    return "reference"


def _fastest_on(device_type: str, index: int | None, dtype: str | None, shapes: str) -> str:
    if device_type != "cuda" or dtype is None:
        return "reference"
    return _fastest_on_gpu(index or 0, dtype, shapes)


# `torch.compiler.assume_constant_result`, without importing the compiler: it would trace the import of numba.
_fastest_on_the_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
_fastest_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _fastest_on_gpu(index: int, dtype: str, shapes: str) -> str:
    device = torch.device("cuda", index)
    if why_unfit(device) is not None:  # nothing that the doctor could change
        return "reference"
    passed = verdict.passed_on(device)
    if passed is None:
        _advise(
            f"on {device}, since `pkmem doctor` has not checked the Triton kernels there: it does, and switches them on"
        )
    elif (dtype, shapes) not in passed:
        what = f"{dtype}, tables past 2^31 elements" if shapes == "huge" else dtype
        _advise(
            f"for {what} on {device}: `pkmem doctor` has not found the Triton kernels right for it; run it to see why"
        )
    elif why := why_not("triton", device):
        _advise(f"on {device}, since Triton cannot be used: {why}")
    else:
        return "triton"
    return "reference"


def _advise(what: str) -> None:
    if not _ADVISED.is_set():
        _ADVISED.set()
        logging.getLogger("pkmem").warning("the slow reference runs %s", what)


def why_no_verdict() -> str | None:
    """Why what the Triton kernels compute in this process is not what a GPU computes; None where it is."""
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return None
    return "TRITON_INTERPRET is set, and what Triton's interpreter computes says nothing of a GPU: unset it"


def why_unfit(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be a CUDA or ROCm device's default, by what is known without importing Triton."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if why := why_no_verdict():
        return why
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
        return f"it has compute capability {found}, below {least}"
    return None


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device, in words; None where it can."""
    if backend == "cpu":
        return f"its kernels run on the CPU, not on {device.type}" if device.type != "cpu" else _why_no_kernels()
    if backend == "triton":
        if why := _why_no_triton():
            return why
        from pkmem.ops import triton

        return triton.why_not(device)
    return None


@functools.cache
def _why_no_kernels() -> str | None:
    """Why the CPU's kernels cannot run; None where they can."""
    if find_spec("numba") is None:
        return "numba is not installed: pip install 'pkmem[cpu]'"
    try:
        from pkmem.ops import cpu  # noqa: F401
    except Exception as error:  # numba raises many kinds: a numpy it does not know, a library that is missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"numba is installed but cannot be used ({reason})"
    return None


@functools.cache
def _why_no_triton() -> str | None:
    """Why Triton's kernels cannot be imported; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        from pkmem.ops import triton  # noqa: F401
    except Exception as error:
        return " ".join(str(error).split())
    return None


@functools.cache  # once
def _warn_of_the_reference() -> None:
    warnings.warn(f"the slow reference runs, since {_why_no_kernels()}", stacklevel=4)


@functools.cache
def backend_module(backend: str) -> Backend:
    """The module that implements `backend`, imported now.

    Raises:
        ValueError: it cannot run here.
    """
    if backend == "cpu":
        if why := _why_no_kernels():
            raise ValueError(f"backend 'cpu' cannot run: {why}")
        from pkmem.ops import cpu

        return cpu
    if backend == "triton":
        if why := _why_no_triton():
            raise ValueError(f"backend 'triton' cannot run: {why}")
        from pkmem.ops import triton

        return triton
    from pkmem.ops import reference

    return reference


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles what the first calls on `device` with a table of `dtype` would, so that nobody times a compiler."""
    if device.type == "cpu" and _fastest_on_the_cpu() == "cpu" and dtype != torch.float64:
        from pkmem.ops import cpu

        cpu.warmup((dtype,))
