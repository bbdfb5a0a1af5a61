"""Does the Triton backend hold on a GPU what the issues ask of it? One run checks and measures everything.

    python benchmarks/gpu.py            # within eight minutes -> results/gpu.json and results/gpu.md
    python benchmarks/gpu.py --smoke    # tiny sizes, on the CPU under Triton's interpreter: does it run?

The checks of tests/test_triton.py come first, on the GPU. Contenders take turns (A B A B); a ratio is taken within a
turn, and the median and the 10th to 90th percentile are reported. A part that fails is written down and the next one
runs; results are saved after every part. Without a GPU, and without --smoke, nothing is measured.
"""

from __future__ import annotations

import os
import sys

if "--smoke" in sys.argv:  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import gc
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import RESULTS, Ratio, one_line
from pkmem import MemoryConfig, ProductKeyMemory, RowAdam, ops
from pkmem.experiments.environment import environment
from pkmem.layer.optim import dense_parameters
from pkmem.layer.query import QueryNetwork
from pkmem.training.files import save_json

BUDGET_S = 420  # after which no part begins
TESTS = Path(__file__).parents[1] / "tests"
QUICK_CHECKS = ("a_query_that_is_not_finite_disturbs_no_other", "tables_may_have_gaps_between_rows")


@dataclass(frozen=True)
class Sizes:
    """What is measured: the issue's sizes, or tiny ones."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    turns: int = 9
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
        device="cpu", dtype=torch.float32, turns=1, operator=tiny, operator_tokens=3, layer_tokens=2, wide_table=tiny,
        large_table=tiny, large_steps=4, large_tokens=2, copied_bytes=1 << 10, layers=2, context=4, prompts=1,
        vocabulary=11,
    )  # fmt: skip


# --- running parts and writing results -------------------------------------------------------------------


class Run:
    """The results so far; every part ends with a save.

    Args:
        sizes: what to measure.
        out: folder of the results.
    """

    def __init__(self, sizes: Sizes, out: Path) -> None:
        self.sizes, self.out = sizes, out
        self.lines: list[dict[str, Any]] = []
        self.parts: dict[str, dict[str, Any]] = {}
        self.begin = time.monotonic()
        self.where = {**environment(), "driver": _driver(), "device": sizes.device}

    def part(self, function: Callable[[Run], None]) -> None:
        """Runs a part, unless the time is up, and saves."""
        name, begin = function.__name__, time.monotonic()
        part: dict[str, Any] = {"status": "no time left"}
        if begin - self.begin < BUDGET_S:
            part["status"] = "ran"
            try:
                function(self)
            except Exception as error:
                part |= {"status": one_line(error), "traceback": traceback.format_exc()}
        part["seconds"] = time.monotonic() - begin
        self.parts[name] = part
        print(f"{name}: {part['status']}, {part['seconds']:.1f} s", flush=True)
        _free()
        self.save()

    def add(
        self, what: str, measured: Ratio | float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """A line of the table: a ratio or another figure, and its target if there is one."""
        ratio = measured if isinstance(measured, Ratio) else Ratio(measured, measured, measured)
        met = None
        if not self.sizes.smoke and (at_least, at_most) != (None, None):
            met = (at_least is None or ratio.median >= at_least) and (at_most is None or ratio.median <= at_most)
        self.lines.append({"what": what, **asdict(ratio), "at_least": at_least, "at_most": at_most, "met": met})

    def save(self) -> None:
        """Writes gpu.json and gpu.md."""
        save_json(self.out / "gpu.json", {"environment": self.where, "parts": self.parts, "lines": self.lines})
        (self.out / "gpu.md").write_text(self._table() + "\n")

    def _table(self) -> str:
        where, versions = self.where, self.where["versions"]
        rows = ["# gpu" + (" (smoke: the figures mean nothing)" if self.sizes.smoke else ""), ""]
        rows.append(
            f"{where['gpu'] or where['processor']}, driver {where['driver']}, torch {versions.get('torch')}, "
            f"triton {versions.get('triton')}, commit {where['commit']}, {self.sizes.turns} turns"
        )
        rows += ["", "| what | median (10th-90th percentile) | target | met |", "|---|---|---|---|"]
        rows += [_row(line) for line in self.lines]
        rows += ["", "| part | status | seconds |", "|---|---|---|"]
        rows += [f"| {name} | {part['status']} | {part['seconds']:.0f} |" for name, part in self.parts.items()]
        return "\n".join(rows)


def _row(line: dict[str, Any]) -> str:
    ratio = Ratio(line["median"], line["low"], line["high"])
    measured = f"{ratio.median:.3g}" if ratio.low == ratio.high else str(ratio)
    targets = [("at least", line["at_least"]), ("at most", line["at_most"])]
    target = " and ".join(f"{word} {bound:g}" for word, bound in targets if bound is not None)
    return f"| {line['what']} | {measured} | {target} | {({None: '', True: 'yes', False: '**no**'})[line['met']]} |"


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


def interleave(run: Run, contenders: dict[str, Callable[[], Any]], least_s: float = 0.01) -> dict[str, list[float]]:
    """Seconds per call of every contender, one for each turn; short calls are repeated within a turn."""
    calls = {}
    for name, call in contenders.items():
        for _ in range(2):  # compiles, and grows the allocator
            call()
        calls[name] = 1 if run.sizes.smoke else max(1, min(200, int(least_s / max(_seconds(call, 2), 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(run.sizes.turns):
        for name in list(contenders) if turn % 2 == 0 else reversed(contenders):
            seconds[name].append(_seconds(contenders[name], calls[name]))
    return seconds


def _seconds(call: Callable[[], Any], calls: int) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / calls


def quotient(above: list[float], below: list[float], factor: float = 1.0) -> Ratio:
    """factor * above / below, turn by turn."""
    return Ratio.of(factor * a / b for a, b in zip(above, below, strict=True))


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


def checks(run: Run) -> None:
    """The checks of the tests, with every tensor on the device; a table past 2 ** 31 elements is among them."""
    sys.path.insert(0, str(TESTS))
    import test_triton

    from pkmem.ops import triton as backend

    failed = []
    names = QUICK_CHECKS if run.sizes.smoke else test_triton.CHECKS
    for name in names:
        torch.manual_seed(0)
        try:
            with torch.device(run.sizes.device):
                test_triton.CHECKS[name](backend)
        except Exception as error:
            failed.append(f"{name}: {one_line(error)}")
            print(traceback.format_exc(), flush=True)
        _free()
    run.add(f"checks passed of {len(names)}", len(names) - len(failed), at_least=len(names))
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


def bag(run: Run) -> None:
    """Rows gathered per second against the device's copy rate and against F.embedding_bag."""
    from pkmem.ops import triton as backend

    sizes, config = run.sizes, run.sizes.operator
    tokens, reads = sizes.operator_tokens, config.heads * config.knn
    values = randn(sizes, config.num_slots, config.value_width)
    slots = torch.randint(config.num_slots, (tokens, reads), device=sizes.device)
    weights = torch.rand(tokens, reads, device=sizes.device)
    narrow_weights, grad_output = weights.to(sizes.dtype), randn(sizes, tokens, config.value_width)
    source = torch.empty(sizes.copied_bytes, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    seconds = interleave(run, {
        "ours": lambda: backend.weighted_sum(values, slots, weights),
        "copy": lambda: target.copy_(source),
        "torch": lambda: F.embedding_bag(slots, values, mode="sum", per_sample_weights=narrow_weights),
        "grad_weights": lambda: backend.row_products(values, slots, grad_output),
    })  # fmt: skip
    gathered = tokens * reads * config.value_width * values.element_size()
    run.add("copy rate, TB/s", 2 * source.numel() / statistics.median(seconds["copy"]) / 1e12)
    run.add("bag, gathered TB/s", gathered / statistics.median(seconds["ours"]) / 1e12)
    share = gathered / (2 * source.numel())
    run.add("bag: gathered rate over copy rate", quotient(seconds["copy"], seconds["ours"], share), at_least=0.8)
    run.add("bag: F.embedding_bag's time over ours", quotient(seconds["torch"], seconds["ours"]), at_least=4)
    run.add("d(weights): gathered rate over copy rate", quotient(seconds["copy"], seconds["grad_weights"], share))


def selection(run: Run) -> None:
    """The selection against torch's top-k, and its share of the layer."""
    from pkmem.ops import triton as backend

    sizes, config = run.sizes, run.sizes.operator
    memory = memory_of(sizes, config).eval()
    x = randn(sizes, sizes.operator_tokens, config.bound_dim)
    with torch.no_grad():
        query, sub_keys = memory.query(x), memory.keys.sub_keys
        scores, slots = backend.product_key_topk(query, sub_keys, config.knn)
        grad_scores = torch.randn_like(scores)
        seconds = interleave(run, {
            "ours": lambda: backend.product_key_topk(query, sub_keys, config.knn),
            "torch": lambda: plain_selection(query, sub_keys, config.knn),
            "layer": lambda: memory(x),
            "backward": lambda: backend.product_key_topk_backward(grad_scores, query, sub_keys, slots),
        })  # fmt: skip
    run.add("selection, ms", 1000 * statistics.median(seconds["ours"]))
    run.add("selection backward, ms", 1000 * statistics.median(seconds["backward"]))
    run.add("selection: torch's time over ours", quotient(seconds["torch"], seconds["ours"]), at_least=8)
    run.add("selection: share of the layer's forward", quotient(seconds["ours"], seconds["layer"]), at_most=0.5)


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


def training_step(run: Run) -> None:
    """One million slots: all layers at once, in turns; AdamW's moments are bf16, ours are so too and fp32."""
    sizes = run.sizes
    seconds = interleave(run, {
        "fp32 moments": memory_step(sizes, sizes.operator),
        "bf16 moments": memory_step(sizes, sizes.operator, True),
        "plain": plain_step(sizes, sizes.operator),
    })  # fmt: skip
    what = f"training step, {sizes.operator.num_slots:,} slots x {sizes.operator.value_width}"
    for moments in ("fp32 moments", "bf16 moments"):
        run.add(f"{what}: ours, {moments}, ms", 1000 * statistics.median(seconds[moments]))
    run.add(f"{what}: dense AdamW's time over ours, fp32 moments", quotient(seconds["plain"], seconds["fp32 moments"]))
    ratio = quotient(seconds["plain"], seconds["bf16 moments"])
    run.add(f"{what}: dense AdamW's time over ours, bf16 moments", ratio, at_least=5)


def training_step_wide_table(run: Run) -> None:
    """Sixteen million slots, bf16 moments on both sides: one after the other, since one alone fills a GPU."""
    sizes = run.sizes
    config = sizes.wide_table
    medians = {}
    for name, build in (
        ("ours", lambda: memory_step(sizes, config, True)),
        ("plain", lambda: plain_step(sizes, config)),
    ):
        step = build()
        medians[name] = statistics.median(interleave(run, {name: step})[name])
        del step
        _free()
        run.add(f"training step, {config.num_slots:,} slots x {config.value_width}: {name}, ms", 1000 * medians[name])
    what = f"training step, {config.num_slots:,} slots: dense AdamW's time over ours (not in turns)"
    run.add(what, medians["plain"] / medians["ours"], at_least=20)


def layer_forward(run: Run) -> None:
    """The layer's forward against the dense FFN it replaces, and the rows it has to read against both."""
    sizes, config = run.sizes, run.sizes.operator
    memory, x = memory_of(sizes, config).eval(), randn(sizes, sizes.layer_tokens, config.bound_dim)
    with making(sizes):
        ffn = feed_forward(config.bound_dim)
    rows = torch.empty(sizes.layer_tokens * config.heads * config.knn, config.value_width // 2,
                       dtype=sizes.dtype, device=sizes.device)  # fmt: skip
    halves = torch.empty_like(rows)  # copied, as many bytes are read and written as rows are read
    with torch.no_grad():
        seconds = interleave(
            run, {"ours": lambda: memory(x), "ffn": lambda: ffn(x), "copy": lambda: halves.copy_(rows)}
        )
    run.add("layer forward, ms", 1000 * statistics.median(seconds["ours"]))
    run.add("layer forward: ours over a dense FFN (4d)", quotient(seconds["ours"], seconds["ffn"]), at_most=1)
    run.add("layer forward: its rows at the copy rate over a dense FFN (4d)", quotient(seconds["copy"], seconds["ffn"]))


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


def models(run: Run) -> None:
    """12 layers with a memory against the same without, and against 24 layers: decoding and prefill."""
    sizes = run.sizes
    shapes = {"memory": (sizes.layers, True), "shallow": (sizes.layers, False), "deep": (2 * sizes.layers, False)}
    decoders = {name: decoder_of(sizes, *shape) for name, shape in shapes.items()}
    decode = interleave(run, {name: decoding(sizes, model) for name, model in decoders.items()})
    run.add("decode with a memory, ms per token", 1000 * statistics.median(decode["memory"]))
    run.add("decode: with a memory over without", quotient(decode["memory"], decode["shallow"]), at_most=1.08)
    run.add("decode: 24 layers over 12 and a memory", quotient(decode["deep"], decode["memory"]), at_least=1.8)
    tokens = torch.randint(sizes.vocabulary, (sizes.prompts, sizes.context), device=sizes.device)
    with torch.no_grad():
        prefill = interleave(run, {
            name: (lambda model=model: model(tokens)) for name, model in decoders.items()
        })  # fmt: skip
    run.add("prefill: with a memory over without", quotient(prefill["memory"], prefill["shallow"]))
    run.add("prefill: 24 layers over 12 and a memory", quotient(prefill["deep"], prefill["memory"]), at_least=1.8)


def large_table(run: Run) -> None:
    """A table of four billion parameters learns fixed targets on one GPU."""
    sizes, config = run.sizes, run.sizes.large_table
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
    run.add(
        f"table of {memory.values.weight.numel():,}: ms per step", 1000 * (time.perf_counter() - begin) / len(losses)
    )
    run.add("loss after over before", last / first, at_most=0.9)
    if torch.cuda.is_available():
        run.add("peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)


def compiled_block(run: Run) -> None:
    """torch.compile(fullgraph=True) of a block with a memory, in training and in inference, against eager."""
    sizes = run.sizes
    if sizes.smoke:
        return  # compiling for the CPU takes a minute
    with making(sizes):
        memory = ProductKeyMemory(MemoryConfig(dim=1024, num_sub_keys=128, query_norm="layer"))
        block = Block(sizes, memory)
    memory.backend = "triton"
    RowAdam(memory)  # gives the table a reading log
    x = randn(sizes, 2, 512, 1024)
    compiled = torch.compile(block, fullgraph=True)
    gradients = []
    for run_block in (block, compiled):
        block.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        run_block(given).sum().backward()
        gradients.append(given.grad)
    assert memory.values.log is not None
    run.add("compiled training: reads logged", len(memory.values.log.entries), at_least=2, at_most=2)
    run.add("compiled training: d(x) off by", _difference(*gradients), at_most=0.1)
    block.eval()
    with torch.no_grad():
        run.add("compiled inference: output off by", _difference(block(x), compiled(x)), at_most=0.05)


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """Relative, in the Euclidean norm."""
    assert one is not None
    assert other is not None
    return float((one.float() - other.float()).norm() / one.float().norm())


def host_waits(run: Run) -> None:
    """A training step and a decoding step wait for the GPU nowhere: torch raises where they do."""
    sizes = run.sizes
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
        run.add(f"{name} step waits for the GPU (1 = yes)", float(name in reasons), at_most=0)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU: does it run?")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RESULTS}; --smoke: a temporary one)")
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS], help="some parts alone")
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp(prefix="pkmem-bench-")) if options.smoke else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(smoke_sizes() if options.smoke else Sizes(), out)
    reason = why_not(options.smoke)
    if reason:
        run.parts["none"] = {"status": reason, "seconds": 0.0}
        run.save()
        print(reason)
        return
    for part in PARTS:
        if not options.only or part.__name__ in options.only:
            run.part(part)
    print((out / "gpu.md").read_text())


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
