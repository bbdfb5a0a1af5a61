"""Nested state: what is saved comes back bit for bit, and what is broken or would change is refused."""

import errno
import random
import signal
import struct
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pkmem.files.documents import CheckpointError, load_json, save_json
from pkmem.training.checkpoint import save_checkpoint, verify_checkpoint
from pkmem.training.state import load_state, rng_state, save_state, set_rng_state


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))
        assert torch.equal(a, b)
    elif isinstance(left, dict):
        assert [(type(key), key) for key in left] == [(type(key), key) for key in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float):
        assert struct.pack("d", left) == struct.pack("d", right)
    else:
        assert left == right


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- state --------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
DTYPES += [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:  # any bits at all: NaN payloads, infinities, subnormal numbers
        size = count * dtype.itemsize
        tensor = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).view(dtype)
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


floats = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("d", struct.pack("Q", bits))[0])
text = st.text(st.characters())  # lone surrogates included
leaves = st.none() | st.booleans() | st.integers() | floats | text | any_tensor()


def containers(inner: st.SearchStrategy) -> st.SearchStrategy:
    keys = text | st.integers() | st.sampled_from(["tensor", "tuple", "dict", "float", 0, "0"])
    dicts = st.dictionaries(keys, inner, max_size=3)
    lists = st.lists(inner, max_size=3)
    return lists | lists.map(tuple) | dicts | dicts.map(OrderedDict)


@given(st.recursive(leaves, containers, max_leaves=12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_nested_state_comes_back(tmp_path: Path, state: object) -> None:
    save_state(tmp_path / "state.v1.json", state)
    assert names(tmp_path) == {"state.v1.json"}
    assert_same(load_state(tmp_path / "state.v1.json"), state)


def test_awkward_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "same twice": [base, base],
        "overlapping views": (base[1:], base[:, 0], base.T),
        "expanded": torch.ones(1).expand(5),
        "0-d": torch.tensor(2, dtype=torch.bfloat16),
        "empty": [torch.empty(0), torch.empty(3, 0, dtype=torch.int64)],
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "negative view": torch.tensor([1 + 2j], dtype=torch.complex64).conj().imag,
    }
    save_state(tmp_path / "state.json", state)
    loaded = load_state(tmp_path / "state.json")
    for key in ("conjugate", "negative view"):
        assert torch.equal(loaded.pop(key), state.pop(key))
    assert_same(loaded, state)
    loaded["same twice"][0].zero_()  # no memory shared
    assert_same(loaded["same twice"][1], base)
    parameter = torch.nn.Parameter(torch.ones(2))
    save_state(tmp_path / "state.json", parameter)
    assert_same(load_state(tmp_path / "state.json"), parameter.detach())


@pytest.mark.parametrize(
    "bad",
    [
        {1, 2},
        Counter(),
        np.float64(1),
        signal.SIGTERM,
        torch.Size([1]),
        {(0, 1): 2},
        {True: 1},
        {None: 1},
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        lambda: None,
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_what_would_change_its_type_is_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(CheckpointError, match=r"^state\['a'\]\[1\]: cannot save this "):
        save_state(tmp_path / "state.json", {"a": [0, bad]})
    assert not names(tmp_path)


def test_truncated_state_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    save_state(file, {"x": torch.arange(3), "y": [1.5]})
    whole = file.read_bytes()
    for size in range(len(whole) - 1):  # the last byte is a newline
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"state\.json"):
            load_state(file)
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        load_state(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "document",
    [
        {"pickle": "gASVAAAA"},
        {"float": "zz"},
        {"float": "00"},
        {"tensor": ["float32", [2], "00"]},
        {"tensor": ["float32", [2**40], "00000000"]},
        {"tensor": ["load", [1], "00000000"]},
        {"tensor": ["float32", ["a"], "00000000"]},
        {"dict": [["a", 1, 2]]},
        {"dict": [[[], 1]]},
    ],
)
def test_what_no_save_wrote_is_refused(tmp_path: Path, document: object) -> None:
    save_json(tmp_path / "state.json", [document])
    with pytest.raises(CheckpointError, match=r"state\.json: no saved state"):
        load_state(tmp_path / "state.json")


def test_adam_resumes_bitwise(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, amsgrad=True)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(model, optimizer, scheduler, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
            scheduler.step()

    model, *rest = parts = build()
    train(*parts, 3)
    state = {"parts": [part.state_dict() for part in parts], "rng": rng_state()}
    path = save_checkpoint(tmp_path, 3, lambda folder: save_state(folder / "state.json", state))
    train(*parts, 3)
    expected = [part.state_dict() for part in parts]

    verify_checkpoint(path)
    model, *rest = parts = build()
    loaded = load_state(path / "state.json")
    for part, part_state in zip(parts, loaded["parts"], strict=True):
        part.load_state_dict(part_state)
    set_rng_state(loaded["rng"])
    train(model, *rest, 3)
    assert_same([part.state_dict() for part in parts], expected)


def test_rng_round_trip(tmp_path: Path) -> None:
    def draw() -> list:
        return [torch.rand(3).tolist(), random.random(), random.gauss(), np.random.rand(3).tolist()]  # noqa: NPY002

    def gaussians() -> list:  # both generators hold back the second of a pair
        return [random.gauss(), np.random.randn(), torch.randn(1).item()]  # noqa: NPY002

    gaussians()
    save_state(tmp_path / "rng.json", rng_state())
    expected = [gaussians(), draw()]
    draw()
    set_rng_state(load_state(tmp_path / "rng.json"))
    assert [gaussians(), draw()] == expected


# --- JSON ---------------------------------------------------------------------------------------------------


def test_json_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    save_json(file, {"loss": 1.5, "name": "é", "bad": float("inf")})
    save_json(file, {"loss": 2.5})
    with pytest.raises(TypeError):
        save_json(file, {"loss": object()})

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_json(file, {"loss": 3.5})
    assert load_json(file) == {"loss": 2.5}
    assert names(tmp_path) == {"summary.json"}


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"]
)
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json: not JSON"):
        load_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"absent\.json: No such file"):
        load_json(tmp_path / "absent.json")
