"""The linear maps of a memory: torch's, whatever the processor multiplies."""

import copy

import pytest
import torch
from torch import nn

from pkmem.layer import linear
from pkmem.layer.linear import apply_linear

HALVES = [torch.bfloat16, torch.float16]
BOUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(params=[True, False], ids=["multiplies halves", "does not"])
def processor(request, monkeypatch) -> bool:
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: request.param)
    return request.param


def pair(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """One, and the same in fp64."""
    torch.manual_seed(0)
    ours = nn.Linear(37, 11, bias=bias).to(dtype)
    theirs = nn.Linear(37, 11, bias=bias).double()
    theirs.load_state_dict({name: part.double() for name, part in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(0,), (3,), (4,), (50,), (2, 3), (2, 0, 3), ()])
def test_halves_are_multiplied_and_rounded_once(processor, dtype, bias, shape) -> None:
    ours, theirs = pair(dtype, bias)
    x = torch.randn(*shape, 37).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, expected = apply_linear(ours, x), theirs(exact)
    assert (out.dtype, out.shape) == (dtype, expected.shape)
    torch.testing.assert_close(out.double(), expected, rtol=BOUND[dtype], atol=BOUND[dtype] / 8)
    back = torch.randn(out.shape).to(dtype)
    out.backward(back)
    expected.backward(back.double())
    for found, wanted in [(x, exact), *zip(ours.parameters(), theirs.parameters(), strict=True)]:
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=2 * BOUND[dtype], atol=BOUND[dtype])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_gives_bf16(processor, given, weights) -> None:
    ours, theirs = pair(weights)
    x = torch.randn(9, 37).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_linear(ours, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), theirs(x.double()), rtol=2.0**-7, atol=2.0**-7)


def test_without_bf16_products_autocast_loses_nothing_before_the_result(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: False)
    ours, _ = pair(torch.float32)
    x = torch.randn(9, 37)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_linear(ours, x)
    assert torch.equal(out, ours(x).bfloat16())


def test_dtypes_that_do_not_agree_are_refused_as_by_torch(processor) -> None:
    ours, _ = pair(torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        apply_linear(ours, torch.randn(9, 37).bfloat16())
    with pytest.raises(RuntimeError, match="same dtype"):
        apply_linear(copy.deepcopy(ours).bfloat16(), torch.randn(9, 37))


def test_fp32_and_fp64_are_torchs_own(processor) -> None:
    for dtype in (torch.float32, torch.float64):
        ours, _ = pair(dtype)
        x = torch.randn(9, 37, dtype=dtype)
        assert torch.equal(apply_linear(ours, x), nn.functional.linear(x, ours.weight, ours.bias))
    ours, _ = pair(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(9, 37, dtype=torch.float64)
        assert apply_linear(ours, x).dtype == torch.float64


@pytest.mark.parametrize(
    ("capabilities", "halves"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_fp16": False}, []),
        ({"architecture": "x86_64", "avx512_bf16": True}, [torch.bfloat16]),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_fp16": True}, HALVES),
        ({"architecture": "aarch64"}, HALVES),  # nothing was measured there
        (None, HALVES),  # a torch that does not say
    ],
)
def test_what_a_processor_multiplies(monkeypatch, capabilities, halves) -> None:
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    linear._multiplies.cache_clear()
    try:
        assert [dtype for dtype in HALVES if linear._multiplies(dtype)] == halves
    finally:
        linear._multiplies.cache_clear()


@pytest.fixture
def widened(monkeypatch) -> list[torch.dtype]:
    """The dtype of each product that was made by way of fp32."""
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: False)
    seen = []

    class Watched:
        linear = staticmethod(
            lambda x, weight, bias: seen.append(weight.dtype) or nn.functional.linear(x, weight, bias)
        )

    monkeypatch.setattr(linear, "F", Watched)
    return seen


def test_a_row_of_maps_is_taken_apart(widened) -> None:
    torch.manual_seed(0)
    row = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).bfloat16()
    x = torch.randn(9, 6).bfloat16()
    torch.testing.assert_close(apply_linear(row, x), row(x), rtol=2.0**-7, atol=2.0**-7)
    assert widened == [torch.float32] * 2


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _hooked(part: nn.Linear) -> nn.Linear:
    part.register_forward_hook(lambda module, given, out: 2 * out)
    return part


def _replaced(part: nn.Linear) -> nn.Linear:
    part.forward = lambda x: 2 * nn.Linear.forward(part, x)
    return part


def _of_another_class(part: nn.Linear) -> nn.Linear:
    other = Doubled(37, 11).bfloat16()
    other.load_state_dict(part.state_dict())
    return other


def _parametrized(part: nn.Linear) -> nn.Linear:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(part, name, Twice())
    return part


@pytest.mark.parametrize("change", [_hooked, _replaced, _of_another_class, _parametrized])
def test_whatever_else_a_module_does_is_done(widened, change) -> None:
    ours, theirs = pair(torch.bfloat16)
    x = torch.randn(9, 37).bfloat16()
    out = apply_linear(change(ours), x)
    torch.testing.assert_close(out.double(), 2 * theirs(x.double()), rtol=2.0**-7, atol=2.0**-7)
    assert widened == []


def test_a_forward_replaced_on_the_class_is_run(widened, monkeypatch) -> None:
    ours, _ = pair(torch.bfloat16)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    x = torch.randn(9, 37).bfloat16()
    assert apply_linear(ours, x) is x
    assert widened == []


def test_exported_code_holds_for_any_number_of_tokens(widened) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = pair(torch.bfloat16)[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return apply_linear(self.part, x)

    module = Module()
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(module, (torch.randn(9, 37).bfloat16(),), dynamic_shapes=({0: tokens},)).module()
    for num_tokens in (2, 50):
        x = torch.randn(num_tokens, 37).bfloat16()
        torch.testing.assert_close(program(x), module(x), rtol=2.0**-7, atol=2.0**-7)
