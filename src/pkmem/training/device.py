"""Which device a run trains on."""

from __future__ import annotations

import torch


def trains_on_cpu() -> bool:
    """Whether a run trains on the CPU: torch sees no accelerator, or only Apple's (MPS).

    MPS computes nothing in float64, which the norms of gradients and the sums of losses are taken in.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps"
