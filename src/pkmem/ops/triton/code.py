"""What a kernel was compiled to, and what of it the kernels' promises forbid."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_ATOMICS = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:atom|red)\.|^\s*(?:global|flat|buffer)_atomic_|^\s*ds_add_", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """A kernel as compiled.

    Args:
        name: of the kernel.
        shared_bytes: shared memory of a program.
        registers, spills: of a thread, each of 4 bytes; None where neither driver nor disassembler tells.
        has_tf32: whether it rounds the factors of a product to TF32.
        has_atomics: whether it adds to memory in an order that may change from run to run.
    """

    name: str
    shared_bytes: int
    registers: int | None
    spills: int | None
    has_tf32: bool
    has_atomics: bool


def facts_of(compiled: Any) -> Facts:
    """The facts of a `triton.compiler.CompiledKernel`, loaded on a device or not."""
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    if (spills := getattr(compiled, "n_spills", None)) is not None:  # the driver said so when it loaded the kernel
        registers = compiled.n_regs
    else:
        registers, spills = _registers_and_spills(compiled)
    return Facts(
        name=compiled.metadata.name,
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        has_tf32="tf32" in text or "xf32" in text,
        has_atomics=_ATOMICS.search(text) is not None,
    )


def complaints(facts: Facts, most_shared_bytes: int) -> list[str]:
    """What is wrong with a kernel on a device where a program may have that much shared memory; empty if nothing is."""
    found = []
    if facts.shared_bytes > most_shared_bytes:
        found.append(f"takes {facts.shared_bytes:,} bytes of shared memory where {most_shared_bytes:,} are to be had")
    if facts.spills:
        found.append(f"spills {facts.spills} registers")
    if facts.has_tf32:
        found.append("rounds factors to TF32")
    if facts.has_atomics:
        found.append("uses atomics")
    return found


def _registers_and_spills(compiled: Any) -> tuple[int | None, int | None]:
    """Read from the code itself: AMD's assembly says it, of NVIDIA's binary the disassembler that Triton brings."""
    if "amdgcn" in compiled.asm:
        numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return int(numbers["vgpr_count"]), int(numbers["vgpr_spill_count"])
    if "cubin" not in compiled.asm:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        try:
            tool = triton.knobs.nvidia.cuobjdump.path
        except RuntimeError:  # Triton was built without it
            return None, None
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", said.stdout))
    return int(usage["REG"]), int(usage["STACK"]) // 4
