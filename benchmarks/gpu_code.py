"""What do the Triton kernels compile to, for GPU after GPU? No GPU is needed, and no time is measured.

    python benchmarks/gpu_code.py                # two minutes -> results/gpu_code.json and results/gpu_code.md
    python benchmarks/gpu_code.py --gpus sm_90   # for some GPUs alone

At the sizes that benchmarks/gpu.py measures: registers, spilled registers and shared memory of every kernel for every
GPU; for Hopper also how many warps can share a multiprocessor, and the instructions of a loop, per warp and round,
which say what its issue slots are spent on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS
from pkmem.experiments.environment import environment
from pkmem.files.documents import save_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import targets
from pkmem.ops.arguments import AdamStep

DETAILED = "sm_90"
TOKENS, HEADS, SUB_KEYS, HALF, KNN, WIDTH = 32 << 10, 4, 1024, 256, 32, 1024
REGISTERS, SHARED_BYTES, WARPS = 64 << 10, 228 << 10, 64  # of a multiprocessor of Hopper
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P[T\d]+\s+)?[A-Z][^;]*);")
_BACK = re.compile(r"\bBRA\S*\s.*?0x([0-9a-f]+)")
_SHORTEST_LOOP = 16  # shorter ones wait at barriers


@dataclass(frozen=True)
class Code:
    """A kernel as compiled for a GPU.

    Args:
        kernel: name and what it was compiled for.
        gpu: a key of `targets.GPUS`.
        registers, spills: of a thread.
        shared_bytes: of a program.
        warps: of a program.
    """

    kernel: str
    gpu: str
    registers: int
    spills: int
    shared_bytes: int
    warps: int

    @property
    def name(self) -> str:
        return self.kernel.split()[0]


@dataclass(frozen=True)
class Instructions:
    """The machine code of a kernel on Hopper.

    Args:
        resident_warps: of a multiprocessor, of 64.
        instructions: in all.
        loops: instructions of each loop, one that holds others included.
    """

    resident_warps: int
    instructions: int
    loops: list[int]


def code_of(compiled: Any, gpu: str) -> Code:
    from pkmem.ops.triton.code import facts_of

    facts, source = facts_of(compiled), compiled.src
    constants = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}
    sizes = ", ".join(f"{name} {value}" for name, value in constants.items() if name.isupper())
    return Code(
        f"{facts.name} ({sizes})", gpu, facts.registers, facts.spills, facts.shared_bytes, compiled.metadata.num_warps
    )


def instructions_of(compiled: Any, code: Code) -> Instructions:
    """Reads the machine code, with the disassembler that Triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(place, 16), text) for place, text in _INSTRUCTION.findall(text)]
    # Registers go to warps in pieces of 256; every program takes 1 KiB of shared memory besides its own.
    programs = min(
        REGISTERS // (code.warps * -(-32 * code.registers // 256) * 256),
        SHARED_BYTES // (code.shared_bytes + 1024),
        WARPS // code.warps,
        32,
    )
    return Instructions(programs * code.warps, len(lines), loops_of(lines))


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


def compile_all(gpu: str) -> list[tuple[Code, Any]]:
    """Every operator of a training step, and selection without its bound; with what Triton made of each kernel."""
    from pkmem.ops import triton as backend
    from pkmem.ops.triton import selection

    bf16 = torch.bfloat16
    query, sub_keys = (
        torch.empty(TOKENS, HEADS, 2 * HALF, dtype=bf16),
        torch.empty(HEADS, 2, SUB_KEYS, HALF, dtype=bf16),
    )
    slots = torch.zeros(TOKENS, HEADS, KNN, dtype=torch.int64)
    scores = torch.zeros(slots.shape)
    values, grad_output = torch.empty(9, WIDTH, dtype=bf16), torch.empty(TOKENS, WIDTH, dtype=bf16)
    moments = torch.empty(9, WIDTH), torch.empty(9, WIDTH)
    with targets.made_up(gpu):
        backend.product_key_topk(query, sub_keys, KNN)
        selection._best_of_parts(query, sub_keys, KNN)
        backend.weighted_sum(values, slots.flatten(1), scores.flatten(1))
        backend.row_products(values, slots.flatten(1), grad_output)
        backend.product_key_topk_backward(scores, query, sub_keys, slots)
        reads = backend.sort_reads([slots.flatten(1)], [scores.flatten(1)], [grad_output], SUB_KEYS**2)
        backend.row_gradient_norm(reads)
        step = AdamStep(lr=1e-3, betas=(0.9, 0.98), eps=1e-8, step=1, scale=1.0)
        backend.adam_rows(values, *moments, reads, step)
        return [(code_of(compiled, gpu), compiled) for compiled in backend.compiled_kernels().values()]


def text_of(codes: list[Code], detailed: dict[str, Instructions], where: dict[str, Any]) -> str:
    """What stands in gpu_code.md."""
    gpus = list(dict.fromkeys(code.gpu for code in codes))
    lines = [
        "# gpu_code: the Triton kernels as compiled for GPU after GPU",
        "",
        f"triton {where['versions']['triton']}, torch {where['versions']['torch']}, commit {where['commit']}; "
        f"bf16, {TOKENS:,} tokens, {HEADS} heads, {SUB_KEYS:,} sub-keys of {HALF}, knn {KNN}, values of {WIDTH:,}; "
        "made by `python benchmarks/gpu_code.py` without a GPU: no time is measured.",
        "",
        "| GPU | models | most shared KiB of a program | `_candidates`: tokens of a program |",
        "|---|---|---|---|",
    ]
    for gpu in gpus:
        tokens = [
            re.search(r"BLOCK_N (\d+)", code.kernel)[1]
            for code in codes
            if code.name == "_candidates" and code.gpu == gpu
        ]  # type: ignore[index]
        made = targets.GPUS[gpu]
        lines.append(f"| {gpu} | {made.models} | {made.shared_bytes >> 10} | {', '.join(tokens) or 'not there'} |")
    lines += [
        "",
        "Registers of a thread and shared KiB of a program, kernel by kernel; registers that are spilled stand behind a plus.",
        "",
        f"| kernel | {' | '.join(gpus)} |",
        f"|---{'|---' * len(gpus)}|",
    ]
    for kernel in dict.fromkeys(_in_words(code) for code in codes):
        cells = []
        for gpu in gpus:
            here = [code for code in codes if code.gpu == gpu and _in_words(code) == kernel]
            cells.append(", ".join(_cell(code) for code in here))
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    if detailed:
        lines += [
            "",
            f"On Hopper ({DETAILED}) in detail:",
            "",
            "| kernel | registers | spilled | shared KiB | warps | resident warps of 64 | instructions | of its loops |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for code in codes:
        if code.gpu == DETAILED:
            more = detailed[code.kernel]
            lines.append(
                f"| {code.kernel} | {code.registers} | {code.spills} | {code.shared_bytes / 1024:.0f} | {code.warps} "
                f"| {more.resident_warps} | {more.instructions} | {', '.join(map(str, more.loops))} |"
            )
    return "\n".join(lines) + "\n"


def _in_words(code: Code) -> str:
    """A kernel without what differs from GPU to GPU."""
    return code.kernel if code.name != "_candidates" else code.name


def _cell(code: Code) -> str:
    spilled = f" + {code.spills}" if code.spills else ""
    return f"{code.registers}{spilled}, {code.shared_bytes / 1024:.0f} KiB"


def main() -> None:
    """Compiles, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results ({RESULTS})")
    parser.add_argument("--gpus", nargs="+", default=list(targets.GPUS), choices=targets.GPUS, help="for which")
    given = parser.parse_args()
    codes, detailed = [], {}
    for gpu in given.gpus:
        for code, compiled in compile_all(gpu):
            codes.append(code)
            if gpu == DETAILED:
                detailed[code.kernel] = instructions_of(compiled, code)
    where, out = environment(), given.out
    out.mkdir(parents=True, exist_ok=True)
    kernels = [{**asdict(code), **(asdict(detailed[code.kernel]) if code.gpu == DETAILED else {})} for code in codes]
    gpus = {
        gpu: {"models": targets.GPUS[gpu].models, "shared_bytes": targets.GPUS[gpu].shared_bytes} for gpu in given.gpus
    }
    save_json(out / "gpu_code.json", {"environment": where, "gpus": gpus, "kernels": kernels})
    text = text_of(codes, detailed, where)
    (out / "gpu_code.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
