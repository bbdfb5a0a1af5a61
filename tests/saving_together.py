"""What tests of checkpoints run in several processes: shards written by some and read by others.

PYTEST_DONT_REWRITE: the tests import it.
"""

import errno
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from pkmem.files.documents import CheckpointError, load_json
from pkmem.files.tensor_file import TensorFile
from pkmem.training import shards as shards_module
from pkmem.training.checkpoint import newest_valid_checkpoint, open_shards, save_checkpoint, verify_checkpoint
from pkmem.training.named_state import load_model, load_optimizer, model_tensors, optimizer_state
from pkmem.training.saver import CheckpointSaver
from pkmem.training.shards import plan_shard
from pkmem.training.state import load_state, save_state
from pkmem.training.together import Together

NUM_ROWS = 7  # over four processes: 2, 2, 2, 1


def whole(step: int) -> dict[str, Tensor]:
    """The tensors of a step, as one process holds them."""
    counted = torch.arange(NUM_ROWS * 8.0).reshape(NUM_ROWS, 8) + 100 * step
    return {
        "table": counted,
        "moments": (counted / 3).bfloat16(),
        "rows": -counted[:, :3].double(),
        "plain": counted[0],
        "step": torch.tensor(float(step)),
        "flags": counted[:, 0] > 3,
        "none": torch.empty(0, 4),
    }


def placed(tensors: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The same as the processes of a mesh hold them: tables by columns, one by rows, the rest in each."""
    if mesh is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    replicated, columns = [Replicate()] * (mesh.ndim - 1), mesh.size(-1)
    here = mesh.get_local_rank(mesh.ndim - 1)
    made = {}
    for name, tensor in tensors.items():
        if name in ("table", "moments"):
            local = tensor.chunk(columns, 1)[here].clone()
            made[name] = DTensor.from_local(local, mesh, [*replicated, Shard(1)], run_check=False)
        elif name == "rows":
            flat = DeviceMesh("cpu", mesh.mesh.flatten()) if mesh.ndim > 1 else mesh
            local = tensor.chunk(flat.size(), 0)[flat.get_local_rank()].clone()
            made[name] = DTensor.from_local(
                local, flat, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        else:
            made[name] = tensor.clone()
    return made


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_read(checkpoint: Path, expected: dict[str, Tensor], mesh: DeviceMesh | None) -> None:
    """A checkpoint gives a mesh what it would hold of the whole tensors, bit for bit."""
    read, wanted = placed({name: torch.zeros_like(t) for name, t in expected.items()}, mesh), placed(expected, mesh)
    open_shards(checkpoint).read_into(read)
    for name, tensor in wanted.items():
        assert torch.equal(local(read[name]), local(tensor)), name


def check_failure(run: Path, together: Together, mesh: DeviceMesh) -> None:
    """A disk full on one process is the same error in all, and leaves nothing behind."""
    write = shards_module.write_tensor_file

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if together.rank == together.size - 1:
        shards_module.write_tensor_file = full
    shard = plan_shard(placed(whole(9), mesh), together)
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(run, 9, lambda folder: None, shard, together=together)
    shards_module.write_tensor_file = write
    said = together.each(lambda: str(caught.value))
    assert len(set(said)) == 1, said
    assert f"no space left in process {together.size - 1} " in said[0], said[0]
    assert "the previous checkpoint step-3 is intact" in said[0], said[0]
    assert not list((run / "checkpoints").glob("*.tmp"))


def check_background(run: Path, mesh: DeviceMesh) -> None:
    """A save in the background keeps the numbers of its moment; its failure is the next save's, in all processes."""
    saver = CheckpointSaver(run, in_background=True)
    tensors = placed(whole(4), mesh)
    with saver:
        saver.save(4, tensors, lambda folder: None)
        for tensor in tensors.values():
            local(tensor).zero_()
    check_read(run / "checkpoints" / "step-4", whole(4), mesh)
    write = shards_module.write_tensor_file

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if saver.together.rank == 1:
        shards_module.write_tensor_file = full
    saver.save(5, tensors, lambda folder: None)
    with pytest.raises(CheckpointError, match="no space left in process 1 "):
        saver.save(6, tensors, lambda folder: None)
    saver.save(6, tensors, lambda folder: None)
    with pytest.raises(CheckpointError, match="no space left in process 1 "), saver:
        pass
    shards_module.write_tensor_file = write
    dist.barrier()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-4"}


def check_sharing(rank: int, folder: str) -> None:
    """Four processes save, two of them read and save, one reads and saves, and four read."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4)
    run, four = Path(folder) / "run", Together(dist.new_group(backend="gloo"))
    pair = dist.new_group([0, 1])
    square = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("replicate", "columns"))
    line = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("columns",))
    two = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("columns",))
    final = save_checkpoint(
        run, 1, lambda folder: None, plan_shard(placed(whole(1), square), four), keep=9, together=four
    )
    for mesh in (square, line, None):
        check_read(final, whole(1), mesh)
    if rank == 0:
        check_files(final)
        check_torch_reads(final)
    if rank < 2:
        check_read(final, whole(1), two)
        together = Together(pair)
        shard = plan_shard(placed(whole(2), two), together)
        final = save_checkpoint(run, 2, lambda folder: None, shard, keep=9, together=together)
        check_read(final, whole(2), None)
    if rank == 0:
        shard = plan_shard(whole(3), Together())
        save_checkpoint(run, 3, lambda folder: None, shard, keep=9)
    dist.barrier()
    check_read(run / "checkpoints" / "step-2", whole(2), line)
    check_read(run / "checkpoints" / "step-3", whole(3), square)
    verify_checkpoint(final, four)
    check_failure(run, four, square)
    check_background(run, line)
    newest = run / "checkpoints" / "step-4"
    if rank == 0:
        (file,) = newest.glob("shard-00002*")
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    dist.barrier()
    skipped: list[str] = []
    assert newest_valid_checkpoint(run, skipped.append, four) == run / "checkpoints" / "step-3"
    assert len(skipped) == 1, skipped
    assert "shard-00002-of-00004.safetensors: its content changed" in skipped[0]
    dist.barrier()
    dist.destroy_process_group()


def check_files(checkpoint: Path) -> None:
    """Each number of a tensor is in one file, whoever holds it."""
    stored = [TensorFile(path).stored for path in sorted(checkpoint.glob("*.safetensors"))]
    for name, tensor in whole(1).items():
        kept = [file[name].shape for file in stored if name in file]
        assert sum(map(math.prod, kept)) == tensor.numel(), (name, kept)
    tensors = load_json(checkpoint / "manifest.json")["tensors"]
    assert {name: tuple(tensor["shape"]) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in whole(1).items()
    }
    assert max(sum(entry.stop - entry.start for entry in file.values()) for file in stored) < 400


def check_torch_reads(checkpoint: Path) -> None:
    """Torch's own reader of safetensors checkpoints reads the files, those it can."""
    read = {name: torch.zeros_like(tensor) for name, tensor in whole(1).items() if tensor.dim() and tensor.numel()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert all(torch.equal(tensor, whole(1)[name]) for name, tensor in read.items())


# A dense model under FSDP2 -----------------------------------------------------------------------------------

SHARDED_STEPS = 3


def dense_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """In fp64; 5 rows do not divide by 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, share: slice = slice(None)) -> None:
    """Steps on all of the batches, or on a process's share of them."""
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[share]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_sharded(rank: int, folder: str) -> None:
    """One of two processes: trains under FSDP2, saves, and goes on from what it saved to the same bits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    together, share = Together(dist.new_group(backend="gloo")), slice(2 * rank, 2 * rank + 2)
    made = []
    for _ in range(2):
        model, _ = dense_model()
        fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(2)))
        made.append((model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
    (model, optimizer), (resumed, its_optimizer) = made
    trained(model, optimizer, range(SHARDED_STEPS), share)
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.float64))  # an evaluation, which leaves parameters whole
    tensors, others = optimizer_state(model, optimizer)
    named = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    named |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    checkpoint = save_checkpoint(
        Path(folder) / "run",
        1,
        lambda folder: save_state(folder / "optimizer.json", others),
        plan_shard(named, together),
        together=together,
    )
    load_model(resumed, open_shards(checkpoint))
    load_optimizer(resumed, its_optimizer, open_shards(checkpoint), load_state(checkpoint / "optimizer.json"))
    for m, o in made:
        trained(m, o, range(SHARDED_STEPS, 2 * SHARDED_STEPS), share)
    for name, tensor in model.state_dict().items():
        assert torch.equal(local(tensor), local(resumed.state_dict()[name])), name
    dist.barrier()
    dist.destroy_process_group()
