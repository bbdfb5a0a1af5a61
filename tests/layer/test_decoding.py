"""One kernel for a few tokens: the same as the parts it stands for, and only where it may stand for them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pkmem import MemoryConfig, MemoryUsage, ProductKeyMemory

pytest.importorskip("numba")

from pkmem.layer.decoding import MOST_TOKENS
from pkmem.layer.quantised import quantise_values
from pkmem.ops.arguments import NORM_TENSORS, LayerWeights
from pkmem.ops.cpu import decoding

KIND = "Modules that others rewrite"
NORMS = tuple(NORM_TENSORS)


def build(norm: str = "batch", **options) -> ProductKeyMemory:
    """A memory in evaluation mode in which no weight and no statistic has a special value."""
    shape = {"dim": 20, "num_sub_keys": 37, "heads": 3, "knn": 9, "query_dim": 14}
    memory = ProductKeyMemory(MemoryConfig(**shape | {"query_norm": norm} | options)).eval()
    for name, tensor in (*memory.query.norm.named_parameters(), *memory.query.norm.named_buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, -0.5 if "bias" in name or "mean" in name else 0.5, 1.5)
    return memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call that took the kernel."""
    seen: list[int] = []
    decode = decoding.decode

    def counted(x: Tensor, layer: LayerWeights) -> Tensor:
        seen.append(len(x))
        return decode(x, layer)

    monkeypatch.setattr("pkmem.ops.cpu.decode", counted)
    return seen


def by_parts(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    slots, weights = memory.keys(memory.query(x))
    if memory.neurons is not None:
        weights = weights * torch.nn.functional.gelu(memory.neurons(slots, x))
    out = memory.values(slots, weights).to(x.dtype)
    return out if memory.gate is None else memory.gate(out, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"gate": True, "value_dim": 11}, {"knn": 1}, {"knn": 37}, {"num_sub_keys": 64}]
)
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_equals_the_parts(norm: str, options: dict, dtype: torch.dtype, calls: list[int]) -> None:
    memory = build(norm, **options)
    memory.values.to(dtype)
    last_place = max(1e-5, torch.finfo(dtype).eps)
    for tokens in range(MOST_TOKENS + 1):
        x = torch.randn(tokens, 20)
        # Sums that differ in the last place of fp32 may round to neighbours in the table's dtype.
        torch.testing.assert_close(memory(x), by_parts(memory, x), rtol=last_place, atol=last_place)
    assert calls == list(range(MOST_TOKENS + 1))


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_twice_as_wrong_as_torch_at_most(norm: str, calls: list[int]) -> None:
    memory, x = build(norm, dim=512, num_sub_keys=64, query_dim=128, knn=64), torch.randn(8, 512)
    ours, theirs = memory(x), by_parts(memory, x)
    assert calls == [8]
    exact = memory.double()(x.double())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@torch.no_grad()
def test_a_gate_is_twice_as_wrong_as_torch_at_most(calls: list[int]) -> None:
    options = {"dim": 512, "num_sub_keys": 64, "query_dim": 128, "knn": 64, "gate": True, "value_dim": 256}
    memory, x = build(**options), 5 * torch.randn(8, 512)
    memory.gate.gate.weight.mul_(30)  # some gates are shut so far that exp overflows
    ours, theirs = memory(x), by_parts(memory, x)
    assert calls == [8]
    exact = memory.double()(x.double())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@torch.no_grad()
def test_hidden_states_of_any_layout(calls: list[int]) -> None:
    memory, wide = build(), torch.randn(2, 3, 40)
    strided = wide[..., ::2]
    assert memory(strided).equal(memory(strided.contiguous()))
    assert memory(strided).shape == (2, 3, 20)
    assert len(calls) == 3


@torch.no_grad()
def test_what_is_not_finite_comes_out_as_from_the_parts(calls: list[int]) -> None:
    memory, x = build("none"), torch.randn(3, 20)
    x[0, 0], x[1, 0] = torch.inf, torch.nan
    ours, theirs = memory(x), by_parts(memory, x)
    assert calls == [3]
    assert ours.isnan().equal(theirs.isnan())
    torch.testing.assert_close(ours[2], theirs[2])


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _replace_query(memory: ProductKeyMemory) -> None:
    memory.query.project = _Doubled(20, 42)


def _halve_query(memory: ProductKeyMemory) -> None:
    parametrize.register_parametrization(memory.query.project, "weight", _Half())


def _no_bias(memory: ProductKeyMemory) -> None:
    memory.query.project.bias = None


def _hook_output(memory: ProductKeyMemory) -> None:
    memory.values.register_forward_hook(lambda *arguments: 2 * arguments[2])


def _hook_input(memory: ProductKeyMemory) -> None:
    memory.query.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1, *inputs[1:]))


def _replace_dropout(memory: ProductKeyMemory) -> None:
    memory.query.dropout = nn.Tanh()


def _use_reference(memory: ProductKeyMemory) -> None:
    memory.backend = "reference"


def _use_reference_for_keys(memory: ProductKeyMemory) -> None:
    memory.keys.backend = "reference"


def _replace_forward(memory: ProductKeyMemory) -> None:
    """As accelerate and others do that bring weights from elsewhere before a part runs."""
    forward = memory.query.project.forward
    memory.query.project.forward = lambda x: forward(x) + 1


def _replace_forward_of_the_query(memory: ProductKeyMemory) -> None:
    forward = memory.query.forward
    memory.query.forward = lambda *given: 2 * forward(*given)


def _hook_backward(memory: ProductKeyMemory) -> None:
    memory.keys.register_full_backward_hook(lambda *_: None)


def _hook_before_backward(memory: ProductKeyMemory) -> None:
    memory.dropout.register_full_backward_pre_hook(lambda *_: None)


def _hook_gate(memory: ProductKeyMemory) -> None:
    memory.gate.gate.register_forward_hook(lambda *arguments: 2 * arguments[2])


def _replace_gate(memory: ProductKeyMemory) -> None:
    memory.gate.project = _Doubled(20, 20, bias=False)


def _bias_a_gate(memory: ProductKeyMemory) -> None:
    memory.gate.project = nn.Linear(20, 20)


def _replace_all_of_the_gate(memory: ProductKeyMemory) -> None:
    class Half(type(memory.gate)):
        def forward(self, out: Tensor, x: Tensor) -> Tensor:
            return super().forward(out, x) / 2

    memory.gate = Half(memory.config)


@pytest.mark.parametrize(
    "change",
    [
        _replace_query, _halve_query, _no_bias, _hook_output, _hook_input, _replace_dropout, _use_reference, _use_reference_for_keys,
        _replace_forward, _replace_forward_of_the_query, _hook_backward, _hook_before_backward,
        nn.Module.double, nn.Module.bfloat16, nn.Module.train,
    ],
)  # fmt: skip
@torch.no_grad()
def test_parts_run_where_one_is_changed_or_watched(change, calls: list[int]) -> None:
    memory = build("layer")
    change(memory)
    x = torch.randn(2, 20, dtype=memory.keys.sub_keys.dtype)
    torch.testing.assert_close(memory(x), by_parts(memory, x))
    assert calls == []


@pytest.mark.parametrize("change", [_hook_gate, _replace_gate, _bias_a_gate, _replace_all_of_the_gate])
@torch.no_grad()
def test_parts_run_where_the_gate_is_changed_or_watched(change, calls: list[int]) -> None:
    memory, x = build(gate=True), torch.randn(2, 20)
    change(memory)
    torch.testing.assert_close(memory(x), by_parts(memory, x))
    assert calls == []


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.no_grad()
def test_parts_run_where_a_global_hook_watches_all_modules(register, calls: list[int]) -> None:
    memory, seen = build(), set()
    handle = register(lambda module, *_: seen.add(type(module).__name__))
    try:
        memory(torch.randn(2, 20))
    finally:
        handle.remove()
    assert {"QueryNetwork", "Linear", "ProductKeys", "ValueTable"} <= seen
    assert calls == []
    memory(torch.randn(2, 20))
    assert calls == [2]


@pytest.mark.case(
    KIND, "dropout left in training mode in a model that evaluates, as Monte Carlo dropout does", "works", ""
)
@torch.no_grad()
def test_a_part_in_training_mode_is_in_training_mode(calls: list[int]) -> None:
    memory, x = build(dropout=0.5, query_dropout=0.5), torch.randn(1, 20).expand(2, 20)
    torch.testing.assert_close(*memory(x))
    memory.dropout.train()
    assert not torch.allclose(*memory(x))
    memory.dropout.eval()
    memory.query.dropout.train()
    assert not torch.allclose(*memory(x))
    memory.query.dropout.eval()
    memory.query.norm.train()
    assert memory(x).equal(by_parts(memory, x))
    assert memory.query.norm.num_batches_tracked > 0
    assert calls == [2]


@pytest.mark.case(
    KIND, "a `forward` replaced on the class: `nn.Linear.forward = mine`, for all of its modules", "works", ""
)
@pytest.mark.parametrize("kind", [nn.Linear, type(build().keys), type(build().values), type(build().query.norm)])
@torch.no_grad()
def test_a_forward_replaced_on_the_class_is_run(kind: type, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    memory, x, seen = build(), torch.randn(2, 20), []
    forward = kind.forward

    def watched(self: nn.Module, *given: Tensor) -> object:
        seen.append(type(self))
        return forward(self, *given)

    monkeypatch.setattr(kind, "forward", watched)
    memory(x)
    assert seen == [kind]
    assert calls == []


@pytest.mark.case(
    KIND, "`memory.keys.knn` set to more than there are sub-keys, or to 0", "refused: ValueError names the range", ""
)
@pytest.mark.parametrize("knn", [0, -1, 38, 10**6])
@torch.no_grad()
def test_neighbours_that_there_are_not_are_refused(knn: int, calls: list[int]) -> None:
    memory = build()
    memory.keys.knn = knn
    for tokens in (1, MOST_TOKENS, MOST_TOKENS + 1):
        with pytest.raises(ValueError, match=rf"knn is {knn} but must be in \[1, s = 37\]"):
            memory(torch.randn(tokens, 20))
    assert calls == []


@pytest.mark.case(KIND, "`memory.keys.knn` lowered after training, to read fewer slots", "works", "")
@torch.no_grad()
def test_neighbours_can_be_fewer_than_were_trained(calls: list[int]) -> None:
    memory, x = build(), torch.randn(2, 20)
    memory.keys.knn = 2
    torch.testing.assert_close(memory(x), by_parts(memory, x))
    assert calls == [2]


@pytest.mark.case(
    KIND, "tensors that share memory with others in a way of their own: sparse weights, negative views", "works", ""
)
@torch.no_grad()
def test_parts_run_where_memory_is_not_the_numbers(calls: list[int]) -> None:
    memory, x = build(), torch.randn(2, 20)
    negative = torch.imag(torch.complex(x, -x).conj())
    assert negative.is_neg()
    torch.testing.assert_close(memory(negative), by_parts(memory, x))
    expected = by_parts(memory, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors a beta
        memory.query.project.weight = nn.Parameter(memory.query.project.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(memory(x), expected)
    assert calls == []


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _WatchFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.case(
    KIND,
    "a mode that sees every operator: `FlopCounterMode`, `TorchDispatchMode`, `TorchFunctionMode`, `make_fx`",
    "works: sees `pkmem::product_key_topk` and `pkmem::weighted_sum`",
    "",
)
@torch.no_grad()
def test_modes_see_one_token_as_they_see_nine(calls: list[int]) -> None:
    memory = build()
    for kind in (_Watch, _WatchFunctions):
        seen = []
        for tokens in (1, 9):
            with kind() as watch:
                memory(torch.randn(tokens, 20))
            seen.append(watch.seen)
        assert seen[0] == seen[1]
        assert [name for name in seen[0] if "pkmem" in name and "topk" in name]
        assert [name for name in seen[0] if "pkmem" in name and "weighted_sum" in name]
    traced = make_fx(memory)(torch.randn(2, 20))
    x = torch.randn(2, 20)
    torch.testing.assert_close(traced(x), by_parts(memory, x))
    assert calls == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # torch's own rules of forward mode
@pytest.mark.parametrize("enter", [torch.enable_grad, torch.no_grad])
def test_parts_run_under_transforms(enter, calls: list[int]) -> None:
    memory, x = build(), torch.randn(2, 20)
    with torch.no_grad():
        expected = by_parts(memory, x)
    with enter():
        torch.testing.assert_close(torch.vmap(memory)(x.unsqueeze(1)).squeeze(1), expected)
        tangent = torch.func.jvp(memory, (x,), (x,))[1]
        with forward_ad.dual_level():
            dual = memory(forward_ad.make_dual(x, x))
            assert forward_ad.unpack_dual(dual).tangent.equal(tangent)
    assert tangent.abs().min() > 0
    assert calls == []


@torch.no_grad()
def test_parts_run_where_weights_are_elsewhere(calls: list[int]) -> None:
    """As with accelerate's offloading: weights are on `meta` until a part's own forward brings them."""
    accelerate = pytest.importorskip("accelerate")
    memory, x = build(), torch.randn(2, 20)
    expected = by_parts(memory, x)
    accelerate.cpu_offload(memory, execution_device="cpu")
    assert memory.query.project.weight.is_meta
    torch.testing.assert_close(memory(x), expected)
    for part in (
        "query.project",
        "keys",
        "values",
    ):  # without hooks: an error, and no kernel on memory that is not there
        memory = build()
        memory.get_submodule(part).to("meta")
        with pytest.raises((RuntimeError, ValueError), match="meta"):
            memory(x)
    assert calls == []


@torch.no_grad()
def test_a_traced_memory_computes_anew(calls: list[int]) -> None:
    memory, x = build(), torch.randn(2, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and takes shapes for constants
        traced = torch.jit.trace(memory, (x,), check_trace=False)
    torch.testing.assert_close(traced(-x), memory(-x))
    assert calls == [2]


@pytest.mark.parametrize("options", [{"query_hidden_dim": 8}, {"keys": "flat"}, {"experts": True}])
@torch.no_grad()
def test_other_queries_and_keys_run_in_parts(options: dict, calls: list[int]) -> None:
    memory, x = build(**options), torch.randn(2, 20)
    torch.testing.assert_close(memory(x), by_parts(memory, x))
    assert calls == []


def test_gradients_autocast_compilers_and_many_tokens_run_in_parts(calls: list[int]) -> None:
    memory, x = build(), torch.randn(2, 20)
    memory(x).sum().backward()
    assert memory.keys.sub_keys.grad is not None
    with torch.no_grad():
        memory(torch.randn(MOST_TOKENS + 1, 20))
        with torch.autocast("cpu"):
            memory(x)
        torch.export.export(memory, (x,))
    assert calls == []


@pytest.mark.parametrize("width", [19, 21])
@torch.no_grad()
def test_hidden_states_of_another_width_are_refused(width: int, calls: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"x is \(2, {width}\) .* \(\.\.\., 20\)"):
        build()(torch.randn(2, width))
    assert calls == []


@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
@torch.no_grad()
def test_parts_that_do_not_fit_are_refused(norm: str, calls: list[int]) -> None:
    x = torch.randn(2, 20)
    for name, tensor in (
        ("values.weight", torch.randn(3, 20)),
        ("keys.sub_keys", torch.randn(3, 2, 37, 8)),
        ("query.norm.weight", torch.randn(3)),
        ("query.project.bias", torch.randn(3)),
        ("gate.gate.weight", torch.randn(20, 19)),
        ("gate.gate.weight", torch.randn(19, 20)),
        ("gate.project.weight", torch.randn(20, 19)),
    ):
        memory = build(norm, gate=True)
        part, _, attribute = name.rpartition(".")
        getattr(memory.get_submodule(part), attribute).data = tensor
        with pytest.raises((ValueError, RuntimeError)):
            memory(x)
    assert calls == []


@torch.no_grad()
def test_usage_is_counted(calls: list[int]) -> None:
    memory = build()
    with MemoryUsage(memory) as usage:
        memory(torch.randn(1, 20))
    assert int(usage.num_reads.sum()) == 27
    assert calls == []


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("options", [{}, {"gate": True, "value_dim": 9}])
def test_quantised_values_are_read_by_the_kernel_too(bits: int, options: dict, calls: list[int]) -> None:
    memory = build("layer", **options)
    quantise_values(memory, bits)
    with torch.no_grad():
        for num_tokens in (1, 3, MOST_TOKENS):
            x = torch.randn(num_tokens, 20)
            assert torch.allclose(memory(x), by_parts(memory, x), atol=1e-5)
        assert calls == [1, 3, MOST_TOKENS]
        memory.values.weight = nn.Parameter(memory.values.weight[:, :-1].contiguous(), requires_grad=False)
        with pytest.raises(ValueError, match=r"rows of width \d+ in \d bits"):  # the parts say what is wrong
            memory(torch.randn(1, 20))
    assert len(calls) == 3
