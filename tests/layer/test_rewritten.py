"""A memory that other libraries rewrite gives what it gave, for one token and for many, or says what to do instead."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from pkmem import MemoryConfig, ProductKeyMemory, RowAdam

KIND = "Modules that others rewrite"
VARIANTS = {
    "batch": {},
    "layer": {"query_norm": "layer"},
    "rms": {"query_norm": "rms"},
    "no norm": {"query_norm": "none"},
    "two layers": {"query_hidden_dim": 9},
    "gate": {"gate": True, "value_dim": 6},
    "experts": {"experts": True},
    "flat": {"keys": "flat"},
}
TOKENS = (1, 8, 9, 100)  # one kernel reads for up to 8, the parts for more

by_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "batch", **options) -> ProductKeyMemory:
    """A memory in evaluation mode in which no weight and no statistic has a special value."""
    shape = {"dim": 10, "num_sub_keys": 9, "heads": 2, "knn": 4, "query_dim": 6}
    memory = ProductKeyMemory(MemoryConfig(**shape | VARIANTS[variant] | options)).eval()
    for name, tensor in (*memory.query.norm.named_parameters(), *memory.query.norm.named_buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, -0.5 if "bias" in name or "mean" in name else 0.5, 1.5)
    return memory


def assert_same(changed: Callable[[Tensor], Tensor], untouched: Callable[[Tensor], Tensor], **tolerance) -> None:
    """For one token and for many, with and without gradients."""
    for tokens in TOKENS:
        x = torch.randn(tokens, 10)
        with torch.no_grad():
            expected = untouched(x)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                torch.testing.assert_close(changed(x).detach(), expected, **tolerance)


# --- weights that are elsewhere ---------------------------------------------------------------------------


@pytest.mark.case(
    KIND,
    "accelerate: `cpu_offload`, `disk_offload`, with buffers or whole memories at once",
    "works",
    "https://github.com/huggingface/transformers/pull/48409",
)
@pytest.mark.parametrize(
    ("kept_on", "options"),
    [
        ("memory", {}),
        ("disk", {"offload_buffers": True}),
        ("memory", {"offload_buffers": True, "preload_module_classes": ["ProductKeyMemory"]}),
    ],
)
@by_variant
def test_offloaded_weights(variant: str, options: dict, kept_on: str, tmp_path: Path) -> None:
    memory = build(variant)
    model = nn.Sequential(nn.Linear(10, 10), copy.deepcopy(memory))
    first = copy.deepcopy(model[0])
    if kept_on == "memory":
        accelerate.cpu_offload(model, execution_device="cpu", **options)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", **options)
    assert model[1].values.weight.is_meta
    for tokens in TOKENS:
        x = torch.randn(tokens, 10)
        with torch.no_grad():
            torch.testing.assert_close(model(x), memory(first(x)))
    assert model[1].values.weight.is_meta


@pytest.mark.case(
    KIND, "accelerate: `dispatch_model` of memories that share a table, one of them offloaded", "works", ""
)
def test_a_shared_table_that_is_offloaded() -> None:
    first = build()
    untouched = nn.Sequential(first, ProductKeyMemory(first.config, values=first.values).eval())
    model = copy.deepcopy(untouched)
    accelerate.dispatch_model(model, {"0": "cpu", "1": "cpu"}, main_device="cpu", force_hooks=True)
    assert_same(model, untouched)
    offloaded = copy.deepcopy(untouched)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert offloaded[1].values.weight.is_meta
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, 10)
            torch.testing.assert_close(offloaded(x), untouched(x))


# --- weights that are computed ----------------------------------------------------------------------------


class _Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -1.5 * weight


WEIGHTS = {
    "query.project": ("weight", "bias"),
    "query.norm": ("weight", "bias"),
    "keys": ("sub_keys",),
    "values": ("weight",),
    "gate.gate": ("weight",),
    "gate.project": ("weight",),
}


@pytest.mark.case(KIND, "`parametrize.register_parametrization` of any weight of a memory", "works", "")
@pytest.mark.parametrize("part", WEIGHTS)
def test_a_parametrized_weight(part: str) -> None:
    memory = build("gate")
    for name in WEIGHTS[part]:
        expected = copy.deepcopy(memory)
        with torch.no_grad():
            expected.get_submodule(part).get_parameter(name).mul_(-1.5)
        changed = copy.deepcopy(memory)
        parametrize.register_parametrization(changed.get_submodule(part), name, _Scaled())
        assert_same(changed, expected)
        parametrize.remove_parametrizations(changed.get_submodule(part), name)
        assert_same(changed, expected)


@pytest.mark.case(
    KIND, "`weight_norm`, `spectral_norm` and `orthogonal` of torch.nn.utils on a query's weights", "works", ""
)
@pytest.mark.parametrize("rule", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_normed_weight(rule: str) -> None:
    changed, expected = build(), build()
    expected.load_state_dict(changed.state_dict())
    getattr(parametrizations, rule)(changed.query.project.eval())
    if rule == "weight_norm":
        with torch.no_grad():
            changed.query.project.parametrizations.weight.original0.mul_(2)
    with torch.no_grad():
        expected.query.project.weight.copy_(changed.query.project.weight)
    assert_same(changed, expected)


@pytest.mark.case(KIND, "`torch.nn.utils.prune` of queries, sub-keys and values", "works", "")
@pytest.mark.parametrize(("part", "name"), [("query.project", "weight"), ("keys", "sub_keys"), ("values", "weight")])
def test_a_pruned_weight(part: str, name: str) -> None:
    changed, expected = build(), build()
    expected.load_state_dict(changed.state_dict())
    weight = expected.get_submodule(part).get_parameter(name)
    smallest = weight.detach().abs().flatten().argsort()[: weight.numel() // 2]
    with torch.no_grad():
        weight.view(-1)[smallest] = 0
    prune.l1_unstructured(changed.get_submodule(part), name, 0.5)
    assert_same(changed, expected)
    prune.remove(changed.get_submodule(part), name)
    assert_same(changed, expected)


@pytest.mark.case(KIND, "`torch.nn.utils.fuse_linear_bn_eval` of a query's two parts", "works", "")
def test_a_query_fused_with_its_norm() -> None:
    changed, expected = build(), build()
    expected.load_state_dict(changed.state_dict())
    changed.query.project = nn.utils.fuse_linear_bn_eval(changed.query.project, changed.query.norm)
    changed.query.norm = nn.Identity()
    assert_same(changed, expected, rtol=1e-4, atol=1e-5)


# --- modules that are replaced ----------------------------------------------------------------------------


@pytest.mark.case(
    KIND,
    "`torch.ao.quantization.quantize_dynamic` of the linear layers",
    "works: 8-bit queries choose other slots here and there",
    "",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_dynamically_quantised_linear_layers() -> None:
    memory = build("gate")
    quantised = torch.ao.quantization.quantize_dynamic(memory, {nn.Linear})
    weights_alone = copy.deepcopy(memory)
    with torch.no_grad():
        for part in ("query.project", "gate.gate", "gate.project"):
            assert type(quantised.get_submodule(part)) is torch.ao.nn.quantized.dynamic.Linear
            weights_alone.get_submodule(part).weight.copy_(quantised.get_submodule(part).weight().dequantize())
        for tokens in TOKENS:
            # Zeros and ones are exact in 8 bits; the weights are as they were rounded.
            x = torch.randint(2, (tokens, 10)).float()
            query = quantised.query(x)
            torch.testing.assert_close(query, weights_alone.query(x), rtol=1e-4, atol=1e-4)
            slots, weights = quantised.keys(query)
            summed = quantised.values(slots, weights)
            torch.testing.assert_close(quantised(x), quantised.gate(summed, x))


@pytest.mark.case(
    KIND, "`torch.optim.swa_utils.AveragedModel` of a memory", "works", "https://github.com/NVlabs/FasterViT/issues/24"
)
def test_an_averaged_model() -> None:
    from torch.optim.swa_utils import AveragedModel

    memory = build()
    averaged = AveragedModel(memory)
    assert_same(averaged, memory)


@pytest.mark.case(
    KIND,
    "`nn.DataParallel` on several devices, as Trainer takes it for one process with several GPUs",
    "refused: ValueError says to use torchrun, or one device",
    "https://github.com/pytorch/pytorch/issues/1456",
)
def test_data_parallel_is_refused_where_it_copies() -> None:
    memory = build()
    assert_same(nn.DataParallel(memory), memory)  # without a GPU it copies nothing
    with pytest.raises(ValueError, match="torchrun, or show one device"):  # what it asks of every module to copy
        [part._replicate_for_data_parallel() for part in memory.modules()]


# --- functions of a module --------------------------------------------------------------------------------


@pytest.mark.case(KIND, "`torch.func.functional_call` with other weights", "works", "")
@by_variant
def test_a_functional_call(variant: str) -> None:
    memory, other = build(variant), build(variant)
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    plain = {name: tensor.detach() for name, tensor in given.items()}
    assert_same(lambda x: torch.func.functional_call(memory, given, (x,)), other)
    assert_same(lambda x: torch.func.functional_call(memory, plain, (x,)), other)


@pytest.mark.case(
    KIND,
    "an ensemble: `torch.func.stack_module_state` and `torch.vmap` over memories",
    "works",
    "https://github.com/pytorch/pytorch/issues/86819",
)
@by_variant
def test_an_ensemble_of_memories(variant: str) -> None:
    memories = [build(variant) for _ in range(3)]
    state = torch.func.stack_module_state(memories)
    read = torch.vmap(lambda state, x: torch.func.functional_call(memories[0], state, (x,)), (0, None))
    assert_same(lambda x: read(state, x), lambda x: torch.stack([memory(x) for memory in memories]))


@pytest.mark.case(
    KIND,
    "gradients per sample: `torch.vmap(torch.func.grad(loss), (None, 0))`",
    "works: a dense gradient of the table for each sample",
    "",
)
@by_variant
def test_gradients_per_sample(variant: str) -> None:
    memory = build(variant)
    weights = {name: weight.detach() for name, weight in memory.named_parameters()}
    x = torch.randn(5, 10)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(memory, weights, (x.unsqueeze(0),)).square().sum()

    ours = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for sample in range(5):
        memory.zero_grad()
        memory(x[sample : sample + 1]).square().sum().backward()
        for name, weight in memory.named_parameters():
            torch.testing.assert_close(ours[name][sample], weight.grad)


@pytest.mark.case(KIND, "`torch.func.jacrev` and `jacfwd` of a memory", "works", "")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # torch's own rules of forward mode
@by_variant
def test_jacobians(variant: str) -> None:
    memory, x = build(variant).double(), torch.randn(2, 10).double()
    expected = torch.autograd.functional.jacobian(memory, x)
    torch.testing.assert_close(torch.func.jacrev(memory)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(memory)(x), expected)


# --- graphs -----------------------------------------------------------------------------------------------


@pytest.mark.case(
    KIND,
    "`torch.export` with a dynamic batch of 1 to 4,096 tokens",
    "works: give an example of two tokens or more, torch takes a size of 1 for a constant",
    "https://github.com/pytorch/pytorch/issues/133653",
)
@pytest.mark.parametrize(("variant", "strict"), [*((variant, False) for variant in VARIANTS), ("batch", True)])
def test_an_exported_memory_reads_any_number_of_tokens(variant: str, strict: bool) -> None:
    memory = build(variant)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        exported = torch.export.export(memory, (torch.randn(3, 10),), dynamic_shapes=({0: batch},), strict=strict)
    module = exported.module()
    for tokens in (*TOKENS, 4096):
        x = torch.randn(tokens, 10)
        torch.testing.assert_close(module(x), memory(x))


@pytest.mark.case(
    KIND, "`torch.export.save`, then `load` in another process", "works: `import pkmem.ops` before loading", ""
)
def test_an_exported_memory_is_loaded_in_another_process(tmp_path: Path) -> None:
    memory, x = build(), torch.randn(5, 10)
    exported = torch.export.export(memory, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=4096)},))
    torch.export.save(exported, tmp_path / "memory.pt2")
    torch.save(x[:3], tmp_path / "x.pt")
    program = (
        "import sys, pathlib, torch, pkmem.ops\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "out = torch.export.load(folder / 'memory.pt2').module()(torch.load(folder / 'x.pt'))\n"
        "torch.save(out.detach(), folder / 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), memory(x[:3]).detach())


@pytest.mark.case(
    KIND,
    "`torch.compile(dynamic=True, fullgraph=True)` for 1 to 4,096 tokens",
    "works: one graph for all sizes, and one for a single token",
    "",
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_memory_reads_any_number_of_tokens(grad: bool) -> None:
    memory, graphs = build(), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(memory, dynamic=True, fullgraph=True, backend=count)
    with torch.set_grad_enabled(grad):
        for tokens in (2, 3, 8, 9, 100, 4096, 1):
            x = torch.randn(tokens, 10)
            torch.testing.assert_close(compiled(x), memory(x))
    assert len(graphs) <= 2


@pytest.mark.case(
    KIND,
    "`torch.fx.symbolic_trace` of a memory",
    "refused: TraceError; use `torch.export`",
    "https://github.com/vllm-project/llm-compressor/issues/1603",
)
@pytest.mark.case(
    KIND,
    "`torch.jit.script` of a memory",
    "not supported: torch itself replaces it by `torch.export`",
    "https://github.com/pytorch/pytorch/issues/42885",
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_older_graphs_are_refused() -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(build())
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(build())


@pytest.mark.case(
    KIND,
    "`torch.func.grad` and `functional_call` while a RowAdam trains the table",
    "works: the weights given get dense gradients, and the RowAdam sees no reads",
    "",
)
def test_weights_given_for_a_call_are_not_the_ones_that_row_adam_trains() -> None:
    memory = build()
    optimizer = RowAdam(memory)
    other = build()
    given = {name: weight.detach() for name, weight in other.named_parameters()}
    buffers = dict(other.named_buffers())
    x = torch.randn(9, 10)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(memory, weights | buffers, (x,)).square().sum()

    other(x).square().sum().backward()
    transformed = torch.func.grad(loss)(given)
    leaves = {name: weight.clone().requires_grad_() for name, weight in given.items()}
    loss(leaves).backward()
    for name, weight in other.named_parameters():
        torch.testing.assert_close(transformed[name], weight.grad)
        torch.testing.assert_close(leaves[name].grad, weight.grad)
        assert type(leaves[name].grad) is Tensor
    before = memory.values.weight.detach().clone()
    optimizer.step()
    assert memory.values.weight.equal(before)
