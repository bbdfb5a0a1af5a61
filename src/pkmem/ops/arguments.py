"""Arguments of a backend that go together: sorted reads, a step of Adam, the weights of a whole layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class SortedReads:
    """The reads of one table, grouped by row: a segment for each row that was read, ascending.

    A backend that does not wait for its device leaves room for as many rows as there can be: then further segments
    follow that are empty, whose `rows` hold no meaning.

    Args:
        rows: (u,) int64 row of each segment.
        offsets: (u + 1,) int64; the reads of segment i are offsets[i] up to offsets[i + 1].
        tokens: (r,) int64 row of `grad_output` each read belongs to; in order of reading within a row.
        weights: (r,) weight of each read.
        grad_output: (n, v) what came back to each token.
    """

    rows: Tensor
    offsets: Tensor
    tokens: Tensor
    weights: Tensor
    grad_output: Tensor

    @cached_property
    def host_offsets(self) -> Tensor:
        """The offsets of the segments that are not empty, in host memory; waits for the device, once."""
        offsets = self.offsets.cpu()
        return offsets[: int(offsets.diff().count_nonzero()) + 1]


def surely_finite(reads: SortedReads) -> Tensor:
    """Whether a bound shows, without summing anything, that a table's gradient is finite; a bool scalar."""
    if len(reads.tokens) == 0:  # of no numbers none is the largest
        return torch.ones((), dtype=torch.bool, device=reads.rows.device)
    weight, back = (_largest(part) for part in (reads.weights, reads.grad_output))
    return len(reads.tokens) * weight * back < torch.finfo(torch.float32).max / 2


def token_norms(reads: SortedReads) -> Tensor:
    """Of what came back to each token the norm, fp64, longer by more than sums in fp32 can err."""
    return 1.001 * torch.linalg.vector_norm(reads.grad_output, dim=1, dtype=torch.float64)


def _largest(numbers: Tensor) -> Tensor:
    """The largest magnitude, fp64, or NaN; a tenth of the time of a norm."""
    lowest, highest = numbers.aminmax()
    return torch.maximum(-lowest, highest).double()


class AdamStep(NamedTuple):
    """One step of Adam (Kingma & Ba 2015), or of Adagrad (Duchi et al. 2011).

    Args:
        lr, betas, eps: Adam's. Where the second beta is 1, squares are summed and not averaged, as in Adagrad.
        step: updates made so far, this one included, >= 1; corrects the bias of every row alike.
        scale: factor on the gradients (clipping), > 0; one that is not finite leaves everything as it is.
        seed: bf16 is rounded up or down at random, by seed, step, row and column alone; fp16 to nearest.
        first_column: of the table given, in the whole one of which it may be a part.
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: int | Tensor
    scale: float | Tensor
    seed: int = 0
    first_column: int = 0

    @property
    def rates(self) -> tuple[float, float]:
        """What a gradient adds to the first moment, and its square to the second."""
        return 1 - self.betas[0], 1.0 if self.betas[1] == 1 else 1 - self.betas[1]


NORM_TENSORS = {  # of each query norm, in the order in which `Backend.decode` takes them
    "batch": ("weight", "bias", "running_mean", "running_var"),
    "layer": ("weight", "bias"),
    "rms": ("weight",),
    "none": (),
}


class LayerWeights(NamedTuple):
    """A whole memory layer (Lample et al. 2019, section 3), as `Backend.decode` reads it; fp32 but for the values.

    Args:
        project, bias: (h * q, d) and (h * q,) the linear query network.
        norm: a key of `NORM_TENSORS`, the query's norm in evaluation mode.
        norm_tensors: as `NORM_TENSORS` names them, (h * q,) each for "batch", else (q,).
        eps: what the norm adds to the variance.
        sub_keys: (h, 2, s, q / 2).
        values: (s ** 2, v) fp32, bf16 or fp16; or packed rows (s ** 2, row_bytes) uint8, see `pkmem.ops.packing`.
        gate: None, or W1 (v, d) and W2 (d', v) of Memory+'s output `W2(m(x) * silu(W1 x))`.
        knn: slots per head, in [1, s].
        width: of a value, v.
        bits: of a number where the values are packed, 8 or 4; else None.
        ask_ahead: None, or asks for the rows of slots (n, h * knn) that are about to be read from a file.
    """

    project: Tensor
    bias: Tensor
    norm: str
    norm_tensors: tuple[Tensor, ...]
    eps: float
    sub_keys: Tensor
    values: Tensor
    gate: tuple[Tensor, Tensor] | None
    knn: int
    width: int
    bits: int | None = None
    ask_ahead: Callable[[Tensor], None] | None = None
