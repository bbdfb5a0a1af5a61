"""The contract of a backend: every one has the protocol's functions, and keeps what the protocol promises beyond values."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pkmem.ops import backends
from pkmem.ops.backends import BACKENDS, Backend, backend_module

CONTRACT = {
    name: function for name, function in vars(Backend).items() if inspect.isfunction(function) and name[0] != "_"
}
NUMBERS = (torch.nan, -torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_the_functions_of_the_protocol_and_their_arguments(name: str) -> None:
    if name == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    module = backend_module(name)
    for function, promised in CONTRACT.items():
        _, *wanted = inspect.signature(promised).parameters.values()
        given = inspect.signature(getattr(module, function)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], function


def test_the_protocol_documents_every_function_of_the_contract() -> None:
    assert len(CONTRACT) == 14
    assert all(function.__doc__ for function in CONTRACT.values())


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_finite_stays_with_its_token_and_its_head(backend: str, number: float) -> None:
    module, query, sub_keys = backend_module(backend), torch.randn(9, 3, 8), torch.randn(3, 2, 12, 4)
    before = module.product_key_topk(query, sub_keys, 5)
    query[4, 1, 2] = number
    scores, slots = module.product_key_topk(query, sub_keys, 5)
    others = torch.ones(9, 3, dtype=torch.bool)
    others[4, 1] = False
    assert torch.equal(scores[others], before[0][others])
    assert torch.equal(slots[others], before[1][others])
    assert len(slots[4, 1].unique()) == 5
    assert 0 <= slots.min() <= slots.max() < 144


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_not_finite_stays_with_the_tokens_that_read_it(backend: str, number: float) -> None:
    module, values, weights = backend_module(backend), torch.randn(20, 6), torch.randn(7, 4)
    slots = torch.randint(1, 20, (7, 4))
    slots[3, 2] = 0
    x = torch.randn(7, 6)
    sums, products = module.weighted_sum(values, slots, weights), module.row_products(values, slots, x)
    values[0] = number
    readers = torch.arange(7) == 3
    assert torch.equal(module.weighted_sum(values, slots, weights)[~readers], sums[~readers])
    assert not module.weighted_sum(values, slots, weights)[readers].isfinite().any()
    assert torch.equal(module.row_products(values, slots, x)[slots != 0], products[slots != 0])


def test_segments_without_reads_change_nothing(backend: str) -> None:
    """As a backend leaves them that does not wait for its device: at the end, with rows that hold no meaning."""
    module = backend_module(backend)
    slots, weights, grad_output = torch.randint(9, (5, 3)), torch.randn(5, 3), torch.randn(5, 4)
    reads = module.sort_reads([slots], [weights], [grad_output], 9)
    longer = type(reads)(
        torch.cat((reads.rows, torch.full((3,), 7))),
        torch.cat((reads.offsets, reads.offsets[-1:].expand(3))),
        reads.tokens,
        reads.weights,
        reads.grad_output,
    )
    assert torch.equal(longer.host_offsets, reads.offsets)
    from pkmem.ops import reference

    for function in (reference.row_gradient_norm, reference.gradient_is_finite):
        assert torch.equal(function(longer), function(reads))
    assert torch.equal(reference.weighted_sum_grad_values(longer, 9), reference.weighted_sum_grad_values(reads, 9))


# numba as it is where it cannot be used: on the first import of it, in a process of its own
BROKEN = """
import pathlib, sys, warnings
warnings.simplefilter("error")
folder = pathlib.Path(sys.argv[1])
(folder / "numba").mkdir()
(folder / "numba" / "__init__.py").write_text(f"raise {sys.argv[2]}", encoding="utf-8")
sys.path.insert(0, str(folder))
if sys.argv[2] == "none":
    sys.modules["numba"] = None
import torch, pkmem
from pkmem.ops import choose_backend, product_key_topk, weighted_sum
memory = pkmem.ProductKeyMemory(pkmem.MemoryConfig(dim=4, num_sub_keys=2, knn=1, query_dim=2))
assert choose_backend(torch.empty(1, 1, device="meta")) == "reference"
said = []
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: said.append(str(message))
query, sub_keys = torch.randn(3, 1, 2), torch.randn(1, 2, 4, 1)
if sys.argv[3] == "compiled":
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(query): return product_key_topk(query, sub_keys, 2)
    slots = compiled(query)[1]
else:
    memory.eval()
    with torch.no_grad():
        memory(torch.randn(3, 4))
    memory.train()
    memory(torch.randn(30, 4)).sum().backward()
    slots = product_key_topk(query, sub_keys, 2)[1]
assert torch.equal(slots, product_key_topk(query, sub_keys, 2, backend="reference")[1])
print(*(text for text in said if "numba" in text), sep="\\n")
try:
    product_key_topk(query, sub_keys, 2, backend="cpu")
except ValueError as error:
    print(error)
"""


@pytest.mark.case("Environments", "numba is not installed", "works: the reference runs, with one warning", "")
@pytest.mark.case("Environments", "numba does not import, as beside a newer numpy",
    "works: the reference runs, with one warning that says why", "https://github.com/librosa/librosa/issues/1786")  # fmt: skip
@pytest.mark.parametrize(
    ("raised", "way", "why"),
    [
        ("none", "eager", "numba is not installed: pip install 'pkmem[cpu]'"),
        (
            "SystemError('initialization of _internal failed')",
            "compiled",
            "numba is installed but cannot be used (SystemError: initialization of _internal failed)",
        ),
    ],
)
def test_where_numba_cannot_be_used_the_reference_runs_with_one_warning(
    raised: str, way: str, why: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BROKEN, str(tmp_path), raised, way]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == [f"the slow reference runs, since {why}", f"backend 'cpu' cannot run: {why}"]


@pytest.fixture
def unimported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing had asked for the CPU's kernels yet."""
    cached = (backends._why_no_kernels, backends._warn_of_the_reference, backends.backend_module)
    for function in cached:
        function.cache_clear()
    for name in [name for name in sys.modules if name.startswith("pkmem.ops.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pkmem.ops.cpu", raising=False)
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


@pytest.mark.case(
    "Environments", "llvmlite is missing or broken", "works: the reference runs, with one warning that says why", ""
)
@pytest.mark.case(
    "Environments", "`NUMBA_DISABLE_JIT=1`", "works: the reference runs, with one warning that says why", ""
)
@pytest.mark.parametrize(
    ("name", "replaced", "why"),
    [
        ("llvmlite", None, "ModuleNotFoundError: import of llvmlite halted; None in sys.modules"),
        ("numba.core.caching", ModuleType("caching"), "ImportError: cannot import name 'NullCache' from 'caching'"),
        ("NUMBA_DISABLE_JIT", None, "ImportError: NUMBA_DISABLE_JIT is set"),
    ],
)
def test_whatever_stops_the_kernels_is_said(
    name: str, replaced: ModuleType | None, why: str, unimported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numba = pytest.importorskip("numba")
    if name == "NUMBA_DISABLE_JIT":
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    else:
        monkeypatch.setitem(sys.modules, name, replaced)
    table = torch.empty(1, 1)
    with pytest.warns(UserWarning, match="the slow reference runs, since numba is installed but") as caught:
        assert [backends.choose_backend(table) for _ in range(2)] == ["reference", "reference"]
    assert len(caught) == 1
    assert why in str(caught[0].message)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
        backends.backend_module("cpu")
