"""One micro-batch of a training step, run without numbers: every operator with its work, and the memory held meanwhile.

The real model runs forward and backward on torch's fake tensors, which have shapes and dtypes but no memory. So nothing
need be known here of a family of decoders or of autocast, and a table may have any size.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from pkmem.layer.memory import memories_in
from pkmem.layer.optim import RowAdam, dense_parameters
from pkmem.layer.values import Table, tables_in
from pkmem.lm.build import build_model
from pkmem.ops.reading_log import RowGradient
from pkmem.planning.wire import TableReads
from pkmem.training.parallel import blocks_of
from pkmem.training.recipe import Recipe
from pkmem.training.start import compute_again_in_backward

_aten, _pkmem = torch.ops.aten, torch.ops.pkmem
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather, _aten.nll_loss_forward}
_ROWS = {_pkmem.weighted_sum, _pkmem.weighted_sum_logged, _pkmem.row_products, _pkmem.row_products_logged}
_ATTENTION = {  # products of (tokens, tokens, width) that torch's counter does not know of
    _aten._scaled_dot_product_flash_attention_for_cpu: 2,  # queries with keys, weights with values
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,  # the scores anew, and four gradients
}


@dataclass(frozen=True)
class Operation:
    """An operator and its work.

    Attributes:
        name: as torch calls it, such as aten.mm.default.
        flops: of its products, a multiplication and an addition counted as two; of causal attention the half.
        num_bytes: that it reads and writes; 0 where it only looks at a tensor otherwise.
        row_bytes: that it reads beside them as rows of a table, anywhere.
        dtype: of its products.
        call: the operator and its arguments, with `Blank`s for tensors; None where it could not be run on any numbers.
    """

    name: str
    flops: int
    num_bytes: int
    row_bytes: int
    dtype: torch.dtype = torch.float32
    call: Any = None


class Blank(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Trace:
    """What a micro-batch does on a device that holds the whole model.

    Attributes:
        forward, backward: their operations, in order.
        changes: of the memory held meanwhile beside the weights: bytes taken or, negative, given back, and whose: 0 for
            activations, 1 for gradients of the dense weights, 2 for those of tables.
        tables: as the model reads them.
        dense_params, dense_bytes: numbers and bytes of all weights that are not tables.
        block_bytes: of the largest block's part of them.
        outside_bytes: of them outside all blocks, as of embeddings.
        buffer_bytes: of the model's statistics and constants.
    """

    forward: list[Operation]
    backward: list[Operation]
    changes: list[tuple[int, int]]
    tables: list[TableReads]
    dense_params: int
    dense_bytes: int
    block_bytes: int
    outside_bytes: int
    buffer_bytes: int

    def peak(self, dense_share: float = 1.0, table_share: float = 1.0) -> tuple[int, int, int]:
        """Bytes of activations, gradients of dense weights and gradients of tables when all together are most.

        Args:
            dense_share: of each gradient of a dense weight, what this process keeps, in (0, 1].
            table_share: of each dense gradient of a table, in (0, 1].
        """
        shares, held, peak = (1.0, dense_share, table_share), [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for num_bytes, whose in self.changes:
            held[whose] += num_bytes * shares[whose]
            if sum(held) > sum(peak):
                peak = list(held)
        activations, dense, tables = map(round, peak)
        return activations, dense, tables


def trace_step(recipe: Recipe, sequences: int) -> Trace:
    """Traces the last micro-batch of an update, when the gradients of those before it are there.

    Args:
        recipe: a training run; its vocabulary is taken to be full.
        sequences: of the micro-batch, >= 1.

    Raises:
        ValueError: the model cannot be built.
    """
    if recipe.model.pretrained is not None or recipe.training.train != "all":
        raise ValueError(
            "what is planned is a fresh model that is trained whole: leave out model.pretrained and training.train, and "
            "describe a model of the same sizes by model.num_layers, model.width, ..."
        )
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _put_on_cpu(model)
        model.train()
        if recipe.training.gradient_checkpointing:
            compute_again_in_backward(model)
        tables = tables_in(model)
        trains_rows = tables and recipe.training.value_grad == "rows"
        optimizer = RowAdam(tables) if trains_rows else None  # while it lives, gradients of tables are reads
        forward: Any = model.forward
        if recipe.training.precision == "bf16":
            forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
        ids = torch.zeros(sequences, recipe.model.context_tokens, dtype=torch.int64)
        tracer = _Tracer()
        with tracer:
            for _ in range(min(2, recipe.training.micro_batches)):
                tracer.operations.clear()
                loss = forward(input_ids=ids, labels=ids).loss
                num_forward = len(tracer.operations)
                loss.backward()
        del optimizer
    weights = {table.weight for table in tables}
    owners = {p.grad.untyped_storage(): 2 if p in weights else 1 for p in model.parameters() if _is_plain(p.grad)}
    dense_bytes = _dense_bytes(model)
    blocks = [_dense_bytes(block) for block in blocks_of(model)]
    return Trace(
        tracer.operations[:num_forward],
        tracer.operations[num_forward:],
        tracer.changes_of(owners),
        _reads(model),
        dense_params=sum(weight.numel() for weight in dense_parameters(model)),
        dense_bytes=dense_bytes,
        block_bytes=max(blocks, default=0),
        outside_bytes=dense_bytes - sum(blocks),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def _dense_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in dense_parameters(module))


def _put_on_cpu(model: nn.Module) -> None:
    """Takes a model off the meta device, weights that are shared once."""
    twins: dict[Tensor, Tensor] = {}
    for part in model.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor not in twins:
                twin = torch.empty_like(tensor, device="cpu")
                twins[tensor] = nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
            setattr(part, name, twins[tensor])


def _reads(model: nn.Module) -> list[TableReads]:
    """How each table is read, a shared one once."""
    readers: dict[Table, list[int]] = {}
    for memory in memories_in(model).values():
        for table in filter(None, (memory.values, memory.neurons)):
            readers.setdefault(table, []).append(memory.config.heads * memory.config.knn)
    return [
        TableReads(*_shape(table), sum(reads), len(reads), table.weight.element_size())
        for table, reads in readers.items()
    ]


def _shape(table: Table) -> tuple[int, int]:
    num_slots, width = table.weight.shape
    return num_slots, width


class _Tracer(TorchDispatchMode):
    """Sees every operator.

    Attributes:
        operations: seen so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._changes: list[tuple[int, int]] = []  # bytes, and the number of the memory
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    def changes_of(self, owners: dict[torch.UntypedStorage, int]) -> list[tuple[int, int]]:
        """See `Trace.changes`; who has none in `owners` is an activation."""
        numbers = {self._numbers[storage]: owner for storage, owner in owners.items() if storage in self._numbers}
        return [(num_bytes, numbers.get(number, 0)) for num_bytes, number in self._changes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf)]
        there = {tensor.untyped_storage() for tensor in given}
        results = [leaf for leaf in tree_leaves(out) if _is_plain(leaf)]
        made = {tensor.untyped_storage() for tensor in results} - there
        for storage in made:
            self._take(storage)
        if made or func._schema.is_mutable:
            made_bytes = sum(storage.nbytes() for storage in made)
            self.operations.append(_operation(func, args, kwargs, out, given, results, made_bytes))
        else:
            self.operations.append(Operation(str(func), 0, 0, 0))
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        number, size = next(self._count), storage.nbytes()
        self._numbers[storage] = number
        self._changes.append((size, number))
        weakref.finalize(storage, self._changes.append, (-size, number)).atexit = False


def _operation(
    func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], results: list[Tensor], made_bytes: int
) -> Operation:
    packet, row_bytes = func.overloadpacket, 0
    if packet in _ROWS:
        table, slots = given[:2]
        row_bytes = slots.numel() * table.shape[1] * table.element_size()
        num_bytes = sum(map(_size, given[1:])) + made_bytes
    elif packet in _LOOKUPS:
        num_bytes = 2 * made_bytes + sum(_size(tensor) for tensor in given if not tensor.is_floating_point())
    elif packet is _pkmem.log_reads:
        num_bytes = 2 * sum(map(_size, given))  # copies
    else:
        num_bytes = sum(map(_size, given)) + sum(map(_size, results))
    dtype = next((tensor.dtype for tensor in given if tensor.is_floating_point()), torch.float32)
    is_alone = not row_bytes and packet is not _pkmem.log_reads
    call = (func, *tree_map_only(Tensor, _blank, (args, kwargs))) if is_alone else None
    return Operation(str(func), _flops(packet, args, kwargs, out), num_bytes, row_bytes, dtype, call)


def _blank(tensor: Tensor) -> Blank:
    return Blank(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet in _ATTENTION:
        query, key = args[:2] if packet is _aten._scaled_dot_product_flash_attention_for_cpu else args[1:3]
        is_causal = any(arg is True for arg in args)
        return _ATTENTION[packet] * 2 * prod(query.shape) * key.shape[-2] // (1 + is_causal)
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _size(tensor: Tensor) -> int:
    """Bytes of memory; an expanded tensor has fewer than numbers."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, RowGradient)
