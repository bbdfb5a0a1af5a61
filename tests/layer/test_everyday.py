"""What people do to a layer every day and reported of others: each is tried on a memory and has a right value.

The truth is the memory written out in plain torch, all scores and all rows, or the same memory left alone.
"""

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, skip_init, vector_to_parameters
from torch.optim.swa_utils import update_bn
from torch.utils.tensorboard import SummaryWriter

from pkmem import CombinedOptimizer, MemoryConfig, MemoryUsage, ProductKeyMemory, RowAdam
from pkmem.layer.memory import memories_in
from pkmem.layer.optim import dense_parameters

case = pytest.mark.case
CONFIG = MemoryConfig(dim=6, num_sub_keys=5, heads=2, knn=3, query_dim=4, query_norm="rms")


def build(norm: str = "rms", **options) -> ProductKeyMemory:
    return ProductKeyMemory(MemoryConfig(**{**CONFIG.to_dict(), "query_norm": norm, **options}))


def tokens(n: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def plain(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """A memory with query_norm="rms" as autograd sees it: all scores, all rows, no operator of ours."""
    project, norm = memory.query.project, memory.query.norm
    query = F.linear(x, project.weight, project.bias).unflatten(-1, (memory.config.heads, -1))
    first, second = F.rms_norm(query, norm.normalized_shape, norm.weight, norm.eps).chunk(2, -1)
    scores = torch.einsum("nhd,hid->nhi", first, memory.keys.sub_keys[:, 0])[..., :, None]
    scores = scores + torch.einsum("nhd,hjd->nhj", second, memory.keys.sub_keys[:, 1])[..., None, :]
    best = scores.flatten(-2).topk(memory.config.knn)
    rows = F.embedding(best.indices, memory.values.weight)
    return (rows * best.values.softmax(-1)[..., None]).sum((1, 2))


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Equal bits in every parameter, gradient and buffer."""
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    torch.testing.assert_close(dict(first.named_buffers()), dict(second.named_buffers()), rtol=0, atol=0)


def train(memory: ProductKeyMemory, optimizer: torch.optim.Optimizer | None = None, num_steps: int = 2) -> None:
    """Some steps of RowAdam, or of the optimizer given."""
    optimizer = optimizer or RowAdam(memory, lr=0.1)
    for step in range(num_steps):
        optimizer.zero_grad()
        memory((step + 1) * tokens(dtype=memory.values.weight.dtype)).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def outputs(memory: ProductKeyMemory) -> tuple[Tensor, Tensor]:
    """Of one token, which the few-token kernel reads, and of many."""
    memory.eval()
    x = tokens(dtype=memory.values.weight.dtype)
    return memory(x[:1]), memory(x)


# --- the query's batch norm -----------------------------------------------------------------------------------


@case(
    "Padding and recomputation",
    "`swa_utils.update_bn` over padded batches: it takes the batch norm's momentum away",
    "works",
    "https://github.com/pytorch/pytorch/pull/30559",
)
def test_update_bn_averages_the_statistics_of_real_tokens() -> None:
    memory = build("batch").double()
    batches = [tokens(n, torch.float64) for n in (20, 30, 25)]

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = memory

        def forward(self, x: Tensor) -> Tensor:
            return self.memory(x, x[:, 0] > 0)

    memory(7 + batches[0])  # what is to be forgotten
    update_bn([batches[0], -batches[0].abs(), *batches[1:]], Padded())  # the second has no real token at all
    real = [memory.query.project(x[x[:, 0] > 0]) for x in batches]
    norm = memory.query.norm
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in real]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in real]).mean(0))
    assert norm.momentum == 0.1


@case(
    "Modules that others rewrite",
    "the query norm frozen by `memory.query.norm.eval()` while all else trains",
    "works: `model.train()` thaws it, as it does with every batch norm, so call `eval()` on it again after that",
    "https://github.com/pytorch/pytorch/issues/66073",
)
def test_a_frozen_query_norm_normalises_by_its_statistics_and_keeps_them() -> None:
    memory = build("batch")
    memory(5 + tokens())
    expected = copy.deepcopy(memory).eval()(tokens())
    memory.query.norm.eval()
    before = copy.deepcopy(dict(memory.named_buffers()))
    assert torch.equal(memory(tokens()), expected)
    torch.testing.assert_close(dict(memory.named_buffers()), before, rtol=0, atol=0)
    memory.train()(tokens())
    assert memory.query.norm.num_batches_tracked == before["query.norm.num_batches_tracked"] + 1


@case(
    "Gradual surprises",
    "a last training batch of a single token with query_norm='batch'",
    "refused: ValueError of torch, since one token has no variance: drop the last batch, or set query_norm='rms'",
    "https://github.com/scverse/scvi-tools/issues/2314",
)
def test_a_batch_of_one_token_is_refused_by_batch_norm_alone() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        build("batch")(tokens(1))
    for norm in ("layer", "rms", "none"):
        assert build(norm)(tokens(1)).isfinite().all()


# --- copies, loading, saving ----------------------------------------------------------------------------------


@case(
    "Modules that others rewrite",
    "a deep copy of a model with hooks on it, such as those of a `MemoryUsage`",
    "works: a copy that is read counts nothing for the original",
    "https://github.com/VainF/Torch-Pruning/issues/374",
)
def test_a_copy_of_a_watched_memory_is_not_counted() -> None:
    memory = build()
    with MemoryUsage(memory) as usage:
        twin = copy.deepcopy(memory)
        twin(tokens())
        assert usage.num_reads.sum() == 0
        memory(tokens())
    assert usage.num_reads.sum() == 20 * 2 * 3
    memory(tokens())
    assert usage.num_reads.sum() == 20 * 2 * 3


@case(
    "Environments",
    "`torch.save` of a whole memory, loaded by a torch that trusts weights alone (2.6 and later)",
    "refused: UnpicklingError of torch: save `state_dict()`, or load your own file with `weights_only=False`",
    "https://github.com/e3nn/e3nn/issues/519",
)
def test_a_whole_memory_is_loaded_by_those_who_trust_its_file() -> None:
    memory, file = build("batch", gate=True), io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), memory)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = build("batch", gate=True)
    other.load_state_dict(torch.load(file))
    assert_same(other, memory)


@case(
    "Environments",
    "a checkpoint mapped instead of read: `torch.load(mmap=True)`, then `load_state_dict(assign=True)`",
    "works: training leaves the file as it was",
    "https://github.com/rasbt/LLMs-from-scratch/issues/402",
)
def test_a_mapped_table_is_read_and_trained_and_the_file_left_alone(tmp_path: Path) -> None:
    memory, file = build(), tmp_path / "memory.pt"
    torch.save(memory.state_dict(), file)
    with torch.device("meta"):
        mapped = ProductKeyMemory(CONFIG)
    mapped.load_state_dict(torch.load(file, mmap=True), assign=True)
    before = file.read_bytes()
    assert torch.equal(torch.cat(outputs(mapped)), torch.cat(outputs(memory)))
    train(mapped)
    train(memory)
    assert_same(mapped, memory)
    assert file.read_bytes() == before


@case(
    "Life of the reading log",
    "`load_state_dict(assign=True)`, which puts new weights in, after the optimizer was made",
    "refused: RuntimeError from `RowAdam.step()`: make the RowAdam anew after loading",
    "https://github.com/pytorch/tutorials/pull/2522",
)
def test_weights_assigned_after_row_adam_was_made_are_not_silently_left_untrained() -> None:
    memory = build()
    optimizer = RowAdam(memory)
    memory.load_state_dict(copy.deepcopy(memory.state_dict()), assign=True)
    memory(tokens()).sum().backward()
    with pytest.raises(RuntimeError, match="make the RowAdam anew"):
        optimizer.step()


@case(
    "Modules that others rewrite",
    "a memory built on the meta device, then `to_empty` and `reset_parameters`, as FSDP does",
    "works",
    "https://github.com/pytorch/pytorch/issues/104187",
)
def test_a_memory_made_of_nothing_is_drawn_by_reset_parameters() -> None:
    with torch.device("meta"):
        memory = ProductKeyMemory(MemoryConfig(dim=64, num_sub_keys=32, heads=2, knn=4, query_dim=32))
    memory.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*memory.parameters(), *memory.buffers()):
            tensor.fill_(7)
    memory.reset_parameters()
    assert memory.values.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert memory.keys.sub_keys.abs().max().item() == pytest.approx(1 / 4, rel=0.02)
    norm = memory.query.norm
    assert [t.unique().tolist() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)] == [
        [1],
        [0],
        [0],
        [1],
    ]


@case(
    "Modules that others rewrite",
    "all weights drawn anew between folds: `reset_parameters()` of everything that has one",
    "works: the norm's statistics and a shared table too",
    "https://github.com/havakv/pycox/issues/151",
)
@pytest.mark.parametrize("deep", [True, False])
def test_resetting_whatever_can_be_reset_draws_every_weight_anew(deep) -> None:
    memory = build("batch", gate=True, experts=True, query_hidden_dim=5)
    model = nn.Sequential(memory, ProductKeyMemory(memory.config, values=memory.values))
    for part in model:
        part(9 + tokens())
    before = copy.deepcopy(model.state_dict())
    for part in model.modules() if deep else model.children():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name, tensor in model.state_dict().items():
        if "query.norm" not in name:
            assert not torch.equal(tensor, before[name]), name
    for norm in (part.query.norm for part in model):
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()


@case(
    "Life of the reading log",
    "averaged weights copied in for an evaluation and the trained ones back (diffusers' `EMAModel.store`, `restore`)",
    "works: training goes on to the same bits",
    "https://github.com/huggingface/diffusers/pull/2302",
)
def test_weights_exchanged_for_an_evaluation_leave_training_alone() -> None:
    memory = build()
    other = copy.deepcopy(memory)
    optimizers = RowAdam(memory, lr=0.1), RowAdam(other, lr=0.1)
    train(memory, optimizers[0])
    train(other, optimizers[1])
    stored = [parameter.detach().clone() for parameter in memory.parameters()]
    for parameter in memory.parameters():
        parameter.data.copy_(torch.zeros_like(parameter))
    assert all((out == 0).all() for out in outputs(memory))
    for parameter, kept in zip(memory.parameters(), stored, strict=True):
        parameter.data.copy_(kept)
    train(memory, optimizers[0])
    train(other, optimizers[1])
    assert_same(memory, other)


@case(
    "Gradual surprises",
    "the table and the norms kept in fp32 in a model cast to bf16",
    "works: rows are summed as they are, and the output is bf16",
    "https://github.com/unslothai/unsloth/issues/5313",
)
@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
@pytest.mark.parametrize("n", [1, 20])
def test_a_table_may_be_more_exact_than_the_model_around_it(norm, n, backend) -> None:
    memory = build(norm).bfloat16().eval()
    memory.backend = backend
    memory.values.float()
    memory.query.norm.float()
    memory.values.reset_parameters()
    x = tokens(n, torch.bfloat16)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            slots, weights = memory.keys(memory.query(x))
            exact = (memory.values.weight.double()[slots] * weights.double()[..., None]).sum((1, 2))
            torch.testing.assert_close(memory(x), exact.bfloat16())


@case(
    "Gradual surprises",
    "`torch.nn.utils.skip_init(ProductKeyMemory, config)`, to leave the weights undrawn",
    "refused: RuntimeError of torch, since memories take no `device`: build under `torch.device('meta')`, then "
    "`to_empty`",
    "https://github.com/pytorch/pytorch/pull/57555",
)
def test_skip_init_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must support a 'device' arg"):
        skip_init(ProductKeyMemory, CONFIG)


@case(
    "Modules that others rewrite",
    "memories with a shared table through safetensors' `save_model` and `load_model`",
    "works: the table is stored once and shared again; `save_file` on their `state_dict()` is refused by safetensors",
    "https://github.com/safetensors/safetensors/issues/202",
)
def test_safetensors_keeps_a_shared_table_shared(tmp_path: Path) -> None:
    def pair() -> nn.ModuleList:
        first = build("batch")
        return nn.ModuleList([first, ProductKeyMemory(first.config, values=first.values)])

    saved, loaded = pair(), pair()
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(saved.state_dict(), tmp_path / "refused.safetensors")
    save_model(saved, str(tmp_path / "pair.safetensors"))
    assert load_model(loaded, tmp_path / "pair.safetensors") == (set(), [])
    assert_same(saved, loaded)
    assert loaded[0].values.weight is loaded[1].values.weight


@case(
    "Modules that others rewrite",
    "the `_orig_mod.` prefix of a compiled model's state dict",
    "works: as with any module, `torch.compile` adds it and `memory.state_dict()` of the original lacks it",
    "https://github.com/karpathy/nanoGPT/issues/325",
)
def test_a_compiled_model_shares_its_weights_and_tables_with_the_original() -> None:
    memory = build("batch")
    compiled = torch.compile(memory, backend="aot_eager")
    assert list(compiled.state_dict()) == [f"_orig_mod.{name}" for name in memory.state_dict()]
    assert list(memories_in(compiled).values()) == [memory]
    before = memory.values.weight.clone()
    optimizer = RowAdam(compiled)
    memory(tokens()).sum().backward()
    optimizer.step()
    assert not torch.equal(memory.values.weight, before)


# --- weights of another layout --------------------------------------------------------------------------------


def _channels_last(memory: ProductKeyMemory) -> None:
    memory.to(memory_format=torch.channels_last)
    assert not memory.keys.sub_keys.is_contiguous()


def _views(memory: ProductKeyMemory) -> None:
    vector = torch.cat([torch.zeros(1), parameters_to_vector(memory.parameters()).detach()])[1:]
    vector_to_parameters(vector, memory.parameters())
    assert memory.values.weight.data_ptr() % 16


def _transposed(memory: ProductKeyMemory) -> None:
    memory.values.weight.data = memory.values.weight.data.T.contiguous().T
    assert not memory.values.weight.is_contiguous()


@pytest.mark.parametrize(
    "rewrite",
    [
        pytest.param(
            _channels_last,
            marks=case(
                "Modules that others rewrite",
                "`model.to(memory_format=torch.channels_last)`, which gives the 4-d sub-keys other strides",
                "works",
                "https://github.com/pytorch/pytorch/issues/99519",
            ),
        ),
        pytest.param(
            _views,
            marks=case(
                "Modules that others rewrite",
                "weights that are views into one flat buffer at odd addresses (`vector_to_parameters`, ZeRO)",
                "works",
                "https://github.com/deepspeedai/DeepSpeed/pull/8277",
            ),
        ),
        pytest.param(
            _transposed,
            marks=case(
                "Modules that others rewrite",
                "a table that is not contiguous, such as the transpose of an encoder's weight",
                "works: reads, gradients and RowAdam's updates",
                "https://github.com/pytorch/pytorch/issues/1246",
            ),
        ),
    ],
)
def test_weights_of_another_layout_read_and_train_alike(rewrite, backend) -> None:
    memory = build(gate=True, experts=True)
    other = copy.deepcopy(memory)
    rewrite(other)
    gradients = []
    for one in (memory, other):
        one.backend = backend
        gradients.append(torch.autograd.grad(one(tokens()).square().sum(), list(one.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    for one in (memory, other):
        train(one)
    torch.testing.assert_close(memory.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(memory), outputs(other))


# --- how torch itself is set ----------------------------------------------------------------------------------


@pytest.fixture
def torch_as_it_was() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # torch 2.9 asks the None that it leaves there
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


def _meta_by_default() -> None:
    torch.set_default_device("meta")


def _fp64_by_default() -> None:
    torch.set_default_dtype(torch.float64)


def _bf16_by_default() -> None:
    torch.set_default_dtype(torch.bfloat16)


def _deterministic() -> None:
    torch.use_deterministic_algorithms(True)  # it also fills fresh memory with NaN


@pytest.mark.usefixtures("torch_as_it_was")
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(
            _meta_by_default,
            marks=[
                case(
                    "Environments",
                    "another default device (`torch.set_default_device`) than the one the memory is on",
                    "works",
                    "https://github.com/deepmodeling/deepmd-kit/pull/3307",
                ),
            ],
        ),
        pytest.param(
            _fp64_by_default,
            marks=case(
                "Environments",
                "another default dtype (`torch.set_default_dtype`, fp64 or bf16) than the memory's",
                "works",
                "https://github.com/pytorch/pytorch/issues/137186",
            ),
        ),
        _bf16_by_default,
        pytest.param(
            _deterministic,
            marks=case(
                "Environments",
                "`torch.use_deterministic_algorithms(True)`",
                "works: the same bits, since sums are ordered anyway",
                "https://github.com/pytorch/pytorch/issues/108569",
            ),
        ),
    ],
)
def test_a_setting_of_torch_changes_no_bit(setting, backend) -> None:
    memory = build("batch", gate=True, experts=True)
    other = copy.deepcopy(memory)
    memory.backend = other.backend = backend
    x, mask = tokens(), torch.arange(20) < 15
    results = []
    for module in (memory, other):
        if module is other:
            setting()
        optimizer = RowAdam(module, lr=0.1, max_norm=0.01)
        for _ in range(2):
            module.train()(x, mask).square().sum().backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            results.append((module(x[:1]), module(x)))
    assert_same(memory, other)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_random_rounding_of_a_bf16_table_leaves_torchs_random_state() -> None:
    memory = build().bfloat16()
    before = torch.get_rng_state()
    train(memory)
    assert torch.equal(torch.get_rng_state(), before)


@case(
    "Life of the reading log",
    "an evaluation under `torch.inference_mode()` between training steps",
    "works: training goes on to the same bits",
    "https://github.com/unslothai/unsloth/issues/2434",
)
@pytest.mark.parametrize("norm", ["batch", "rms"])
def test_an_evaluation_in_inference_mode_leaves_training_alone(norm) -> None:
    memory = build(norm)
    other = copy.deepcopy(memory)
    optimizers = RowAdam(memory, lr=0.1), RowAdam(other, lr=0.1)
    for _ in range(2):
        for module, optimizer in zip((memory, other), optimizers, strict=True):
            train(module.train(), optimizer, num_steps=1)
        with torch.inference_mode():
            outputs(memory)
    assert_same(memory, other.eval())


@case(
    "Gradual surprises",
    "shapes computed on the meta device without gradient, as tools that estimate memory do",
    "works",
    "https://github.com/pytorch/pytorch/issues/95202",
)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_meta_device_gives_shapes(gradient) -> None:
    memory = build(gate=True, experts=True).to("meta").eval()
    with torch.set_grad_enabled(gradient):
        for n in (1, 20):
            out = memory(torch.empty(2, n, 6, device="meta"))
            assert (out.shape, out.device.type) == ((2, n, 6), "meta")


# --- gradients ------------------------------------------------------------------------------------------------


@case(
    "Modules that others rewrite",
    "saved tensors kept elsewhere until backward (`save_on_cpu`, `saved_tensors_hooks` to disk)",
    "works",
    "https://github.com/pytorch/pytorch/pull/61834",
)
def test_saved_tensors_may_wait_on_disk(tmp_path: Path) -> None:
    memory, x = build().double(), tokens(dtype=torch.float64)

    def pack(tensor: Tensor) -> Path:
        file = tmp_path / str(len(list(tmp_path.iterdir())))
        torch.save(tensor.detach().clone(), file)
        return file

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
        out = memory(x)
    out.square().sum().backward()
    expected = torch.autograd.grad(plain(memory, x).square().sum(), list(memory.parameters()))
    torch.testing.assert_close([p.grad for p in memory.parameters()], list(expected))


@case(
    "Life of the reading log",
    "`torch.autograd.detect_anomaly` over a table whose gradient is not dense",
    "works: the same bits, and a NaN is found",
    "https://github.com/pytorch/pytorch/issues/28649",
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_detection_sees_the_gradient_of_rows() -> None:
    memory = build()
    other = copy.deepcopy(memory)
    train(memory)
    with torch.autograd.detect_anomaly():
        train(other)
        assert_same(memory, other)
        with pytest.raises(RuntimeError, match="returned nan values"):
            (memory(tokens()) * float("nan")).sum().backward()


@case(
    "Modules that others rewrite",
    "full backward hooks on every part, whose outputs are tuples with integers (Captum's way of attribution)",
    "works",
    "https://github.com/meta-pytorch/captum/issues/1215",
)
def test_backward_hooks_on_every_part_see_its_gradients() -> None:
    memory = build(gate=True).double()
    other, seen = copy.deepcopy(memory), {}
    for name, part in other.named_modules():
        part.register_full_backward_hook(lambda _, __, grads, name=name: seen.update({name: grads}))
    x = tokens(dtype=torch.float64).requires_grad_()
    memory(x).square().sum().backward()
    other(x).square().sum().backward()
    assert_same(memory, other)
    assert {"", "query", "keys", "values", "gate"} <= set(seen)
    assert seen["keys"][0] is None  # the slots
    assert seen["keys"][1].shape == (20, 2, 3)


@case(
    "Life of the reading log",
    "the gradient in the input alone (`torch.autograd.grad`, `backward(inputs=...)`), as for saliency",
    "works: RowAdam's next step does not train on it",
    "https://github.com/pytorch/PiPPy/issues/1031",
)
def test_a_gradient_in_the_input_alone_is_not_trained_on() -> None:
    memory, x = build().double(), tokens(dtype=torch.float64).requires_grad_()
    optimizer = RowAdam(memory, lr=0.1)
    before = memory.values.weight.clone()
    (grad,) = torch.autograd.grad(memory(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(memory, x).square().sum(), x)[0])
    memory(x).square().sum().backward(inputs=[x])
    optimizer.step()
    assert torch.equal(memory.values.weight, before)


@case(
    "Life of the reading log",
    "a hook on the table's gradient that keeps some rows fixed (`weight.register_hook`)",
    "works: with a dense gradient and with RowAdam",
    "https://github.com/hiyouga/LlamaFactory/pull/10563",
)
@pytest.mark.parametrize(
    "optimize",
    [
        lambda memory: torch.optim.Adam(memory.parameters(), lr=0.1),
        lambda memory: RowAdam(memory, lr=0.1),
    ],
    ids=["Adam", "RowAdam"],
)
def test_a_gradient_hook_keeps_rows_fixed(optimize) -> None:
    memory = build()
    optimizer, before = optimize(memory), memory.values.weight.clone()
    mask = (torch.arange(25) % 2).unsqueeze(-1)
    memory.values.weight.register_hook(lambda gradient: gradient * mask)
    train(memory, optimizer)
    moved = (memory.values.weight != before).any(-1)
    assert not moved[::2].any()
    assert moved[1::2].sum() > 5


@case(
    "Life of the reading log",
    "`requires_grad` switched off for a backward pass and on again (Lightning's `toggle_optimizer`)",
    "works: that pass does not train the table",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/5292",
)
def test_a_table_toggled_off_takes_no_gradient() -> None:
    memory = build()
    other = copy.deepcopy(memory)
    optimizer = RowAdam(memory, lr=0.1)
    memory.values.weight.requires_grad_(False)
    memory(tokens()).sum().backward()
    memory.values.weight.requires_grad_(True)
    for module, stepping in ((memory, optimizer), (other, RowAdam(other, lr=0.1))):
        module(2 * tokens()).square().sum().backward()
        stepping.step()
    assert torch.equal(memory.values.weight, other.values.weight)


@case(
    "Optimizer protocol",
    "a table frozen in the middle of training, its moments full",
    "works: its values stay bit for bit",
    "https://github.com/facebookresearch/fairseq/issues/4702",
)
@pytest.mark.parametrize("optimize", [RowAdam, lambda memory: torch.optim.AdamW(memory.parameters())])
def test_a_table_frozen_in_training_stays(optimize) -> None:
    memory = build()
    optimizer = optimize(memory)
    train(memory, optimizer)
    optimizer.zero_grad()
    memory.values.weight.requires_grad_(False)
    before = memory.values.weight.clone()
    for _ in range(2):
        memory(tokens()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(memory.values.weight, before)


@case(
    "Optimizer protocol",
    "an optimizer step within the backward pass (`register_post_accumulate_grad_hook`) on a dense table",
    "works",
    "https://github.com/pytorch/pytorch/issues/76464",
)
def test_a_step_within_backward_is_a_step_after_it() -> None:
    memory = build()
    other = copy.deepcopy(memory)
    for parameter in memory.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    memory(tokens()).square().sum().backward()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(tokens()).square().sum().backward()
    optimizer.step()
    assert_same(memory, other)


# --- weights others compute or share --------------------------------------------------------------------------


@case(
    "Modules that others rewrite",
    "training after `torch.nn.utils.prune` of the table and the query network",
    "works: the pruned stay zero; RowAdam refuses such a table until `prune.remove`",
    "https://github.com/horseee/LLM-Pruner/issues/55",
)
def test_pruned_weights_are_read_as_zero_and_stay_so() -> None:
    memory = build().double()
    other = copy.deepcopy(memory)
    for part, name in ((memory.values, "values"), (memory.query.project, "query.project")):
        prune.l1_unstructured(part, "weight", amount=0.5)
        other.get_submodule(name).weight.data *= part.weight_mask
    with pytest.raises(ValueError, match=r"leaf|computed from other tensors"):
        RowAdam(memory)
    torch.testing.assert_close(outputs(memory), outputs(other))
    torch.testing.assert_close(memory(tokens(dtype=torch.float64)), plain(other, tokens(dtype=torch.float64)))
    train(memory, torch.optim.SGD(memory.parameters(), lr=0.1))
    prune.remove(memory.values, "weight")
    assert (memory.values.weight == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)
    train(memory)


@case(
    "Life of the reading log",
    "two memories tied by assigning a weight (`b.values.weight = a.values.weight`)",
    "works: one update a step; `ProductKeyMemory(config, values=a.values)` says the same",
    "https://github.com/pytorch/pytorch/issues/188346",
)
def test_a_table_tied_by_assignment_is_updated_once_a_step() -> None:
    model = nn.ModuleList([build(), build()]).double()
    model[1].values.weight = model[0].values.weight
    dense = copy.deepcopy(model)
    optimizers = RowAdam(model, lr=0.1), torch.optim.Adam([dense[0].values.weight], lr=0.1, betas=(0.9, 0.98))
    x = tokens(dtype=torch.float64)  # the same in every step: the rows read stay the same
    for _ in range(3):
        for pair, optimizer in zip((model, dense), optimizers, strict=True):
            (pair[0](x) + pair[1](x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model[0].values.weight, dense[0].values.weight)


# --- optimizers -----------------------------------------------------------------------------------------------


@case(
    "Optimizer protocol",
    "`torch.optim.LBFGS` with its closure on all weights of a dense memory",
    "works",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/246",
)
def test_lbfgs_follows_the_gradients_of_the_plain_memory() -> None:
    memory, x = build().double(), tokens(dtype=torch.float64)
    other = copy.deepcopy(memory)

    def lower(module: ProductKeyMemory, read) -> float:
        optimizer = torch.optim.LBFGS(module.parameters(), max_iter=5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (read(module, x) - x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return closure().item()

    before = (memory(x) - x).square().mean().item()
    reached = lower(memory, lambda module, x: module(x))
    assert reached == pytest.approx(lower(other, plain), rel=1e-6)
    assert reached < 0.9 * before


@case(
    "Optimizer protocol",
    "`torch.optim.LBFGS` as a part of a CombinedOptimizer",
    "refused: ValueError, since LBFGS needs the closure for itself: step the two apart",
    "https://github.com/huggingface/peft/pull/3382",
)
def test_an_optimizer_that_needs_a_closure_is_refused_in_a_union() -> None:
    memory = build()
    parts = torch.optim.LBFGS(dense_parameters(memory)), RowAdam(memory)
    with pytest.raises(ValueError, match="LBFGS"):
        CombinedOptimizer(*parts)


@case(
    "Life of the reading log",
    "a watcher of gradients (`wandb.watch`, TensorBoard histograms, `p.grad.numpy()`)",
    "works: it sees the dense numbers",
    "https://github.com/wandb/wandb/issues/305",
)
def test_who_watches_gradients_sees_the_numbers(tmp_path: Path) -> None:
    memory = build()
    memory(tokens()).square().sum().backward()
    expected = memory.values.weight.grad
    memory.zero_grad()
    rows = RowAdam(memory, lr=0.1)
    memory(tokens()).square().sum().backward()
    gradient = memory.values.weight.grad
    for look in (
        torch.norm,
        torch.mean,
        torch.std,
        lambda grad: grad.abs().max(),
        lambda grad: grad.view(-1).histc(10),
        lambda grad: grad.isfinite().all(),
        lambda grad: torch.from_numpy(grad.detach().cpu().numpy()),
        lambda grad: torch.from_numpy(np.asarray(grad)),
        lambda grad: torch.tensor(grad.tolist()),
        torch.from_dlpack,
    ):
        torch.testing.assert_close(look(gradient), look(expected))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_histogram("gradient", gradient)
    collected = torch.ones_like(expected)
    collected += gradient
    torch.testing.assert_close(collected, expected + 1)
    rows.step()


@case(
    "Life of the reading log",
    "a model shared among processes, `model.share_memory()`, after a backward pass (Hogwild)",
    "refused: TypeError says to call `zero_grad()` first; without a gradient it works",
    "https://github.com/pytorch/pytorch/issues/41639",
)
def test_reads_are_not_shared_among_processes() -> None:
    memory = build()
    other = copy.deepcopy(memory)
    optimizers = RowAdam(memory, lr=0.1), RowAdam(other, lr=0.1)
    memory(tokens()).sum().backward()
    with pytest.raises(TypeError, match=r"call zero_grad\(\) before that"):
        memory.share_memory()
    memory.zero_grad()
    memory.share_memory()
    assert memory.values.weight.is_shared()
    for module, optimizer in zip((memory, other), optimizers, strict=True):
        train(module, optimizer)
    assert_same(memory, other)


@case(
    "Life of the reading log",
    "gradients of some rows set to zero after backward (`p.grad[:10] = 0`, `p.grad.mul_(mask)`), to keep the rows fixed",
    "refused: TypeError, since the reads are no numbers: mask by `weight.register_hook(lambda grad: grad * mask)`",
    "https://github.com/mlfoundations/open_flamingo/pull/76",
)
def test_rows_of_a_gradient_are_not_silently_left_as_they_are() -> None:
    memory, mask = build(), (torch.arange(25) >= 10).unsqueeze(-1)
    rows = RowAdam(memory)
    memory(tokens()).sum().backward()
    gradient = memory.values.weight.grad
    before = gradient.to_dense()
    with pytest.raises(TypeError, match="kept as its reads"):
        gradient[:10] = 0
    with pytest.raises(TypeError, match="kept as its reads"):
        gradient.mul_(mask)
    assert torch.equal(gradient.to_dense(), before)
    assert rows.grad_norm() > 0


@case(
    "Optimizer protocol",
    "sharpness-aware minimisation: weights pushed along their gradients, a second backward pass, weights pulled back",
    "works",
    "https://github.com/facebookresearch/fairscale/issues/989",
)
def test_a_step_at_the_sharpest_point_nearby() -> None:
    memory, x = build().double(), tokens(dtype=torch.float64)
    other = copy.deepcopy(memory)
    optimizers = RowAdam(memory, lr=0.1), torch.optim.Adam([other.values.weight], lr=0.1, betas=(0.9, 0.98))
    for module, optimizer in zip((memory, other), optimizers, strict=True):
        module(x).square().sum().backward()
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        pushes = [p.grad * (0.05 / norm) for p in module.parameters()]
        with torch.no_grad():
            for parameter, push in zip(module.parameters(), pushes, strict=True):
                parameter.add_(push)
        module.zero_grad()
        module(x).square().sum().backward()
        with torch.no_grad():
            for parameter, push in zip(module.parameters(), pushes, strict=True):
                parameter.sub_(push)
        optimizer.step()
    torch.testing.assert_close(memory.state_dict(), other.state_dict())
