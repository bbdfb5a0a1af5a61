"""What do the Triton kernels compile to for a Hopper GPU? No GPU is needed, and no time is measured.

    python benchmarks/gpu_code.py   # half a minute -> results/gpu_code.json and results/gpu_code.md

At the sizes that benchmarks/gpu.py measures: registers, spilled bytes and shared memory say how many warps can share a
multiprocessor; the instructions of a loop, per warp and round, say what its issue slots are spent on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS
from pkmem.experiments.environment import environment
from pkmem.training.files import save_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import targets

TOKENS, HEADS, SUB_KEYS, HALF, KNN, WIDTH = 32 << 10, 4, 1024, 256, 32, 1024
REGISTERS, SHARED_BYTES, WARPS = 64 << 10, 228 << 10, 64  # of a multiprocessor
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P[T\d]+\s+)?[A-Z][^;]*);")
_BACK = re.compile(r"\bBRA\S*\s.*?0x([0-9a-f]+)")
_SHORTEST_LOOP = 16  # shorter ones wait at barriers


@dataclass(frozen=True)
class Code:
    """A kernel as compiled.

    Args:
        kernel: name and what it was compiled for.
        registers, spilled_bytes: of a thread.
        shared_bytes: of a program.
        warps: of a program.
        resident_warps: of a multiprocessor, of 64.
        instructions: in all.
        loops: instructions of each loop, one that holds others included.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int
    resident_warps: int
    instructions: int
    loops: list[int]


def code_of(kernel: str, compiled: Any) -> Code:
    """Reads the machine code, with the disassembler that Triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        texts = [
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        ]
    registers, spilled = (int(re.search(rf"{word}:(\d+)", texts[0])[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    lines = [(int(place, 16), text) for place, text in _INSTRUCTION.findall(texts[1])]
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    # Registers go to warps in pieces of 256; every program takes 1 KiB of shared memory besides its own.
    programs = min(
        REGISTERS // (warps * -(-32 * registers // 256) * 256), SHARED_BYTES // (shared + 1024), WARPS // warps, 32
    )
    return Code(kernel, registers, spilled, shared, warps, programs * warps, len(lines), loops_of(lines))


def loops_of(lines: list[tuple[int, str]]) -> list[int]:
    """Lengths of the loops: from where a branch goes back to, up to it."""
    number = {place: index for index, (place, _) in enumerate(lines)}
    lengths = []
    for index, (place, text) in enumerate(lines):
        back = _BACK.search(text)
        if back and int(back[1], 16) < place:
            length = index - number[int(back[1], 16)] + 1
            if length >= _SHORTEST_LOOP:
                lengths.append(length)
    return lengths


def compile_all() -> list[Code]:
    """Every operator of a training step, and selection without its bound, in the order of launching."""
    from pkmem.ops import triton as backend
    from pkmem.ops.triton import selection

    found: dict[str, Code] = {}

    def see(kernel: Any, constants: dict[str, Any], compile_it: Callable[[], Any]) -> None:
        sizes = ", ".join(f"{name} {value}" for name, value in constants.items() if not name.startswith("num_"))
        name = f"{kernel.__name__} ({sizes})"
        if name not in found:
            found[name] = code_of(name, compile_it())

    bf16 = torch.bfloat16
    query, sub_keys = (
        torch.empty(TOKENS, HEADS, 2 * HALF, dtype=bf16),
        torch.empty(HEADS, 2, SUB_KEYS, HALF, dtype=bf16),
    )
    slots = torch.zeros(TOKENS, HEADS, KNN, dtype=torch.int64)
    scores = torch.zeros(slots.shape)
    values, grad_output = torch.empty(9, WIDTH, dtype=bf16), torch.empty(TOKENS, WIDTH, dtype=bf16)
    moments = torch.empty(9, WIDTH), torch.empty(9, WIDTH)
    with hopper.launches(see):
        backend.product_key_topk(query, sub_keys, KNN)
        selection._best_of_parts(query, sub_keys, KNN)
        backend.weighted_sum(values, slots.flatten(1), scores.flatten(1))
        backend.row_products(values, slots.flatten(1), grad_output)
        backend.product_key_topk_backward(scores, query, sub_keys, slots)
        reads = backend.sort_reads([slots.flatten(1)], [scores.flatten(1)], [grad_output], SUB_KEYS**2)
        backend.row_gradient_norm(reads)
        from pkmem.ops.arguments import AdamStep

        step = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "step": 1, "scale": 1.0}
        backend.adam_rows(values, *moments, reads, AdamStep(**step))
    return list(found.values())


def table(codes: list[Code], where: dict[str, Any]) -> str:
    """The table of gpu_code.md."""
    lines = [
        "# gpu_code: the Triton kernels as compiled for Hopper",
        "",
        f"triton {where['versions']['triton']}, torch {where['versions']['torch']}, commit {where['commit']}; "
        f"bf16, {TOKENS:,} tokens, {HEADS} heads, {SUB_KEYS:,} sub-keys of {HALF}, knn {KNN}, values of {WIDTH:,}; "
        "made by `python benchmarks/gpu_code.py` without a GPU: no time is measured.",
        "",
        "| kernel | registers | spilled bytes | shared KiB | warps | resident warps of 64 | instructions | of its loops |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {code.kernel} | {code.registers} | {code.spilled_bytes} | {code.shared_bytes / 1024:.0f} | {code.warps} "
        f"| {code.resident_warps} | {code.instructions} | {', '.join(map(str, code.loops))} |"
        for code in codes
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results ({RESULTS})")
    out = parser.parse_args().out
    codes, where = compile_all(), environment()
    out.mkdir(parents=True, exist_ok=True)
    save_json(out / "gpu_code.json", {"environment": where, "kernels": [asdict(code) for code in codes]})
    (out / "gpu_code.md").write_text(table(codes, where), encoding="utf-8")
    print(table(codes, where))


if __name__ == "__main__":
    main()
