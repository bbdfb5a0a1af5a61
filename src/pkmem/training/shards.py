"""The tensors of a checkpoint in the shards that its processes wrote, one safetensors file each.

`torch.distributed.checkpoint` plans who writes what (a replicated tensor is written once) and which windows of which
shards make up a tensor on another number of processes. Its own safetensors writer holds three copies of all that a
process writes; here it is streamed, into the same format, which `HuggingFaceStorageReader` of torch reads.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pkmem.files.documents import CheckpointError, parse_json
from pkmem.files.tensor_file import Digest, TensorFile, name_of, write_tensor_file
from pkmem.training.together import Together

_NOTE = "DCP_SHARDING_INFO"  # torch's name for where in the whole tensors a file's are


class Part(NamedTuple):
    """A window of a tensor."""

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Shard:
    """What one process writes of a checkpoint.

    Args:
        file: the name of its file.
        parts: name -> window of the tensor, none where others write it all.
        tensors: name -> dtype and shape of every whole tensor of the checkpoint, as the manifest holds them.
    """

    file: str
    parts: dict[str, Part]
    tensors: dict[str, dict[str, Any]]

    def copied(self) -> Shard:
        """The same with its numbers in memory of their own, on the CPU, which training leaves alone."""
        parts = {name: Part(part.offsets, part.tensor.to("cpu", copy=True)) for name, part in self.parts.items()}
        return replace(self, parts=parts)

    def write(self, folder: Path) -> dict[str, Digest]:
        """Writes the file, if there is anything to write, and has it on the disk.

        Returns:
            the file's name -> its size and hash.
        """
        if not self.parts:
            return {}
        layout = {name: (part.tensor.dtype, tuple(part.tensor.shape)) for name, part in self.parts.items()}
        places = {name: {"saved_offsets": list(part.offsets)} for name, part in self.parts.items()}
        notes = {_NOTE: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        return {
            self.file: write_tensor_file(
                folder / self.file, layout, lambda name: iter([self.parts[name].tensor]), notes
            )
        }


def plan_shard(tensors: Mapping[str, Tensor], together: Together) -> Shard:
    """This process's shard of tensors that are plain (the same in all processes) or DTensors.

    Args:
        tensors: by name, the same names in all processes.
        together: all processes that hold them.

    Raises:
        CheckpointError: the shards do not make up the tensors.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)  # in each: the plan of all follows from those of each
    try:
        plans, metadata = planner.create_global_plan(together.each(planner.create_local_plan))
    except ValueError as error:
        raise CheckpointError(f"the processes do not hold the same tensors ({error})") from error
    plan = planner.finish_plan(plans[together.rank])
    parts = {}
    for item in plan.items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        parts[item.index.fqn] = Part(tuple(item.index.offset or ()), tensor.detach())
    whole = {name: t for name, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
    return Shard(
        f"shard-{together.rank + 1:05}-of-{together.size:05}.safetensors",
        parts,
        {name: {"dtype": name_of(t.properties.dtype), "shape": list(t.size)} for name, t in whole.items()},
    )


class Shards:
    """The whole tensors that the files of a checkpoint hold, none read before it is asked for.

    Args:
        folder: of the checkpoint.
        tensors: name -> dtype and shape of each whole tensor, from the manifest.

    Raises:
        CheckpointError: a file is no safetensors, or the files do not hold every number of every tensor exactly once.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        self._parts: dict[str, dict[tuple[int, ...], TensorFile]] = {name: {} for name in tensors}
        for path in sorted(folder.glob("*.safetensors")):
            file = TensorFile(path)
            for name, offsets in _places(file).items():
                if name not in tensors:
                    raise CheckpointError(f"{path}: {name!r} is not in the manifest; use another checkpoint")
                if name_of(file.stored[name].dtype) != tensors[name].get("dtype"):
                    raise CheckpointError(f"{path}: {name!r} has another dtype in the manifest; use another checkpoint")
                if offsets in self._parts[name]:
                    raise CheckpointError(f"{path}: {name!r} is in another file, too; use another checkpoint")
                self._parts[name][offsets] = file
        for name, tensor in tensors.items():
            _require_cover(folder, name, tensor.get("shape"), self._parts[name])
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        file = next(iter(self._parts[name].values()))
        return file.stored[name].dtype

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fills tensors, plain or DTensors of any placement, with what is stored under their names.

        Raises:
            CheckpointError: a name is not there, or has another shape.
        """
        for name, tensor in tensors.items():
            if name not in self.shapes:
                raise CheckpointError(f"{self.folder} has no {name!r}: it is of another model")
            if self.shapes[name] != tuple(tensor.shape):
                raise CheckpointError(
                    f"{self.folder}: {name!r} has shape {self.shapes[name]} instead of {tuple(tensor.shape)}: it is of "
                    "another model"
                )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, Metadata({name: self._described(name) for name in tensors}), True)
        for item in planner.create_local_plan().items:
            name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            window = tuple(slice(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item)
            target.copy_(self._parts[name][offsets][name][window])
            planner.commit_tensor(item, target)

    def rows(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        """A whole tensor, some rows at a time, about `chunk_bytes` of them."""
        shape = self.shapes[name]
        if not shape:
            ((_, file),) = self._parts[name].items()
            yield file[name]
            return
        row_bytes = math.prod(shape[1:]) * self.dtype(name).itemsize
        num_rows = max(1, chunk_bytes // max(1, row_bytes))
        for start in range(0, shape[0], num_rows):
            rows = torch.empty((min(num_rows, shape[0] - start), *shape[1:]), dtype=self.dtype(name), device="cpu")
            for offsets, file in self._parts[name].items():
                part = file[name]
                first, last = max(start, offsets[0]), min(start + len(rows), offsets[0] + len(part))
                if first < last:
                    window = [slice(first - start, last - start)]
                    window += [slice(at, at + n) for at, n in zip(offsets[1:], part.shape[1:], strict=True)]
                    rows[tuple(window)].copy_(part[first - offsets[0] : last - offsets[0]])
            yield rows

    def _described(self, name: str) -> TensorStorageMetadata:
        """As torch's planner wants it."""
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(file.stored[name].shape))
            for offsets, file in self._parts[name].items()
        ]
        return TensorStorageMetadata(TensorProperties(self.dtype(name)), torch.Size(self.shapes[name]), chunks)


def _places(file: TensorFile) -> dict[str, tuple[int, ...]]:
    """Where in the whole tensors those of a file are."""
    noted = parse_json(file.notes.get(_NOTE, "{}").encode(), file.path)
    places = {}
    for name, stored in file.stored.items():
        place = noted.get(name) if isinstance(noted, dict) else None
        offsets = place.get("saved_offsets") if isinstance(place, dict) else None
        if offsets is None or not _are_sizes(offsets) or len(offsets) != len(stored.shape):
            raise CheckpointError(f"{file.path}: where {name!r} belongs is not in it; use another checkpoint")
        places[name] = tuple(offsets)
    return places


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _require_cover(folder: Path, name: str, shape: Any, parts: Mapping[tuple[int, ...], TensorFile]) -> None:
    """Refuses parts that are not the cells of a grid over the whole tensor, as the shards of a mesh are."""
    sizes = {offsets: file.stored[name].shape for offsets, file in parts.items()}
    holds = bool(sizes) and _are_sizes(shape) and all(len(offsets) == len(shape) for offsets in sizes)
    if holds:
        filled = {offsets: size for offsets, size in sizes.items() if math.prod(size)}
        edges = [sorted({0, *(offsets[dim] for offsets in filled)}) for dim in range(len(shape))]
        ends = [dict(itertools.pairwise([*edge, full])) for edge, full in zip(edges, shape, strict=True)]
        holds = len(filled) == (math.prod(map(len, edges)) if math.prod(shape) else 0) and all(
            at + n == ends[dim].get(at)
            for offsets, size in filled.items()
            for dim, (at, n) in enumerate(zip(offsets, size, strict=True))
        )
    if not holds:
        files = ", ".join(sorted({file.path.name for file in parts.values()})) or "no file"
        raise CheckpointError(
            f"{folder}: {name!r} of shape {shape} is not whole in {files}: a shard is missing or repeated; use another "
            "checkpoint"
        )
