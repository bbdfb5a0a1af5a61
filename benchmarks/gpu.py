"""Is the Triton backend right on a GPU, and how fast is it? One run checks and measures everything.

    python benchmarks/gpu.py            # within eight minutes -> results/gpu.json and results/gpu.md
    python benchmarks/gpu.py --smoke    # tiny sizes, on the CPU under Triton's interpreter: does it run?

The checks of `pkmem doctor` come first. Contenders take turns (A B A B); a ratio is taken within a
turn, and the median and the 10th to 90th percentile are reported. A part that fails is written down and the next one
runs; results are saved after every part. Without a GPU, and without --smoke, nothing is measured or written.
"""

from __future__ import annotations

import os
import sys

if "--smoke" in sys.argv:  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from harness import Report, Timings, one_line
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam, ops
from pkmem.doctor import tables
from pkmem.doctor.examination import examine, findings_of
from pkmem.doctor.sizes import INTERPRETED
from pkmem.layer.optim import dense_parameters
from pkmem.layer.query import QueryNetwork

BUDGET_S = 420  # after which no part begins
QUICK_CHECKS = (tables.sums_with_gaps, tables.sums_beside_nan)


@dataclass(frozen=True)
class Sizes:
    """What is measured: a GPU's sizes, or tiny ones."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    operator: MemoryConfig = field(default_factory=lambda: MemoryConfig(dim=1024, num_sub_keys=1024))
    operator_tokens: int = 32 << 10
    layer_tokens: int = 16 << 10
    wide_table: MemoryConfig = field(default_factory=lambda: MemoryConfig(dim=512, num_sub_keys=4096))
    large_table: MemoryConfig = field(default_factory=lambda: MemoryConfig(dim=1024, num_sub_keys=2048))
    large_steps: int = 100
    large_tokens: int = 4096
    copied_bytes: int = 4 << 30
    layers: int = 12
    context: int = 1024
    prompts: int = 8
    vocabulary: int = 32_000

    @property
    def smoke(self) -> bool:
        """Whether the figures mean nothing."""
        return self.device == "cpu"


def smoke_sizes() -> Sizes:
    """Sizes that the interpreter gets through in seconds."""
    tiny = MemoryConfig(dim=16, num_sub_keys=4, heads=1, knn=2, query_dim=4)
    return Sizes(
        device="cpu", dtype=torch.float32, operator=tiny, operator_tokens=3, layer_tokens=2, wide_table=tiny,
        large_table=tiny, large_steps=4, large_tokens=2, copied_bytes=1 << 10, layers=2, context=4, prompts=1,
        vocabulary=11,
    )  # fmt: skip


# --- running parts ---------------------------------------------------------------------------------------


def run_part(part: Callable[[Sizes, Report], None], sizes: Sizes, report: Report, end: float) -> None:
    """Runs a part, unless the time is up, notes how it ended, and saves."""
    name, begin = part.__name__, time.monotonic()
    status = "no time left"
    if begin < end:
        status = "ran"
        try:
            part(sizes, report)
        except Exception as error:
            status = one_line(error)
            report.details[f"{name} failed"] = traceback.format_exc()
    report.note(f"{name}: {status}, {time.monotonic() - begin:.1f} s")
    _free()
    report.save()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- measuring -------------------------------------------------------------------------------------------


def interleave(report: Report, case: str, contenders: dict[str, Callable[[], Any]]) -> Timings:
    """Times contenders in turns and keeps their seconds."""
    timings = harness.interleave(contenders, report.options.repeats, seconds_per_call)
    report.keep(case, timings)
    return timings


def seconds_per_call(call: Callable[[], Any], calls: int) -> float:
    """By the GPU's clock, which does not count how far ahead of it the host is."""
    if not torch.cuda.is_available():
        return harness.wall_seconds(call, calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


@contextmanager
def making(sizes: Sizes) -> Iterator[None]:
    """Modules are made on the device and in the dtype measured: a large table never exists in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with torch.device(sizes.device):
            yield
    finally:
        torch.set_default_dtype(before)


def memory_of(sizes: Sizes, config: MemoryConfig) -> ProductKeyMemory:
    with making(sizes):
        memory = ProductKeyMemory(config)
    memory.backend = "triton"
    return memory


def randn(sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(*shape, device=sizes.device, dtype=sizes.dtype)


# --- parts -----------------------------------------------------------------------------------------------


def checks(sizes: Sizes, report: Report) -> None:
    """What `pkmem doctor` checks; a table past 2 ** 31 elements is among it."""
    device = torch.device(sizes.device)
    findings = (
        findings_of(QUICK_CHECKS, "triton", device, INTERPRETED, True)
        if sizes.smoke
        else examine("triton", device, True)
    )
    outcomes: Counter[str] = Counter()
    failed = []
    for finding in findings:
        what = " ".join(part for part in (f"point {finding.point}:", finding.check, finding.dtype) if part)
        outcomes[finding.outcome] += 1
        print(f"{what}: {finding.outcome}; {finding.note}", flush=True)
        if finding.outcome == "failed":
            failed.append(f"{what}: {finding.note}")
        elif finding.note:
            report.note(f"{what}: {finding.outcome}, {finding.note}")
        _free()
    for outcome, count in outcomes.items():
        report.add(f"checks: {outcome}", count)
    if failed:
        raise AssertionError("; ".join(failed))


def plain_selection(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """The usual lines of torch: scores of both halves, top-k of each, top-k of the knn ** 2 pairs."""
    first, second = query.chunk(2, -1)
    scores1, ranks1 = torch.einsum("nhd,hsd->nhs", first, sub_keys[:, 0]).topk(knn)
    scores2, ranks2 = torch.einsum("nhd,hsd->nhs", second, sub_keys[:, 1]).topk(knn)
    pairs = (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)
    slots = (ranks1[..., :, None] * sub_keys.shape[2] + ranks2[..., None, :]).flatten(-2)
    scores, best = pairs.topk(knn)
    return scores, slots.gather(-1, best)


def bag(sizes: Sizes, report: Report) -> None:
    """Rows gathered per second against the device's copy rate and against F.embedding_bag."""
    from pkmem.ops import triton as backend

    config = sizes.operator
    tokens, reads = sizes.operator_tokens, config.heads * config.knn
    values = randn(sizes, config.num_slots, config.value_width)
    slots = torch.randint(config.num_slots, (tokens, reads), device=sizes.device)
    weights = torch.rand(tokens, reads, device=sizes.device)
    narrow_weights, grad_output = weights.to(sizes.dtype), randn(sizes, tokens, config.value_width)
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    timings = interleave(report, "bag", {
        "ours": lambda: backend.weighted_sum(values, slots, weights),
        "copy": lambda: target.copy_(source),
        "torch": lambda: F.embedding_bag(slots, values, mode="sum", per_sample_weights=narrow_weights),
        "grad_weights": lambda: backend.row_products(values, slots, grad_output),
    })  # fmt: skip
    gathered = tokens * reads * config.value_width * values.element_size()
    report.add("copy rate, TB/s", 2 * source.numel() / timings.median("copy") / 1e12)
    report.add("bag, gathered TB/s", gathered / timings.median("ours") / 1e12)
    timings = timings.with_sum("the same bytes copied", {"copy": gathered / (2 * source.numel())})
    report.add("bag: gathered rate over copy rate", timings.ratio("the same bytes copied", "ours"))
    report.add("bag: F.embedding_bag's time over ours", timings.ratio("torch", "ours"))
    report.add("d(weights): gathered rate over copy rate", timings.ratio("the same bytes copied", "grad_weights"))


def selection(sizes: Sizes, report: Report) -> None:
    """The selection against torch's top-k, and its share of the layer."""
    from pkmem.ops import triton as backend

    config = sizes.operator
    memory = memory_of(sizes, config).eval()
    x = randn(sizes, sizes.operator_tokens, config.bound_dim)
    with torch.no_grad():
        query, sub_keys = memory.query(x), memory.keys.sub_keys
        scores, slots = backend.product_key_topk(query, sub_keys, config.knn)
        grad_scores = torch.randn_like(scores)
        timings = interleave(report, "selection", {
            "ours": lambda: backend.product_key_topk(query, sub_keys, config.knn),
            "torch": lambda: plain_selection(query, sub_keys, config.knn),
            "layer": lambda: memory(x),
            "backward": lambda: backend.product_key_topk_backward(grad_scores, query, sub_keys, slots),
        })  # fmt: skip
    report.add("selection, ms", 1000 * timings.median("ours"))
    report.add("selection backward, ms", 1000 * timings.median("backward"))
    report.add("selection: torch's time over ours", timings.ratio("torch", "ours"))
    report.add("selection: share of the layer's forward", timings.ratio("ours", "layer"))


class PlainLayer(nn.Module):
    """The same layer with plain torch's selection and nn.EmbeddingBag, trained by one dense AdamW."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.knn = config.knn
        self.query = QueryNetwork(config)
        self.sub_keys = nn.Parameter(torch.randn(config.heads, 2, config.num_sub_keys, config.query_dim // 2) / 8)
        self.values = nn.EmbeddingBag(config.num_slots, config.value_width, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, v)."""
        scores, slots = plain_selection(self.query(x), self.sub_keys, self.knn)
        return self.values(slots.flatten(1), per_sample_weights=scores.softmax(-1).flatten(1))


def dense_adam(sizes: Sizes, parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=not sizes.smoke)


def memory_step(sizes: Sizes, config: MemoryConfig, narrow_moments: bool = False) -> Callable[[], None]:
    """A training step of our layer with RowAdam."""
    memory = memory_of(sizes, config)
    # fp32 moments of the widest table do not fit on one GPU, and AdamW's are bf16 too.
    rows = RowAdam(memory, moment_dtype=torch.bfloat16 if narrow_moments else None)
    dense = dense_adam(sizes, dense_parameters(memory))
    return _stepping(sizes, memory, config, rows, dense)


def plain_step(sizes: Sizes, config: MemoryConfig) -> Callable[[], None]:
    """A training step of the plain layer."""
    with making(sizes):
        layer = PlainLayer(config)
    return _stepping(sizes, layer, config, dense_adam(sizes, layer.parameters()))


def _stepping(
    sizes: Sizes, layer: nn.Module, config: MemoryConfig, *optimizers: torch.optim.Optimizer
) -> Callable[[], None]:
    x = randn(sizes, sizes.layer_tokens, config.bound_dim).requires_grad_()
    grad_output = 1e-3 * randn(sizes, sizes.layer_tokens, config.value_width)

    def step() -> None:
        layer(x).backward(grad_output)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def training_step(sizes: Sizes, report: Report) -> None:
    """One million slots: all layers at once, in turns; AdamW's moments are bf16, ours are so too and fp32."""
    timings = interleave(report, "training step", {
        "fp32 moments": memory_step(sizes, sizes.operator),
        "bf16 moments": memory_step(sizes, sizes.operator, True),
        "plain": plain_step(sizes, sizes.operator),
    })  # fmt: skip
    what = f"training step, {sizes.operator.num_slots:,} slots x {sizes.operator.value_width}"
    for moments in ("fp32 moments", "bf16 moments"):
        report.add(f"{what}: ours, {moments}, ms", 1000 * timings.median(moments))
    report.add(f"{what}: dense AdamW's time over ours, fp32 moments", timings.ratio("plain", "fp32 moments"))
    ratio = timings.ratio("plain", "bf16 moments")
    report.add(f"{what}: dense AdamW's time over ours, bf16 moments", ratio)


def training_step_wide_table(sizes: Sizes, report: Report) -> None:
    """Sixteen million slots, bf16 moments on both sides: one after the other, since one alone fills a GPU."""
    config = sizes.wide_table
    medians = {}
    for name, build in (
        ("ours", lambda: memory_step(sizes, config, True)),
        ("plain", lambda: plain_step(sizes, config)),
    ):
        step = build()
        medians[name] = interleave(report, f"training step, wide table, {name}", {name: step}).median(name)
        del step
        _free()
        report.add(
            f"training step, {config.num_slots:,} slots x {config.value_width}: {name}, ms", 1000 * medians[name]
        )
    what = f"training step, {config.num_slots:,} slots: dense AdamW's time over ours (not in turns)"
    report.add(what, medians["plain"] / medians["ours"])


def layer_forward(sizes: Sizes, report: Report) -> None:
    """The layer's forward against the dense FFN it replaces, and the rows it has to read against both."""
    config = sizes.operator
    memory, x = memory_of(sizes, config).eval(), randn(sizes, sizes.layer_tokens, config.bound_dim)
    with making(sizes):
        ffn = feed_forward(config.bound_dim)
    rows = torch.empty(sizes.layer_tokens * config.heads * config.knn, config.value_width // 2,
                       dtype=sizes.dtype, device=sizes.device)  # fmt: skip
    halves = torch.empty_like(rows)  # copied, as many bytes are read and written as rows are read
    with torch.no_grad():
        timings = interleave(report, "layer forward", {
            "ours": lambda: memory(x), "ffn": lambda: ffn(x), "copy": lambda: halves.copy_(rows)
        })  # fmt: skip
    report.add("layer forward, ms", 1000 * timings.median("ours"))
    report.add("layer forward: ours over a dense FFN (4d)", timings.ratio("ours", "ffn"))
    report.add("layer forward: its rows at the copy rate over a dense FFN (4d)", timings.ratio("copy", "ffn"))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Block(nn.Module):
    """A pre-norm block of a decoder, with a key-value cache of fixed size for one-token decoding."""

    def __init__(self, sizes: Sizes, mlp: nn.Module) -> None:
        super().__init__()
        width = sizes.operator.bound_dim
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), mlp
        shape = (1, self.heads, sizes.context, width // self.heads)
        self.register_buffer("key_cache", torch.zeros(shape))
        self.register_buffer("value_cache", torch.zeros(shape))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """(n, t, d) -> (n, t, d); with a position, one token at that place of the cache."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None
        if position is not None:
            k, v = self.key_cache.index_copy_(2, position, k), self.value_cache.index_copy_(2, position, v)
            mask = (torch.arange(k.shape[2], device=x.device) <= position)[None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.project(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A decoder of so many layers, one of which may have a memory for its MLP."""

    def __init__(self, sizes: Sizes, layers: int, with_memory: bool) -> None:
        super().__init__()
        width = sizes.operator.bound_dim
        mlps: list[nn.Module] = [feed_forward(width) for _ in range(layers)]
        if with_memory:
            memory = ProductKeyMemory(sizes.operator)
            memory.backend = "triton"
            mlps[layers // 2] = memory
        self.embed = nn.Embedding(sizes.vocabulary, width)
        self.blocks = nn.ModuleList(Block(sizes, mlp) for mlp in mlps)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """(n, t) -> logits of the last token (n, vocabulary)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, position)
        return self.head(self.norm(x[:, -1]))


def decoder_of(sizes: Sizes, layers: int, with_memory: bool) -> Decoder:
    with making(sizes):
        return Decoder(sizes, layers, with_memory).eval()


def decoding(sizes: Sizes, model: Decoder) -> Callable[[], Any]:
    """One step of decoding, as a CUDA graph where there is a GPU."""
    token = torch.ones(1, 1, dtype=torch.int64, device=sizes.device)
    position = torch.tensor([sizes.context // 2], device=sizes.device)

    @torch.no_grad()
    def step() -> Tensor:
        return model(token, position)

    return step if sizes.smoke else graphed(step)


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def models(sizes: Sizes, report: Report) -> None:
    """12 layers with a memory against the same without, and against 24 layers: decoding and prefill."""
    shapes = {"memory": (sizes.layers, True), "shallow": (sizes.layers, False), "deep": (2 * sizes.layers, False)}
    decoders = {name: decoder_of(sizes, *shape) for name, shape in shapes.items()}
    decode = interleave(report, "decode", {name: decoding(sizes, model) for name, model in decoders.items()})
    report.add("decode with a memory, ms per token", 1000 * decode.median("memory"))
    report.add("decode: with a memory over without", decode.ratio("memory", "shallow"))
    report.add("decode: 24 layers over 12 and a memory", decode.ratio("deep", "memory"))
    tokens = torch.randint(sizes.vocabulary, (sizes.prompts, sizes.context), device=sizes.device)
    with torch.no_grad():
        prefill = interleave(report, "prefill", {
            name: (lambda model=model: model(tokens)) for name, model in decoders.items()
        })  # fmt: skip
    report.add("prefill: with a memory over without", prefill.ratio("memory", "shallow"))
    report.add("prefill: 24 layers over 12 and a memory", prefill.ratio("deep", "memory"))


def large_table(sizes: Sizes, report: Report) -> None:
    """A table of four billion parameters learns fixed targets on one GPU."""
    config = sizes.large_table
    memory = memory_of(sizes, config)
    rows, dense = RowAdam(memory, lr=1e-2), dense_adam(sizes, dense_parameters(memory))
    x = randn(sizes, sizes.large_tokens, config.bound_dim)
    target = 0.1 * randn(sizes, sizes.large_tokens, config.value_width)
    losses, begin = [], time.perf_counter()
    for _ in range(sizes.large_steps):
        loss = (memory(x).float() - target.float()).square().mean()
        loss.backward()
        rows.step()
        dense.step()
        dense.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    first, *_, last = torch.stack(losses).tolist()
    report.add(
        f"table of {memory.values.weight.numel():,}: ms per step", 1000 * (time.perf_counter() - begin) / len(losses)
    )
    report.add("loss after over before", last / first)
    if torch.cuda.is_available():
        report.add("peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)


def compiled_block(sizes: Sizes, report: Report) -> None:
    """torch.compile(fullgraph=True) of a block with a memory, in training and in inference, against eager."""
    if sizes.smoke:
        return  # compiling for the CPU takes a minute
    with making(sizes):
        memory = ProductKeyMemory(MemoryConfig(dim=1024, num_sub_keys=128, query_norm="layer"))
        block = Block(sizes, memory)
    memory.backend = "triton"
    optimizer = RowAdam(memory)  # while it lives, the table keeps its reads
    x = randn(sizes, 2, 512, 1024)
    compiled = torch.compile(block, fullgraph=True)
    gradients = []
    for run_block in (block, compiled):
        block.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        run_block(given).sum().backward()
        gradients.append(given.grad)
    report.add("compiled training: norm of the table's gradient", optimizer.grad_norm())
    report.add("compiled training: d(x) off by", _difference(*gradients))
    block.eval()
    with torch.no_grad():
        report.add("compiled inference: output off by", _difference(block(x), compiled(x)))


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """Relative, in the Euclidean norm."""
    assert one is not None
    assert other is not None
    return float((one.float() - other.float()).norm() / one.float().norm())


def host_waits(sizes: Sizes, report: Report) -> None:
    """A training step and a decoding step wait for the GPU nowhere: torch raises where they do."""
    step = memory_step(sizes, sizes.operator)
    model = decoder_of(sizes, 2, True)
    token = torch.ones(1, 1, dtype=torch.int64, device=sizes.device)
    position = torch.tensor([1], device=sizes.device)
    with torch.no_grad():
        model(token, position)
    step()
    reasons = {}
    for name, call in (("training", step), ("decoding", torch.no_grad()(lambda: model(token, position)))):
        try:
            with waiting_raises(sizes):
                call()
        except RuntimeError as error:
            reasons[name] = one_line(error)
            print(traceback.format_exc(), flush=True)
        report.add(f"{name} step waits for the GPU (1 = yes)", float(name in reasons))
    if reasons:
        raise AssertionError(str(reasons))


@contextmanager
def waiting_raises(sizes: Sizes) -> Iterator[None]:
    if sizes.smoke:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


PARTS = (
    checks,
    bag,
    selection,
    layer_forward,
    training_step,
    models,
    host_waits,
    large_table,
    training_step_wide_table,
    compiled_block,
)


def main() -> None:
    """Runs every part, or says that there is no GPU."""
    options = harness.start(__doc__, repeats=9, parts=[part.__name__ for part in PARTS])
    reason = why_not(options.smoke)
    if reason:
        print(reason)
        return
    report, sizes = Report("gpu", options, device="cuda"), smoke_sizes() if options.smoke else Sizes()
    report.note(f"driver {_driver()}")
    end = time.monotonic() + BUDGET_S
    for part in PARTS:
        if part.__name__ in options.only:
            run_part(part, sizes, report, end)
    report.write()


def why_not(smoke: bool) -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not smoke and not torch.cuda.is_available():
        return "no GPU here: nothing was measured"
    if find_spec("triton") is None:
        return "Triton is not installed: nothing was measured"
    if "triton" not in ops.BACKENDS:
        return "pkmem.ops.BACKENDS has no 'triton': nothing was measured"
    return None


if __name__ == "__main__":
    main()
