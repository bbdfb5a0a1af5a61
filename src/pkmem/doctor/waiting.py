"""Checks that the host does not wait for the device, so that graphs can be captured, and that compiled code logs its
reads: point 9."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pkmem.doctor.checks import Case, DoesNotApply, assert_same, check
from pkmem.doctor.step import Step
from pkmem.layer.config import MemoryConfig
from pkmem.layer.memory import ProductKeyMemory
from pkmem.layer.optim import RowAdam

_ROWS_ARE_GROUPED = "the reference waits for the number of rows read, by design"


@check(9, "nothing waits for the device in a training step, of the operators, of a layer with RowAdam, or in reading")
def waits(case: Case) -> None:
    """After a first call of each, which compiles."""
    if case.backend == "reference":
        raise DoesNotApply(_ROWS_ARE_GROUPED)
    if case.device.type == "cpu" and case.backend != "triton":
        raise DoesNotApply("a CPU waits for nobody")
    step = Step(case, case.sizes.step, case.sizes.step_width)
    calls: list[Callable[[], Any]] = [step.results, *(_layer_step(case, max_norm) for max_norm in (None, 1.0))]
    memory, x = _memory(case), case.there(case.normal(3, 16))
    calls.append(torch.no_grad()(lambda: memory.eval()(x)))
    for call in calls:
        call()
        with _nothing_waits(case.device):
            call()


@check(9, "a training step captured in a CUDA graph, replayed with other inputs")
def replays(case: Case) -> None:
    """Captured after a first call, and by a call that is the first with such shapes."""
    if case.backend == "reference":
        raise DoesNotApply(_ROWS_ARE_GROUPED)
    unusual = case.sizes.step._replace(num_tokens=29, knn=3)
    for size, is_warm in ((case.sizes.step, True), (unusual, False)):
        step = Step(case, size, case.sizes.step_width)
        replay = _captured(step.results, is_warm, case.device)
        for _ in range(3):
            step.renew()
            expected = step.results()
            for name, result in replay().items():
                assert_same(f"{name} {'' if is_warm else 'of a cold capture '}replayed", result, expected[name])


@check(9, "torch.compile: results, and the length of the reading log", ("fp32",))
def compiled(case: Case) -> None:
    """Each backward pass leaves its reads once, whether or not it is recorded in a graph; the first call is cold."""
    for mode in ("default", "reduce-overhead"):
        memory = _memory(case, query_norm="none", knn=3)  # without a norm the query is one product, whoever makes it
        optimizer = RowAdam(memory.values)
        run = _compiled(memory, mode)
        for _ in range(4):  # the compiler records in the second or third
            pairs = []
            for number in (1, 2):
                x, back = (case.there(case.normal(7, 16)) for _ in range(2))
                summed = run(x)
                summed.backward(back)
                found = _passes_in_the_log(memory)
                assert found == number, f"{found} passes are in the log after {number}, mode {mode!r}"
                with torch.no_grad():
                    pairs.append((summed.detach().clone(), memory(x)))
            for ours, expected in pairs:
                _assert_mostly_near(f"compiled with mode {mode!r}", ours, expected)
            optimizer.step()
            assert _passes_in_the_log(memory) == 0, "reads are left in the log after a step"


def _passes_in_the_log(memory: ProductKeyMemory) -> int:
    log = memory.values.log
    assert log is not None
    return len(log.entries)


def _memory(case: Case, **options: Any) -> ProductKeyMemory:
    config = MemoryConfig(**{"dim": 16, "num_sub_keys": 6, "heads": 2, "knn": 4, "query_dim": 8, **options})
    memory = ProductKeyMemory(config).to(case.device, case.dtype)
    memory.backend = case.backend
    return memory


def _layer_step(case: Case, max_norm: float | None) -> Callable[[], None]:
    """A step of a layer, with padding and with RowAdam."""
    memory = _memory(case)
    optimizer = RowAdam(memory, max_norm=max_norm)
    x, mask = case.there(case.normal(7, 16)).requires_grad_(), torch.arange(7, device=case.device) < 5

    def step() -> None:
        memory(x, mask).sum().backward()
        optimizer.step()

    return step


class NothingWaits(TorchDispatchMode):
    """Fails at an operator that would make the host wait for a GPU: for tensors that are not on one."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")
        name = function.overloadpacket.__name__
        assert not any(name.startswith(word) for word in waits), f"{function} waits for the GPU"
        if name in ("index", "index_put_", "repeat_interleave"):
            indices = args[1] if len(args) > 1 else ()
            assert not any(getattr(part, "dtype", None) == torch.bool for part in indices), f"{function} waits"
        return function(*args, **(kwargs or {}))


def _nothing_waits(device: torch.device) -> AbstractContextManager[Any]:
    return NothingWaits() if device.type == "cpu" else _synchronising_raises(device)


@contextmanager
def _synchronising_raises(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        raise DoesNotApply(f"torch does not report who waits for a device of the kind {device.type}")
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls it a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _captured(
    call: Callable[[], dict[str, Tensor]], is_warm: bool, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """A call as a CUDA graph; one that is not warm may compile and load kernels while it is captured."""
    if device.type != "cuda":
        raise DoesNotApply("graphs are captured on CUDA alone")
    with torch.cuda.device(device):
        if is_warm:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="global" if is_warm else "relaxed"):
            results = call()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay


def _compiled(memory: ProductKeyMemory, mode: str) -> Callable[[Tensor], Tensor]:
    if memory.values.weight.device.type == "cpu":
        raise DoesNotApply("compiled code on a CPU logs its reads whatever the kernels: the tests try it")
    return torch.compile(memory, mode=mode)


def _assert_mostly_near(what: str, found: Tensor, expected: Tensor) -> None:
    """A hundredth may differ: a compiler may round a query otherwise, and then a near tie goes to another slot."""
    limit = 1e-3 * expected.abs().max()
    share = ((found - expected).abs() <= limit).double().mean().item()
    assert share >= 0.99, f"{what}: {1 - share:.1%} of the sums differ"


CHECKS = (waits, replays, compiled)
