"""One micro-batch of a training step, run without numbers: every operator with its work, and the memory held meanwhile.

The real model runs forward and backward on torch's fake tensors, which have shapes and dtypes but no memory. So what a
family of decoders does, or autocast, need not be known here, and a table may have any size.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pkmem.layer.optim import RowAdam, dense_parameters
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.ops.reading_log import RowGradient
from pkmem.training.recipe import Recipe

_aten, _pkmem = torch.ops.aten, torch.ops.pkmem
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather, _aten.nll_loss_forward}
_ROWS = {_pkmem.weighted_sum, _pkmem.weighted_sum_logged, _pkmem.row_products, _pkmem.row_products_logged}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,  # products of queries with keys, of weights with values
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,  # the scores anew, and four gradients
}


@dataclass(frozen=True)
class Operation:
    """An operator and its work.

    Attributes:
        name: as torch calls it, such as aten.mm.
        flops: of its products, a multiplication and an addition counted as two; the causal half of attention.
        num_bytes: that it reads and writes in order.
        row_bytes: that it reads as rows of a table, anywhere.
        made_bytes: of what it writes, in new memory.
        dtype: of its products.
        shapes: of its tensors.
    """

    name: str
    flops: int
    num_bytes: int
    row_bytes: int
    made_bytes: int
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Trace:
    """What a micro-batch does on one device, which holds the whole model.

    Attributes:
        operations: forward and backward, in order; what only looks at a tensor otherwise has no bytes.
        changes: of the memory held meanwhile beside weights and tables: bytes taken (or, negative, given back) and
            whether by a gradient of a weight.
        table_reads: per table, as `Reads` says.
        dense_bytes: of all weights but the tables.
    """

    operations: list[Operation]
    changes: list[tuple[int, bool]]
    table_reads: list[Reads]
    dense_bytes: int

    def peak(self, gradient_share: float = 1.0) -> tuple[int, int]:
        """Bytes of activations and of gradients at the moment when both together are most.

        Args:
            gradient_share: of each gradient that this process keeps, in (0, 1].
        """
        sums = itertools.accumulate(
            self.changes,
            lambda held, change: (held[0] + change[0] * (not change[1]), held[1] + change[0] * change[1]),
            initial=(0, 0),
        )
        activations, gradients = max(sums, key=lambda held: held[0] + held[1] * gradient_share)
        return activations, round(gradients * gradient_share)


@dataclass(frozen=True)
class Reads:
    """A table and what one micro-batch reads of it.

    Attributes:
        num_slots, width: m and v of the table.
        element_bytes: of one of its numbers.
        num_reads: of rows, by all memories that share it.
        num_tokens: tokens that read it, once per memory.
        back_bytes: of an element of what comes back to it, as of the memory's output.
        is_neurons: whether it holds the neurons of experts, which a hidden state is multiplied with.
    """

    num_slots: int
    width: int
    element_bytes: int
    num_reads: int
    num_tokens: int
    back_bytes: int
    is_neurons: bool

    @property
    def numel(self) -> int:
        """Numbers of the table."""
        return self.num_slots * self.width
