"""What the tests of sharded tables run in several processes, and the same in one.

PYTEST_DONT_REWRITE: other processes import it, and it asserts nothing.
"""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

import pkmem
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam, shard_values, tables_in
from pkmem.layer.counting import count_parameters
from pkmem.layer.values import NeuronTable, Table, ValueTable
from pkmem.ops.reading_log import row_gradient

WIDTH, NUM_SLOTS = 12, 40
TOKENS = ((5, 7, 1, 3), (2, 4, 6, 1))  # of each process in each pass: uneven, and one of one token
CONFIG = MemoryConfig(dim=WIDTH, num_sub_keys=6, heads=2, knn=3, query_dim=4)


def mesh_of(shape: tuple[int, int]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "columns"))


def table_of(kind: str, dtype: torch.dtype) -> Table:
    torch.manual_seed(0)
    return (NeuronTable if kind == "neurons" else ValueTable)(NUM_SLOTS, WIDTH).to(dtype)


def reads(dtype: torch.dtype, world: int, idle: bool) -> Iterator[list[list[Tensor]]]:
    """Of each step, of each process: slots, weights or hidden states, and the gradient of what is read.

    With `idle` the last process has no token at all.
    """
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        parts = []
        for rank in range(world):
            n = 0 if idle and rank == world - 1 else TOKENS[step % 2][rank]
            slots = torch.randint(NUM_SLOTS // 2, (n, 2, 3), generator=draw)  # the other rows are never read
            parts.append([slots, *(torch.randn(n, 12, generator=draw).to(dtype) for _ in range(2))])
        yield parts


def read_and_step(table: Table, optimizer: RowAdam, part: list[Tensor], share: float, kind: str) -> list[Tensor]:
    """One pass and one update; returns what was read and the gradient of what it was read with."""
    slots, given, back = part
    if kind == "neurons":
        given = given.requires_grad_()
        out = table(slots, given)
        back = back[:, :6].reshape(out.shape)
    else:
        given = given[:, :6].reshape(slots.shape).requires_grad_()
        out = table(slots, given)
    # An output nobody asks a gradient of has no graph; each process's loss counts once in the mean.
    out.backward((back / share).to(out.dtype))
    grad = given.grad
    optimizer.step()
    return [out.detach(), grad]


def options_of(dtype: torch.dtype, clips: bool) -> dict[str, Any]:
    moments = {"moment_dtype": torch.bfloat16} if dtype == torch.bfloat16 else {}
    return {"lr": 0.1, "seed": 3, "max_norm": 0.5 if clips else None, **moments}


def lean_whole(world: int, has_first: bool) -> dict[str, Any]:
    """As `whole`, with one second moment a row."""
    table = table_of("values", torch.float64)
    optimizer = RowAdam(table, lr=0.1, second_moment="row", betas=(0.9 if has_first else 0.0, 0.98))
    for parts in reads(torch.float64, world, False):
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        read_and_step(table, optimizer, joined, world, "values")
    state = optimizer.state[table.weight]
    return {"weight": table.weight.detach(), **{k: v for k, v in state.items() if k.startswith("exp_avg")}}


def lean_sharded(shape: tuple[int, int], has_first: bool) -> dict[str, Any]:
    """The same on one of several processes; then a full state is loaded, whose second moments become those of rows."""
    holder = nn.Sequential(table_of("values", torch.float64))
    shard_values(holder, mesh_of(shape))
    optimizer = RowAdam(holder, lr=0.1, second_moment="row", betas=(0.9 if has_first else 0.0, 0.98))
    for parts in reads(torch.float64, dist.get_world_size(), False):
        read_and_step(holder[0], optimizer, parts[dist.get_rank()], 1, "values")
    state = optimizer.state_dict()["state"][0]
    found = {name: part for name, part in state.items() if name.startswith("exp_avg")}
    found = {name: part.full_tensor() if part.dim() == 2 else part for name, part in found.items()}
    found["weight"] = holder.state_dict()["0.weight"].full_tensor().clone()
    full = RowAdam(holder, lr=0.1)
    for parts in reads(torch.float64, dist.get_world_size(), False):
        read_and_step(holder[0], full, parts[dist.get_rank()], 1, "values")
    saved = full.state_dict()
    rows = RowAdam(holder, second_moment="row")
    rows.load_state_dict(saved)
    mean = saved["state"][0]["exp_avg_sq"].full_tensor().mean(1)
    converted = rows.state_dict()["state"][0]["exp_avg_sq"]
    return {**found, "converted": (converted, mean)}


def whole(kind: str, dtype: torch.dtype, world: int, idle: bool, clips: bool) -> dict[str, Any]:
    """One process with all tokens: outputs, gradients, the table and its moments after five steps."""
    table = table_of(kind, dtype)
    optimizer = RowAdam(table, **options_of(dtype, clips))
    outs = []
    for parts in reads(dtype, world, idle):
        joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        outs.append(
            [
                tensor.split([len(part[0]) for part in parts])
                for tensor in read_and_step(table, optimizer, joined, world, kind)
            ]
        )
    state = optimizer.state[table.weight]
    return {"outs": outs, "weight": table.weight.detach(), **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}


def sharded(kind: str, dtype: torch.dtype, shape: tuple[int, int], idle: bool, clips: bool) -> dict[str, Any]:
    """The same on one of several processes; the table and its moments as they leave in state dicts, made whole."""
    holder = nn.Sequential(table_of(kind, dtype))
    shard_values(holder, mesh_of(shape))
    optimizer = RowAdam(holder, **options_of(dtype, clips))
    rank, world = dist.get_rank(), dist.get_world_size()
    outs = [read_and_step(holder[0], optimizer, parts[rank], 1, kind) for parts in reads(dtype, world, idle)]
    state = optimizer.state_dict()["state"][0]
    return {
        "outs": outs,
        "weight": holder.state_dict()["0.weight"].full_tensor(),
        **{k: state[k].full_tensor() for k in ("exp_avg", "exp_avg_sq")},
        "held": tuple(holder[0].weight.shape),
    }


def model_of(experts: bool, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two memories that share a table, and one of its own; batch norm."""
    torch.manual_seed(0)
    config = MemoryConfig(**{**CONFIG.to_dict(), "experts": experts})
    first = ProductKeyMemory(config)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), first, ProductKeyMemory(config, values=first.values), ProductKeyMemory(config)
    ).to(dtype)


def batch(step: int, rank: int, real: bool) -> tuple[Tensor, Tensor | None]:
    """Hidden states of a process in a step and, unless all are real, their mask."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(TOKENS[step % 2][rank], WIDTH, generator=draw, dtype=torch.float64)
    return x, None if real else torch.rand(len(x), generator=draw) < 0.7


def losses_of(model: nn.Sequential, x: Tensor, mask: Tensor | None) -> Tensor:
    for part in model:
        x = part(x) if mask is None or not isinstance(part, ProductKeyMemory) else part(x, mask)
    return (x if mask is None else x[mask]).square().sum()


def whole_model(experts: bool, world: int, real: bool) -> dict[str, Tensor]:
    model = model_of(experts)
    optimizer = RowAdam(model, lr=0.1, eps=1e-3)  # a gradient that is 0 but for rounding moves nothing
    dense = torch.optim.SGD(pkmem.dense_parameters(model), 0.01)
    for step in range(0, 6, 2):
        for part in (step, step + 1):  # two micro-batches
            given = [batch(part, rank, real) for rank in range(world)]
            x = torch.cat([x for x, _ in given])
            mask = None if real else torch.cat([mask for _, mask in given])
            (losses_of(model, x, mask) / world).backward()
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    return model.state_dict()


def sharded_model(experts: bool, shape: tuple[int, int], real: bool, undrawn: bool) -> dict[str, Any]:
    if undrawn:
        with pkmem.undrawn_tables():
            model = model_of(experts)
    else:
        model = model_of(experts)
    shard_values(model, mesh_of(shape))
    parallel = nn.parallel.DistributedDataParallel(_Losses(model))
    optimizer = RowAdam(model, lr=0.1, eps=1e-3)  # a gradient that is 0 but for rounding moves nothing
    dense = torch.optim.SGD(pkmem.dense_parameters(model), 0.01)
    for step in range(0, 6, 2):
        with parallel.no_sync():
            parallel(*batch(step, dist.get_rank(), real)).backward()
        parallel(*batch(step + 1, dist.get_rank(), real)).backward()
        for each in (optimizer, dense):
            each.step()
            each.zero_grad()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}


class _Losses(nn.Module):
    """A model that returns a loss, for DistributedDataParallel to see its gradients."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in model._ddp_params_and_buffers_to_ignore]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return losses_of(self.model, x, mask)


def everyday(shape: tuple[int, int]) -> dict[str, object]:
    """What people do to a module, on one of several processes; what must hold comes back by name."""
    mesh = mesh_of(shape)
    model, whole = model_of(False), model_of(False)
    found: dict[str, object] = {}
    shard_values(model, mesh)
    held = {
        "drawn from seed and place": model.state_dict()["1.values.weight"].full_tensor().equal(whole[1].values.weight)
    }
    held["counted whole"] = count_parameters(model) == count_parameters(whole)
    held["shared once"] = model[1].values is model[2].values and len(tables_in(model)) == 2
    held["loads a whole state dict"] = False
    for weight in whole.parameters():
        weight.data += 1
    model.load_state_dict(whole.state_dict())
    held["loads a whole state dict"] = model.state_dict()["3.values.weight"].full_tensor().equal(whole[3].values.weight)
    twice = nn.ModuleList([shared := ValueTable(4, WIDTH), shared])
    shard_values(twice, mesh)
    held["a table that one module has twice"] = twice[0] is twice[1] and twice[0] is not shared
    twin = copy.deepcopy(model)
    held["a copy reads alike"] = twin.eval()(x := torch.randn(3, 12, dtype=torch.float64)).equal(model.eval()(x))
    with torch.no_grad():
        held["reads few tokens through the parts"] = torch.allclose(
            model(x[:1]), whole.eval()(x[:1]), rtol=0, atol=1e-12
        )
    model.load_state_dict(twin.state_dict(), assign=True)
    held["reads what was assigned"] = model(x).equal(twin(x))
    torch.manual_seed(dist.get_rank())
    model[3].reset_parameters()
    table = model[3].values
    others = [torch.empty_like(table.weight) for _ in range(dist.get_world_size())]
    dist.all_gather(others, table.weight.detach())
    held["drawn anew alike on replicas"] = all(others[r].equal(others[r % shape[1]]) for r in range(len(others)))
    for name, act in {
        "pickle": lambda: pickle.dumps(model),
        "twice": lambda: shard_values(model, mesh),
        "no table": lambda: shard_values(nn.Linear(2, 2), mesh),
        "no replicas' gradient": lambda: model.train()(x),
        "saved by one process": lambda: language_model(mesh).save_pretrained("nowhere"),
        "wrapped around": lambda: nn.parallel.DistributedDataParallel(nn.Sequential(twin)).train()(x),
    }.items():
        try:
            act()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = str(error)
    model.eval()
    model[3].values.weight = nn.Parameter(torch.zeros_like(model[3].values.weight))
    try:
        model(x)
    except RuntimeError as error:
        found["another weight"] = str(error)
    return {"held": held, "errors": found}


def refused(width: int) -> list[str]:
    mesh = mesh_of((1, 2))
    trained = nn.Sequential(ValueTable(4, 4))
    living = RowAdam(trained)
    said = []
    for model, given in (
        (nn.Sequential(ValueTable(4, width)), mesh),
        (trained, mesh),
        (trained, torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))),
    ):
        try:
            shard_values(model, given)
        except ValueError as error:
            said.append(str(error))
    del living
    return said


def clipped(shape: tuple[int, int]) -> list[float]:
    """What `clip_grad_norm_` and `RowAdam.grad_norm` say on each process of gradients of which each holds a part."""
    model = model_of(False)
    shard_values(model, mesh_of(shape))
    optimizer = RowAdam(model)
    losses_of(model, *batch(0, dist.get_rank(), True)).backward()
    tables = [table.weight for table in tables_in(model)]
    first = optimizer.grad_norm()
    second = nn.utils.clip_grad_norm_(tables, 1e-3).item()
    return [first, second, optimizer.grad_norm()]


def language_model(mesh: DeviceMesh) -> nn.Module:
    sizes = {"vocab_size": 32, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
    with pkmem.undrawn_tables():
        model = pkmem.add_memory(
            GPT2LMHeadModel(GPT2Config(**sizes)), [0], MemoryConfig(num_sub_keys=4, heads=1, knn=2)
        )
    shard_values(model, mesh)
    return model


def compiled_apart() -> str:
    """What a log says that a compiled backward pass appends to, where each process has the whole table."""
    table = ValueTable(4, 4)
    optimizer = RowAdam(table)
    gradient = row_gradient(table.weight, torch.zeros(1, 1).long(), torch.ones(1, 1), torch.ones(1, 4), "cpu", -1)
    try:
        table.log.append(gradient)
    except RuntimeError as error:
        return str(error)
    finally:
        del optimizer
    return ""


def compiled(mode: str) -> list[Tensor]:
    """Outputs of three updates, with the compiler or without."""
    model = model_of(False)
    shard_values(model, mesh_of((1, 2)))
    optimizer = RowAdam(model, lr=0.1, eps=1e-3)
    run = torch.compile(model, backend="aot_eager") if mode == "compiled" else model
    outs = []
    for step in range(3):
        outs.append(run(batch(step, dist.get_rank(), True)[0]))
        outs[-1].square().sum().backward()
        optimizer.step()
        model.zero_grad()
    return [out.detach() for out in outs]
