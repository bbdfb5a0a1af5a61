"""Shards: what some processes wrote, any number of processes reads; and nothing that is not whole is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pkmem.files.documents import CheckpointError
from pkmem.training.shards import Shards
from saving_together import check_sharing


def test_what_four_processes_save_any_number_reads(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_sharing, (str(tmp_path),), nprocs=4)


def write_parts(folder: Path, parts: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Files of one part of the tensor "x" each, and the manifest's entry of a (4, 6) tensor."""
    folder.mkdir()
    for i, (offsets, shape) in enumerate(parts):
        notes = {"DCP_SHARDING_INFO": json.dumps({"x": {"saved_offsets": offsets}})}
        save_file({"x": torch.ones(shape)}, folder / f"shard-{i}.safetensors", notes)
    return {"x": {"dtype": "F32", "shape": [4, 6]}}


@pytest.mark.parametrize(
    "parts",
    [
        [([0, 0], [4, 6])],
        [([0, 0], [4, 2]), ([0, 2], [4, 4])],
        [([0, 0], [1, 6]), ([1, 0], [3, 6]), ([4, 0], [0, 6])],
        [([0, 0], [3, 4]), ([0, 4], [3, 2]), ([3, 0], [1, 4]), ([3, 4], [1, 2])],
    ],
)
def test_any_grid_of_parts_makes_up_a_tensor(parts: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    tensors = write_parts(tmp_path / "saved", parts)
    read = {"x": torch.zeros(4, 6)}
    shards = Shards(tmp_path / "saved", tensors)
    shards.read_into(read)
    assert torch.equal(read["x"], torch.ones(4, 6))
    assert torch.equal(torch.cat(list(shards.rows("x", 50))), torch.ones(4, 6))


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [([0, 0], [4, 2])],  # the tail is missing, which the files alone do not show
        [([0, 2], [4, 4])],
        [([0, 0], [4, 2]), ([0, 3], [4, 3])],
        [([0, 0], [4, 3]), ([0, 2], [4, 4])],
        [([0, 0], [4, 4]), ([0, 4], [3, 2])],
        [([0, 0], [3, 4]), ([0, 4], [3, 2]), ([3, 0], [1, 4])],
        [([0, 0], [4, 7])],
        [([0, 0], [4, 6]), ([0, 0], [4, 6])],
        [([0], [24])],
        [([4, 0], [0, 6])],
    ],
)
def test_parts_that_are_missing_or_overlap_are_refused(
    parts: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    tensors = write_parts(tmp_path / "saved", parts)
    with pytest.raises(CheckpointError, match=r"'x'.*(is not whole in|is in another file, too)"):
        Shards(tmp_path / "saved", tensors)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "saved", write_parts(tmp_path / "saved", [([0, 0], [4, 6])]))
    with pytest.raises(CheckpointError, match=r"has no 'y': it is of another model"):
        shards.read_into({"y": torch.zeros(4, 6)})
    with pytest.raises(CheckpointError, match=r"'x' has shape \(4, 6\) instead of \(4, 5\)"):
        shards.read_into({"x": torch.zeros(4, 5)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": {"dtype": "F64", "shape": [4, 6]}}, "another dtype"),
        ({"y": {"dtype": "F32", "shape": [4, 6]}}, "'x' is not in the manifest"),
        ({"x": {"dtype": "F32", "shape": ["4", 6]}}, "is not whole"),
        ({"x": {"dtype": "F32"}}, "is not whole"),
    ],
)
def test_a_manifest_of_other_tensors_is_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_parts(tmp_path / "saved", [([0, 0], [4, 6])])
    with pytest.raises(CheckpointError, match=message):
        Shards(tmp_path / "saved", tensors)
