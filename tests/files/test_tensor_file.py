"""Safetensors files: written as the library writes them, and read with more suspicion."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from pkmem.files.documents import LARGEST_DOCUMENT, CheckpointError
from pkmem.files.tensor_file import TensorFile, digest_of, write_tensor_file

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "zeta": BASE.bfloat16(),
    "alpha": BASE.clone(),
    "a.0-d": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "int": torch.arange(5),
    "flags": BASE[0] > 2,
    "half": BASE[1].half(),
    "byte": torch.arange(3, dtype=torch.uint8),
    "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
    "naïve": torch.arange(3, dtype=torch.int16),
}


def written(path: Path, tensors: dict[str, torch.Tensor], notes: dict[str, str] | None = None) -> Path:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = write_tensor_file(path, layout, lambda name: iter([tensors[name]]), notes or {})
    assert digest == digest_of(path) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize("notes", [{}, {"format": "pt"}])
def test_a_file_is_the_librarys_byte_for_byte(notes: dict[str, str], tmp_path: Path) -> None:
    path = written(tmp_path / "ours", TENSORS, notes)
    assert path.read_bytes() == save(TENSORS, notes or None)
    file = TensorFile(path)
    assert file.notes == notes
    for name, tensor in TENSORS.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)


def test_the_first_tensor_begins_where_it_is_asked_to(tmp_path: Path) -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    path = tmp_path / "paged"
    assert write_tensor_file(path, layout, lambda name: iter([TENSORS[name]]), {}, begins_at=4096) == digest_of(path)
    assert min(stored.start for stored in TensorFile(path).stored.values()) == 4096
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("size", [-1, 1])
def test_a_mapped_file_that_changed_since_is_named(size: int, tmp_path: Path) -> None:
    path = written(tmp_path / "mapped", TENSORS)
    unread, file = TensorFile(path), TensorFile(path)
    file.require_unchanged()
    assert torch.equal(file["alpha"], TENSORS["alpha"])
    file.require_unchanged()
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + size)
    with pytest.raises(CheckpointError, match="mapped was cut or written to since it was opened: load the model again"):
        file.require_unchanged()
    with pytest.raises(CheckpointError, match="mapped was changed while it was opened: try again"):
        unread["alpha"]


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    views = {
        "transposed": BASE.T,
        "column": BASE[:, 1],
        "columns": BASE[:, 1:3],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "negative": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    loaded = load_file(written(tmp_path / "views", views))
    assert all(torch.equal(loaded[name], view) for name, view in views.items())


def test_a_tensor_is_written_without_a_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, seen = torch.zeros(3 << 20), []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda chunk: seen.append((chunk.data_ptr(), chunk.nbytes)) or to_cpu(chunk)
    )
    written(tmp_path / "table", {"table": table})
    assert sum(size for _, size in seen) == table.nbytes
    assert len(seen) == 2
    assert all(table.data_ptr() <= at < table.data_ptr() + table.nbytes for at, _ in seen)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x is torch\.complex128, which safetensors does not hold"):
        written(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex128)})


def place(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": place(), "y": place()}, 8, "'y' overlaps another"),
        ({"x": place(end=12, shape=[3]), "y": place(begin=8, end=16)}, 16, "'y' overlaps another"),
        ({"x": place(), "y": place(begin=12, end=20)}, 20, "bytes are left over"),
        ({"x": place(begin=4, end=12)}, 12, "bytes are left over"),
        ({"x": place()}, 9, "instead of"),
        ({"x": place()}, 7, "truncated"),
        ({"x": place(shape=[3])}, 8, "needs 12 bytes and has 8"),
        ({"x": place(shape=[1 << 62, 1 << 62])}, 8, "needs"),
        ({"x": place(begin=8, end=0)}, 8, "needs 8 bytes and has -8"),
        ({"x": place(shape=[-2])}, 8, "has no sizes"),
        ({"x": place(shape=[2.0])}, 8, "has no sizes"),
        ({"x": place(shape=[True, 2])}, 8, "has no sizes"),
        ({"x": place(shape="2")}, 8, "has no sizes"),
        ({"x": place(shape=[1] * 100 + [2])}, 8, "has no sizes"),
        ({"x": place(dtype="Q4")}, 8, "no dtype of torch"),
        ({"x": place(dtype=["F32"])}, 8, "no dtype of torch"),
        ({"x": place() | {"run": "me"}}, 8, "has no place"),
        ({"x": "F32"}, 8, "has no place"),
        ({"x": {"dtype": "F32"}}, 8, "has no place"),
        (["x"], 0, "is no object"),
        ({"__metadata__": {"a": 1}}, 0, "notes are no text"),
        ({"__metadata__": "a"}, 0, "notes are no text"),
    ],
)
def test_headers_that_no_save_wrote_are_refused(header: Any, data: int, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    with pytest.raises(CheckpointError, match=f"bad.safetensors.*{message}") as caught:
        TensorFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\1", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 2**64 - 1), "is refused"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
        (struct.pack("<Q", 14) + b'{"x":1, "x":2}', "stands twice"),
    ],
)
def test_files_that_are_none_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"bad.safetensors: .*{message}"):
        TensorFile(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: No such file"):
        TensorFile(tmp_path / "absent.safetensors")


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(200 << 20)
    with pytest.raises(CheckpointError, match=r"a header of 104,857,608 bytes is refused"):
        TensorFile(path)
    assert LARGEST_DOCUMENT < 100 << 20


@pytest.mark.parametrize("flipped", range(0, 200, 3))
def test_a_flipped_bit_in_the_header_gives_no_other_shape_of_data(flipped: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"x": torch.arange(6), "y": torch.ones(2, 3)}, path)
    content = bytearray(path.read_bytes())
    content[flipped % (len(content) - 72)] ^= 1 << flipped % 8
    path.write_bytes(content)
    try:
        stored = TensorFile(path).stored
    except CheckpointError:
        return
    assert sum(entry.stop - entry.start for entry in stored.values()) == 72
