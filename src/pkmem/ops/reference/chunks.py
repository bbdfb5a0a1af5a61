"""How much of its work the reference holds at once."""

from __future__ import annotations

import torch

SCORES_BYTES = 64 << 20  # of the scores of a chunk on a CPU: enough for its matrix products
ROWS_BYTES = 6 << 20  # of a chunk of rows on a CPU, with all that is computed from them: they stay in its cache
GPU_BYTES = 768 << 20  # of a chunk on a GPU: few launches


def chunk_size(item_bytes: int, device: torch.device, cpu_bytes: int) -> int:
    """How many items make a chunk, if each takes so many bytes; on a GPU at most a 32nd of its memory."""
    room = cpu_bytes
    if device.type == "cuda":
        room = min(GPU_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)
    elif device.type != "cpu":
        room = GPU_BYTES // 4
    return max(1, room // max(1, item_bytes))
