import copy
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracle
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.gate import OutputGate
from pkmem.layer.memory import memories_in
from pkmem.layer.query import MaskedBatchNorm
from pkmem.layer.values import ValueTable, tables_in
from pkmem.ops.reading_log import RowGradient

TINY = MemoryConfig(dim=6, num_sub_keys=4, heads=2, knn=3, query_dim=4, query_norm="none")
VARIANTS = {
    "linear": {},
    "two layers": {"query_hidden_dim": 5},
    "gate": {"gate": True, "value_dim": 3},
    "flat": {"keys": "flat"},
    "experts": {"experts": True, "value_dim": 3},
    "gated experts": {"experts": True, "gate": True},
}
NORMS = ("batch", "layer", "rms", "none")


def make(norm: str = "none", dtype: torch.dtype = torch.float64, **options) -> ProductKeyMemory:
    """A tiny memory in which no weight has a special value, such as a norm's 1 and 0."""
    memory = ProductKeyMemory(dataclasses.replace(TINY, query_norm=norm, **options))
    for parameter in memory.query.norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return memory.to(dtype)


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def read(memory: ProductKeyMemory, query: Tensor, x: Tensor | None = None) -> Tensor:
    """Equations 1 to 3 by brute force, from queries (n, h, q) on; experts see x."""
    if memory.config.keys == "product":
        scores, slots = oracle.product_key_topk(query, memory.keys.sub_keys, memory.config.knn)
    else:
        all_scores = np.einsum("nhq,hmq->nhm", oracle.fp64(query), oracle.fp64(memory.keys.keys))
        scores, slots = oracle.best_first(all_scores, memory.config.knn)
    n = len(slots)
    slots, weights = slots.reshape(n, -1), softmax(scores).reshape(n, -1)
    if memory.neurons is not None:
        seen = oracle.row_products(memory.neurons.weight, slots, x)
        weights = weights * seen * (1 + np.vectorize(math.erf)(seen / math.sqrt(2))) / 2
    return torch.from_numpy(oracle.weighted_sum(memory.values.weight, slots, weights))


def normalised(query: Tensor, norm: nn.Module) -> Tensor:
    """What each norm is, written out, for queries (n, h * q) with q = 4."""
    heads = query.unflatten(-1, (-1, 4))
    match norm:
        case nn.BatchNorm1d():
            mean, variance = query.mean(0), query.var(0, correction=0)
            query = (query - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
            return query.unflatten(-1, (-1, 4))
        case nn.LayerNorm():
            centred = heads - heads.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
        case nn.RMSNorm():
            smallest = torch.finfo(query.dtype).eps
            return heads / (heads.square().mean(-1, keepdim=True) + smallest).sqrt() * norm.weight
    return heads


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_memory_is_the_papers_equations(norm, variant, backend) -> None:
    memory = make(norm, **VARIANTS[variant])
    memory.backend = backend
    x = torch.randn(7, 6, dtype=torch.float64)
    match memory.query.project:
        case nn.Linear() as linear:
            query = x @ linear.weight.T + linear.bias
        case nn.Sequential() as layers:
            query = (x @ layers[0].weight.T + layers[0].bias).relu() @ layers[2].weight.T + layers[2].bias
    expected = read(memory, normalised(query, memory.query.norm), x)
    if memory.gate is not None:
        opened = x @ memory.gate.gate.weight.T
        expected = (expected * opened / (1 + (-opened).exp())) @ memory.gate.project.weight.T
    torch.testing.assert_close(memory(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_input_and_every_weight_are_right(norm, variant, backend) -> None:
    memory = make(norm, **VARIANTS[variant])
    memory.backend = backend
    names, weights = zip(*memory.named_parameters(), strict=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(memory, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *weights), fast_mode=True)


def test_gradients_under_a_mask_are_right() -> None:
    norm = MaskedBatchNorm(3).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(lambda x: norm(x, mask), (x,))
    assert torch.autograd.grad(norm(x, mask)[mask].square().sum(), x)[0][~mask].abs().max() == 0


# --- batch norm and padding -------------------------------------------------------------------------------


def test_padding_changes_neither_real_outputs_nor_statistics() -> None:
    padded = make("batch")
    packed = copy.deepcopy(padded)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False, True, True, True]])
    for _ in range(3):
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        x[~mask] = 1e3
        torch.testing.assert_close(padded(x, mask)[mask], packed(x[mask]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(padded.state_dict(), packed.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_padding_masked_batch_norm_is_torchs(dtype) -> None:
    ours, torchs = MaskedBatchNorm(5).to(dtype), nn.BatchNorm1d(5).to(dtype)
    masked = copy.deepcopy(ours)
    exactness = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for _ in range(3):
        x = 3 + 2 * torch.randn(8, 5, dtype=dtype)
        out = torchs(x)
        assert torch.equal(ours(x), out)
        torch.testing.assert_close(masked(x, torch.ones(8, dtype=torch.bool)), out, **exactness)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(masked.state_dict(), torchs.state_dict(), **exactness)


def test_eval_uses_the_running_statistics_and_leaves_them() -> None:
    memory = make("batch")
    for _ in range(3):
        memory(torch.randn(9, 6, dtype=torch.float64))
    memory.eval()
    norm, before = memory.query.norm, copy.deepcopy(memory.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    query = (memory.query.project(x) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(memory(x), read(memory, query.unflatten(-1, (2, 4))), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory(x)[:1], memory(x[:1]), rtol=1e-12, atol=1e-12)  # one token alone
    mask = torch.tensor([True, False, True, True])
    torch.testing.assert_close(memory(x, mask)[mask], memory(x)[mask], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("num_real", [0, 1])
def test_a_batch_without_variance_leaves_the_statistics_and_stays_finite(num_real) -> None:
    memory = make("batch")
    memory(torch.randn(9, 6, dtype=torch.float64))
    mean, variance = memory.query.norm.running_mean.clone(), memory.query.norm.running_var.clone()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    out = memory(x, torch.arange(5) < num_real)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert torch.equal(memory.query.norm.running_mean, mean)
    assert torch.equal(memory.query.norm.running_var, variance)


def test_one_token_without_a_mask_cannot_train_batch_norm_as_in_torch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make("batch")(torch.randn(1, 6, dtype=torch.float64))


# --- the table and its sharing ----------------------------------------------------------------------------


def test_heads_share_the_values_and_have_their_own_sub_keys() -> None:
    memory = make()
    assert memory.values.weight.shape == (16, 6)
    assert memory.keys.sub_keys.shape == (2, 2, 4, 2)
    assert "num_slots=16, width=6" in repr(memory)
    query = torch.randn(5, 2, 4, dtype=torch.float64)
    before, _ = memory.keys(query)
    with torch.no_grad():
        memory.keys.sub_keys[0].neg_()
    after, _ = memory.keys(query)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_memories_that_share_a_table_add_up_their_gradients_in_it() -> None:
    first = make()
    second = ProductKeyMemory(TINY, values=first.values).double()
    assert first.values.weight is second.values.weight
    x = torch.randn(4, 6, dtype=torch.float64)
    parts = [torch.autograd.grad(memory(x).sum(), first.values.weight)[0] for memory in (first, second)]
    (first(x) + second(x)).sum().backward()
    torch.testing.assert_close(first.values.weight.grad, parts[0] + parts[1], rtol=1e-12, atol=1e-12)
    model = nn.ModuleList([first, second])
    assert tables_in(model) == [first.values]
    assert memories_in(model) == {"0": first, "1": second}


@pytest.mark.parametrize("options", [{"num_sub_keys": 5}, {"value_dim": 7}])
def test_a_shared_table_of_another_shape_is_refused(options) -> None:
    config = dataclasses.replace(TINY, **options)
    needed = (config.num_slots, config.value_width)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ProductKeyMemory(config, values=ValueTable(16, 6))
    assert str(error.value) == f"the shared table is (16, 6) but this memory needs (m, v) = {needed}"


def test_a_memory_without_a_width_is_refused() -> None:
    with pytest.raises(ValueError, match="dim is None"):
        ProductKeyMemory(MemoryConfig())


# --- initial weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "key_dim"), [("product", 16), ("flat", 32)])
def test_initial_scales_are_those_of_the_papers_code(keys, key_dim) -> None:
    config = MemoryConfig(dim=64, num_sub_keys=32, heads=4, knn=4, query_dim=32, keys=keys)
    memory = ProductKeyMemory(config)
    drawn = memory.keys.sub_keys if keys == "product" else memory.keys.keys
    bound = 1 / math.sqrt(key_dim)
    assert bound * 0.98 < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert drawn.mean().abs() < 0.01
    assert memory.values.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.01)
    assert memory.values.weight.mean().abs() < 0.002


@pytest.mark.parametrize("variant", VARIANTS)
def test_reset_parameters_draws_all_weights_as_a_new_memory_does(variant) -> None:
    config = dataclasses.replace(TINY, query_norm="batch", **VARIANTS[variant])
    torch.manual_seed(1)
    used = ProductKeyMemory(config)
    used(torch.randn(9, 6))
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.add_(1)
    torch.manual_seed(3)
    used.reset_parameters()
    fresh = ProductKeyMemory(config)
    for (name, old), (_, new) in zip(used.state_dict().items(), fresh.state_dict().items(), strict=True):
        is_random = "norm" not in name
        assert torch.equal(old, new) != is_random, name
        if is_random and old.numel() > 60:
            assert old.std().item() == pytest.approx(new.std().item(), rel=0.3), name


def test_reset_parameters_draws_a_shared_table_too() -> None:
    first = make()
    second = ProductKeyMemory(TINY, values=first.values)
    before = first.values.weight.clone()
    second.reset_parameters()
    assert not torch.equal(first.values.weight, before)


# --- shapes, dtypes, dropout ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
def test_any_leading_shape_is_kept_and_tokens_are_read_one_by_one(shape, variant, backend) -> None:
    memory = make("layer", **VARIANTS[variant])
    memory.backend = backend
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = memory(x)
    assert out.shape == (*shape[:-1], memory.config.output_dim)
    for place in itertools.product(*map(range, shape[:-1])):
        torch.testing.assert_close(out[place], memory(x[place]), rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.case(
    "Gradual surprises",
    "Hidden states of another width, token ids in their place, or a tensor without a dimension",
    "refused: ValueError with both widths, before anything is computed",
    "",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "given"),
    [
        (torch.randn(2, 10, 7), "(2, 10, 7) torch.float32"),
        (torch.randn(5), "(5,) torch.float32"),
        (torch.randn(6, 1), "(6, 1) torch.float32"),
        (torch.randn(()), "() torch.float32"),
        (torch.randint(9, (2, 6)), "(2, 6) torch.int64"),
        (torch.ones(2, 6, dtype=torch.bool), "(2, 6) torch.bool"),
        (torch.ones(2, 6, dtype=torch.complex64), "(2, 6) torch.complex64"),
        (torch.randn(0, 7), "(0, 7) torch.float32"),
    ],
)
def test_what_is_not_hidden_states_of_its_width_is_refused_with_both_numbers(x, given, training) -> None:
    memory = make("batch", torch.float32).train(training)
    before = copy.deepcopy(memory.state_dict())
    message = f"x is {given} but this memory reads hidden states (..., 6) of a floating dtype"
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            memory(x)
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)


@pytest.mark.case(
    "Gradual surprises",
    "fp64 or bf16 hidden states in an fp32 memory, without autocast",
    "refused: ValueError with both dtypes; convert one with .to(), or use torch.autocast for halves",
    "https://github.com/unslothai/unsloth/issues/3723",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("given", "weights"),
    [(torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_hidden_states_of_another_dtype_are_refused_with_both_dtypes(given, weights, variant, training) -> None:
    memory = make("layer", weights, **VARIANTS[variant]).train(training)
    message = f"x is {given} but the memory's queries are {weights}: convert one of them with .to()"
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=re.escape(message)):
            memory(torch.randn(3, 6).to(given))


@pytest.mark.case("Gradual surprises", "A table of another dtype than the rest of its memory", "works", "")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_table_may_have_a_dtype_of_its_own(dtype) -> None:
    memory = make("layer", torch.float32)
    memory.values.to(dtype)
    x = torch.randn(3, 6)
    expected = read(memory, memory.query(x))
    torch.testing.assert_close(memory(x).double(), expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_another_error_of_the_query_network_is_its_own() -> None:
    memory = make("none", torch.float32)
    memory.query.project.weight = nn.Parameter(torch.randn(8, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        memory(torch.randn(3, 6))


@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_batch_trains_without_touching_the_statistics(norm) -> None:
    memory = make(norm)
    before = copy.deepcopy(memory.state_dict())
    memory(torch.randn(0, 6, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)
    assert memory.values.weight.grad.abs().max() == 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_memory_is_as_exact_as_its_queries(dtype, norm, backend) -> None:
    memory = make(norm, dtype, gate=False)
    memory.backend = backend
    x = torch.randn(6, 6, dtype=dtype, requires_grad=True)
    expected = read(memory, memory.query(x))
    out = memory(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * half_a_unit, atol=1e-5)
    for name, parameter in memory.named_parameters():
        assert parameter.grad.dtype == dtype, name
        assert parameter.grad.isfinite().all(), name
        has_no_say = norm == "batch" and name == "query.project.bias"  # the mean takes it out again
        assert has_no_say or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_mask_is_close_to_fp32(dtype, norm) -> None:
    memory = make(norm, dtype)
    x, mask = torch.randn(6, 6, dtype=dtype), torch.arange(6) < 4
    query = memory.query(x, mask)
    exact = copy.deepcopy(memory).float().query(x.float(), mask)
    assert query.dtype == dtype
    torch.testing.assert_close(query.float(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_autocast_computes_the_query_in_bf16_and_the_memory_in_fp32(backend) -> None:
    memory = make(dtype=torch.float32)
    memory.backend = backend
    x = torch.randn(6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        query = memory.query(x)
        out = memory(x)
    assert query.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), read(memory, query), rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_runs_every_norm_and_the_gate_with_and_without_a_mask(norm) -> None:
    memory = make(norm, torch.float32, gate=True)
    x = torch.randn(6, 6)
    for training, mask in itertools.product((True, False), (None, torch.arange(6) < 4)):
        memory.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            out = memory(x, mask)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


def test_dropout_drops_and_rescales_the_output_in_training_only() -> None:
    memory = make(dropout=0.5)
    x = torch.randn(200, 6, dtype=torch.float64)
    dropped, whole = memory(x), memory.eval()(x)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    torch.testing.assert_close(whole, read(memory, memory.query(x)), rtol=1e-12, atol=1e-12)


def test_query_dropout_drops_and_rescales_queries_in_training_only() -> None:
    memory = make("layer", query_dropout=0.25)
    x = torch.randn(200, 6, dtype=torch.float64)
    dropped, whole = memory.query(x), memory.eval().query(x)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_the_backend_of_a_memory_reaches_its_operators(backend) -> None:
    memory = make()
    assert memory.backend is None
    memory.backend = backend
    assert memory.keys.backend == memory.values.backend == memory.backend == backend
    memory.backend = "abacus"
    with pytest.raises(ValueError, match="backend is 'abacus' but must be one of"):
        memory(torch.randn(2, 6, dtype=torch.float64))


def test_the_backend_of_a_memory_reaches_its_experts(backend) -> None:
    memory = make(experts=True)
    memory.backend = backend
    assert memory.neurons.backend == memory.values.backend == memory.keys.backend == backend


def test_rows_of_both_tables_of_experts_learn_as_with_a_dense_gradient(backend) -> None:
    torch.manual_seed(1)
    by_rows, dense = make(experts=True), make(experts=True)
    dense.load_state_dict(by_rows.state_dict())
    rows = RowAdam(by_rows, lr=0.1, betas=(0.9, 0.98))
    assert len(tables_in(by_rows)) == 2
    adam = torch.optim.Adam([table.weight for table in tables_in(dense)], lr=0.1, betas=(0.9, 0.98))
    x = torch.randn(5, 6, dtype=torch.float64)  # the same in every step: the rows read stay the same
    for _ in range(3):
        for memory, optimizer in ((by_rows, rows), (dense, adam)):
            memory.backend = backend
            memory(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(tables_in(by_rows), tables_in(dense), strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-9)


def test_memories_that_share_values_keep_their_own_neurons() -> None:
    first = make(experts=True)
    second = ProductKeyMemory(first.config, values=first.values).double()
    assert second.values is first.values
    assert second.neurons is not first.neurons


def test_a_gates_width_is_the_models() -> None:
    gate = OutputGate(MemoryConfig(dim=6, value_dim=3))
    assert gate(torch.randn(4, 3), torch.randn(4, 6)).shape == (4, 6)


# --- copies, saving, compilers ----------------------------------------------------------------------------


def test_a_copy_has_dense_gradients_and_the_original_keeps_its_reads() -> None:
    memory = make()
    optimizer = RowAdam(memory)
    twin = copy.deepcopy(memory)
    x = torch.randn(3, 6, dtype=torch.float64)
    for one in (memory, twin):
        one(x).sum().backward()
    assert len(memory.values.log.entries) == 1
    assert type(twin.values.weight.grad) is Tensor
    before = twin.values.weight.clone()
    optimizer.step()
    assert torch.equal(twin.values.weight, before)
    assert not torch.equal(memory.values.weight, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_makes_an_equal_memory(variant) -> None:
    memory = make("batch", **VARIANTS[variant])
    x = torch.randn(9, 6, dtype=torch.float64)
    memory(x)
    other = make("batch", **VARIANTS[variant])
    other.load_state_dict(memory.state_dict())
    assert torch.equal(memory.eval()(x), other.eval()(x))


def test_the_names_of_the_weights_are_kept_for_saved_models() -> None:
    assert list(make("batch", gate=True, value_dim=3).state_dict()) == [
        "query.project.weight",
        "query.project.bias",
        "query.norm.weight",
        "query.norm.bias",
        "query.norm.running_mean",
        "query.norm.running_var",
        "query.norm.num_batches_tracked",
        "keys.sub_keys",
        "values.weight",
        "gate.gate.weight",
        "gate.project.weight",
    ]


def test_the_names_of_the_weights_of_experts_are_kept_too() -> None:
    assert [name for name in make(experts=True).state_dict() if "query" not in name] == [
        "keys.sub_keys",
        "values.weight",
        "neurons.weight",
    ]


class Block(nn.Module):
    """Stands for a transformer's block."""

    def __init__(self, memory: ProductKeyMemory) -> None:
        super().__init__()
        self.norm, self.memory = nn.LayerNorm(6), memory

    def forward(self, x: Tensor) -> Tensor:
        return x + self.memory(self.norm(x)).tanh()


def assert_trained_alike(first: Block, second: Block, exactness: dict[str, float]) -> None:
    """Equal gradients and, in rows mode, equal logs."""
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if name == "memory.values.weight":
            assert isinstance(one.grad, RowGradient)
            assert isinstance(other.grad, RowGradient)
        else:
            torch.testing.assert_close(one.grad, other.grad, **exactness, msg=name)
    torch.testing.assert_close(dict(first.named_buffers()), dict(second.named_buffers()), **exactness)
    logs = first.memory.values.log, second.memory.values.log
    assert len(logs[0].entries) == len(logs[1].entries) > 0
    for one, other in zip(*(log.entries for log in logs), strict=True):
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one, other, **exactness)


@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_a_block_compiled_whole_trains_like_the_eager_one(norm, backend) -> None:
    eager = Block(make(norm, torch.float32))
    eager.memory.backend = backend
    compiled = copy.deepcopy(eager)
    optimizers = RowAdam(eager), RowAdam(compiled)
    run_compiled = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 5, 6)
        outputs = eager(x), run_compiled(x)
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
        for out in outputs:
            out.square().sum().backward()
    assert_trained_alike(eager, compiled, {"rtol": 1e-5, "atol": 1e-6})
    norms = [optimizer.grad_norm() for optimizer in optimizers]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_checkpointed_block_trains_like_the_plain_one_and_logs_once(backend) -> None:
    plain = Block(make("layer")).double()
    plain.memory.backend = backend
    saving = copy.deepcopy(plain)
    optimizers = RowAdam(plain), RowAdam(saving)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    plain(x).square().sum().backward()
    checkpoint(saving, x, use_reentrant=False).square().sum().backward()
    assert_trained_alike(plain, saving, {"rtol": 0, "atol": 0})
    assert len(saving.memory.values.log.entries) == 1
    assert optimizers[0].grad_norm() == optimizers[1].grad_norm()
