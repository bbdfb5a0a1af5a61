"""Tables larger than a device: every process holds all rows of some columns of each table.

The processes of a mesh each have a batch of their own, and a table has columns / C of its width on each of C of them:

    slots, weights --to all C--> sums of own columns, for the tokens of all C --back to each--> whole sums

and the same way back. A sum of rows is made column by column, in the order of reading, so it is the same to the last bit
as on one process. Where there are several such groups ("replicate"), they exchange their reads before an update.
`shard_values` edits a model that is built already: a memory knows nothing of all this.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.crossing import AllProcesses, Connections, Crossing, gathered
from pkmem.layer.drawing import draw_normal, new_seed
from pkmem.layer.huge_pages import prefer_huge_pages
from pkmem.layer.query import MaskedBatchNorm
from pkmem.layer.replicas import with_replicas
from pkmem.layer.room import require_room
from pkmem.layer.values import NeuronTable, Table, tables_in
from pkmem.ops.reads import Reads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def shard_values(model: nn.Module, mesh: DeviceMesh) -> None:
    """Replaces the tables of a model by this process's columns of them, for training and reading by several processes.

    Every process of the mesh calls this, then makes its `RowAdam`, then wraps the rest by DistributedDataParallel, which
    leaves the tables alone, or by `fully_shard(model, ignored_params={table.weight for table in tables_in(model)})`.
    From then on all processes of a column group run every forward and backward pass of a memory together, with a batch
    of their own each, of any size. What comes out equals what one process would compute, and what is trained is the mean
    over all processes. Query batch norm takes the statistics of all processes' tokens.

    Args:
        model: a model with memories, the same on all processes; made inside `pkmem.undrawn_tables()` its tables are never
            whole, and are drawn here.
        mesh: with a dimension "columns", and before it "replicate" where groups of processes hold the same columns.

    Raises:
        ValueError: the mesh has other dimensions, the processes cannot share a width evenly, or the model has no table,
            one that is sharded already, or one that a RowAdam trains.

    Example:
        >>> mesh = init_device_mesh("cuda", (1, 8), mesh_dim_names=("replicate", "columns"))
        >>> pkmem.shard_values(model, mesh)
        >>> optimizer = pkmem.CombinedOptimizer(torch.optim.AdamW(pkmem.dense_parameters(model)), pkmem.RowAdam(model))
    """
    if _names(mesh) not in (("columns",), ("replicate", "columns")):
        raise ValueError(
            f"the mesh has the dimensions {_names(mesh)} but must have ('replicate', 'columns') or ('columns',)"
        )
    tables = tables_in(model)
    for table in tables:
        _check(table, mesh["columns"].size())
    if not tables or model in tables:
        raise ValueError("no table found inside: give shard_values a ProductKeyMemory or a model with one")
    processes = AllProcesses([mesh.get_group(name) for name in reversed(_names(mesh))])
    sharded = {table: _sharded(table, Shards(mesh, table.weight.shape[1])) for table in tables}
    for module in list(model.modules()):
        for name, part in list(module._modules.items()):  # one may be there twice
            if isinstance(part, Table) and part in sharded:
                setattr(module, name, sharded[part])
        if isinstance(module, MaskedBatchNorm):
            module.processes = processes
    for module in model.modules():
        names = [
            f"{name}.weight" if name else "weight" for name, part in module.named_modules() if isinstance(part, Table)
        ]
        if names:
            setattr(module, _IGNORED_BY_DDP, [*getattr(module, _IGNORED_BY_DDP, []), *names])


def _check(table: Table, num_columns: int) -> None:
    width = table.weight.shape[1]
    if isinstance(table, ShardedTable):
        raise ValueError("the tables are sharded already: call shard_values once")
    if table.log is not None:
        raise ValueError("a RowAdam trains the whole table: call shard_values first, and make the RowAdam after it")
    if width % num_columns:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        near = max(n for n in divisors if n <= num_columns)
        raise ValueError(
            f"{num_columns} processes cannot share {width} columns evenly: make the mesh's dimension 'columns' a divisor "
            f"of {width}, such as {near}, and 'replicate' the rest"
        )


def _sharded(table: Table, shards: Shards) -> ShardedTable:
    return (ShardedNeuronTable if isinstance(table, NeuronTable) else ShardedValueTable)(table, shards)


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ()


@final
class Shards(Connections):
    """Who holds what of a table: the columns here, the processes that hold the others, and those that hold the same.

    Implements `OtherProcesses`.

    Args:
        mesh: of dimensions "columns" and, where it has two, before it "replicate".
        width: columns of the whole table.

    Attributes:
        columns: the group of the processes that hold one whole table together.
        replicas: the group of those that hold the same columns, or None.
        first_column, num_columns: those held here.
    """

    def __init__(self, mesh: DeviceMesh, width: int) -> None:
        self.mesh, self.width = mesh, width
        self.columns = mesh.get_group("columns")
        self.num_columns = width // dist.get_world_size(self.columns)
        self.first_column = dist.get_rank(self.columns) * self.num_columns
        has_replicas = len(_names(mesh)) == 2 and mesh["replicate"].size() > 1
        self.replicas = mesh.get_group("replicate") if has_replicas else None

    @property
    def device(self) -> torch.device:
        """Where collectives of this mesh take their tensors from."""
        return torch.device(self.mesh.device_type)

    def here(self, whole: Tensor) -> Tensor:
        """The columns (m, v / C) of a whole tensor (m, v) that are held here."""
        return whole[:, self.first_column : self.first_column + self.num_columns]

    def crossing(self, slots: Tensor) -> Crossing:
        """The way between the processes that share the columns, for the tokens that read these slots (n, ...)."""
        return Crossing(self.columns, slots, self.mesh.size())

    def first_of_all(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, on all."""
        tensor = tensor.to(self.device)
        for group in filter(None, (self.columns, self.replicas)):
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group)
        return tensor

    def reads_of_replicas(self, reads: Reads) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """See `OtherProcesses`."""
        if self.replicas is None:
            return None
        return with_replicas(reads, self.num_columns, self.device, self.replicas)

    def norm(self, norm: Tensor) -> Tensor:
        """See `OtherProcesses`."""
        return functools.reduce(torch.hypot, gathered(norm.to(self.device), self.columns))

    def is_finite(self, here: Tensor) -> Tensor:
        """See `OtherProcesses`."""
        return gathered(here.to(self.device, torch.uint8), self.columns).bool().all()

    def means(self, here: Tensor) -> Tensor:
        """See `OtherProcesses`."""
        return gathered(here.to(self.device), self.columns).mean(0)

    def as_distributed(self, part: Tensor) -> Tensor:
        """See `OtherProcesses`."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements = [Shard(1) if name == "columns" else Replicate() for name in _names(self.mesh)]
        return DTensor.from_local(part, self.mesh, placements, run_check=False)

    def part_of(self, whole: Tensor) -> Tensor:
        """See `OtherProcesses`."""
        if hasattr(whole, "to_local"):
            return whole.to_local()
        return whole if whole.shape[1] == self.num_columns else self.here(whole)


class ShardedTable(Table):
    """The columns of a table that this process holds; abstract.

    Its state dict has the table as a DTensor of which every process holds its part, and it loads such a one, or a whole.

    Args:
        whole: the table, drawn or not.
        shards: who holds what.

    Attributes:
        others: the same, as the optimizer sees it.
    """

    def __init__(self, whole: Table, shards: Shards) -> None:
        nn.Module.__init__(self)
        self.shards, self.backend, self.std = shards, whole.backend, whole.std
        self.log, self.mapped = None, None
        given = whole.weight.detach()
        shape = (len(given), shards.num_columns)
        device = shards.device if given.is_meta else given.device
        require_room(f"{shape[1]} columns of {shape[0]:,} rows", shape[0] * shape[1], device, given.dtype)
        here = prefer_huge_pages(torch.empty(shape, dtype=given.dtype, device=device))
        self.weight = nn.Parameter(here, requires_grad=whole.weight.requires_grad)
        self._held = (self.weight,)
        self._is_hf_initialized = True  # not to be drawn again by transformers' own rule
        self.seed = shards.first_of_all(whole.seed).cpu()
        if given.is_meta:
            self.draw()
        else:
            here.copy_(shards.here(given))
            if shards.replicas is not None:
                dist.broadcast(here, dist.get_global_rank(shards.replicas, 0), shards.replicas)
        self.train(whole.training)

    @property
    def others(self) -> Shards:
        """See `Table.others`."""
        return self.shards

    @property
    def num_parameters(self) -> int:
        """See `Table.num_parameters`."""
        return len(self.weight) * self.shards.width

    def reset_parameters(self) -> None:
        """As a whole table's, the same on all processes."""
        self.seed = self.shards.first_of_all(new_seed()).cpu()
        self.draw()

    def draw(self) -> None:
        """The columns held here, by the seed."""
        draw_normal(self.weight, self.std, self.seed, self.shards.first_column, self.shards.width)

    def extra_repr(self) -> str:
        last = self.shards.first_column + self.shards.num_columns
        return f"num_slots={len(self.weight)}, columns {self.shards.first_column} to {last} of {self.shards.width}"

    def _crossing(self, slots: Tensor) -> Crossing:
        """The way to the other columns, if this table is what it was made as.

        Raises:
            RuntimeError: something has put another weight in its place, or the replicas would drift apart.
        """
        if self.weight is not self._held[0]:
            raise RuntimeError(
                "something has put another weight in place of a sharded table's: leave the tables out of fully_shard with "
                "ignored_params={table.weight for table in pkmem.tables_in(model)}"
            )
        parallel = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if parallel is not None and any(part is self.weight for part in parallel._module_parameters):
            raise RuntimeError(
                "DistributedDataParallel has made the same columns of a sharded table on all processes: give it the very "
                "module that shard_values was given, or one inside, or name the tables among the parameters to ignore"
            )
        is_trained = torch.is_grad_enabled() and self.weight.requires_grad and self.training
        if is_trained and self.log is None and self.shards.replicas is not None:
            raise RuntimeError(
                "the replicas of a sharded table would drift apart, since nothing exchanges their gradients: make a "
                "pkmem.RowAdam for the tables, which does, or a mesh without replicas, or freeze the tables"
            )
        return self.shards.crossing(slots)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.shards.as_distributed(self.weight.detach())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict = {**state_dict, name: self.shards.part_of(state_dict[name])}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._held = (self.weight,)  # load_state_dict(assign=True) puts a new one in


@final
class ShardedValueTable(ShardedTable):
    """A `ValueTable` of which this process holds some columns."""

    @torch.compiler.disable  # how many tokens the others have is known when it runs
    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """See `ValueTable.forward`; collective."""
        crossing = self._crossing(slots)
        sums = ops.weighted_sum(
            self.weight,
            crossing.slots(slots, len(self.weight)),
            crossing.to_all(weights),
            log=self.log_of_reads(),
            backend=self.backend,
        )
        return crossing.joined(sums)


@final
class ShardedNeuronTable(ShardedTable):
    """A `NeuronTable` of which this process holds some columns."""

    @torch.compiler.disable
    def forward(self, slots: Tensor, x: Tensor) -> Tensor:
        """See `NeuronTable.forward`; collective. Inner products are summed over the processes."""
        crossing = self._crossing(slots)
        products = ops.row_products(
            self.weight,
            crossing.slots(slots, len(self.weight)),
            crossing.to_columns(x),
            log=self.log_of_reads(),
            backend=self.backend,
        )
        return crossing.summed(products)
