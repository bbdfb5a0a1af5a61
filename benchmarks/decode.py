"""What does a memory add to the time of writing a token: of one sequence, and of several at once?

    python benchmarks/decode.py     # a decoder of 30 blocks and width 576, and the demo's; random weights, 3 GB

A step reads one token of each sequence behind a prompt of 64 and computes the logits of the next, with a cache, as
`generate` does. Nothing of a decoder is faster or slower for its weights being random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import harness
from harness import Options, Report, interleave
from pkmem import MemoryConfig, add_memory

PROMPT = 64
BATCHES = (1, 8, 32)
SMOLLM2 = {  # SmolLM2-135M's
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}
DEMO = {  # configs/laptop.yaml's
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 2048,
}
CASES = {  # a decoder, the block of its memory, and the memory
    "30 blocks, width 576": (SMOLLM2, 15, MemoryConfig(num_sub_keys=512, query_norm="layer")),
    "the demo's": (DEMO, 0, MemoryConfig(num_sub_keys=128, heads=2, query_dim=64, query_norm="batch")),
}
DENSE, INSTEAD, BESIDE, PACKED = "no memory", "in place of an MLP", "beside an MLP", "beside an MLP, int8"


def main() -> None:
    """Measures both decoders and writes decode.json and decode.md."""
    options = harness.start(__doc__, repeats=21)
    report = Report("decode", options)
    for case, (sizes, block, memory) in CASES.items():
        if options.smoke:
            sizes = sizes | {"num_hidden_layers": 2, "vocab_size": 64}
            block, memory = 0, replace(memory, num_sub_keys=32)
        steps(report, options, case, sizes, block, memory)
        slots = f"{memory.num_sub_keys} x {memory.num_sub_keys} slots, {memory.heads} heads of {memory.knn} neighbours"
        report.note(f"the memory of {case}: {slots}, in block {block}")
    report.write()


def steps(report: Report, options: Options, case: str, sizes: dict[str, int], block: int, memory: MemoryConfig) -> None:
    """The steps of a decoder without a memory and with one, in turns."""
    models: dict[str, Any] = {
        DENSE: decoder(sizes),
        INSTEAD: add_memory(decoder(sizes), [block], memory).eval(),
        BESIDE: add_memory(decoder(sizes), [block], memory, "parallel").eval(),
        PACKED: add_memory(decoder(sizes), [block], memory, "parallel").eval(),
    }
    models[PACKED].quantise_values("int8")
    for batch in BATCHES[:2] if options.smoke else BATCHES:
        with torch.no_grad():
            timings = interleave({name: step_of(model, batch) for name, model in models.items()}, options.repeats)
        report.keep(f"{case}, {batch} at once", timings)
        for name in models:
            if name != DENSE:
                report.add(f"{case}, {batch} at once: {name} / {DENSE}", timings.ratio(name, DENSE))


def decoder(sizes: dict[str, int]) -> LlamaForCausalLM:
    """A Llama of random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).eval()


def step_of(model: PreTrainedModel, batch: int) -> Callable[[], object]:
    """A step behind a prompt, which leaves the cache as it was."""
    prompt = torch.arange(batch * PROMPT).view(batch, PROMPT) % 61
    cache: DynamicCache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    return partial(_step, model, cache, prompt[:, :1])


def _step(model: PreTrainedModel, cache: DynamicCache, tokens: torch.Tensor) -> None:
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    cache.crop(-1)


if __name__ == "__main__":
    main()
