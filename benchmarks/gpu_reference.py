"""What would a training step of the reference ask of a GPU? No GPU is needed, and no time is measured.

    python benchmarks/gpu_reference.py   # some minutes, 20 GB of memory -> results/gpu_reference.json and .md

Without a checked GPU kernel the operators run in plain torch. There every operator costs a launch of some
microseconds, and what it makes takes memory. Both are counted here on CPU tensors, with the chunks of a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS
from pkmem import MemoryConfig
from pkmem.experiments.environment import environment
from pkmem.files.documents import save_json
from pkmem.ops.reference.chunks import GPU_BYTES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import meter

TOKENS = 16384
CONFIG = MemoryConfig(dim=1024, num_sub_keys=1024, heads=4, knn=32)
SMOKE = MemoryConfig(dim=16, num_sub_keys=8, heads=2, knn=3, query_dim=8)


def table(document: dict[str, Any]) -> str:
    """The page."""
    where = document["environment"]
    lines = [
        "# gpu_reference: what a training step of the reference asks of a GPU",
        "",
        f"torch {where['versions']['torch']}, commit {where['commit']}; {document['tokens']:,} tokens, "
        f"{CONFIG.heads} heads, knn {CONFIG.knn}, {CONFIG.num_sub_keys:,} sub-keys of {CONFIG.query_dim // 2}, values of "
        f"{CONFIG.value_width:,}, fp32 moments; counted on CPU tensors by `{where['command']}`: no time is measured.",
        "",
        "| part | dtype | operators | peak MiB beyond inputs and outputs |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {part} | {dtype} | {figures['operators']:,} | {figures['peak_bytes'] / 2**20:,.0f} |"
        for dtype, parts in document["figures"].items()
        for part, figures in parts.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Counts, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results ({RESULTS})")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    tokens, config = (64, SMOKE) if options.smoke else (TOKENS, CONFIG)
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = meter.of_a_training_step(config, tokens, dtype, GPU_BYTES)
        figures[str(dtype).removeprefix("torch.")] = {part: counted._asdict() for part, counted in parts.items()}
    document = {"environment": environment(), "tokens": tokens, "smoke": options.smoke, "figures": figures}
    options.out.mkdir(parents=True, exist_ok=True)
    save_json(options.out / "gpu_reference.json", document)
    (options.out / "gpu_reference.md").write_text(table(document), encoding="utf-8")
    print(table(document))


if __name__ == "__main__":
    main()
