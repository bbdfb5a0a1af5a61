"""Linear maps of halves on a processor that cannot multiply them: by way of fp32.

A CPU without instructions for bf16 or fp16 widens their elements as it goes, and torch's product then takes four times as
long as in fp32. Here the factors are widened first and the result is rounded once, which is as exact. The modules remain
torch's, which libraries know.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pkmem.layer.untouched import is_untouched
from pkmem.ops.registered import is_plain

_FEWEST_TOKENS = 4  # from so many on widening the weights costs less than torch's products of halves
_HALVES = {  # an x86 processor's instructions for products of each
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}
_FORWARD = nn.Linear.forward, nn.Sequential.forward  # as built


def apply_linear(part: nn.Module, x: Tensor) -> Tensor:
    """What `part(x)` gives, (..., d) -> (..., d'), sooner where it is a linear map of halves, or several in a row.

    Raises:
        RuntimeError: the dtypes do not agree, as in torch.
    """
    if torch.compiler.is_compiling() or not x.is_cpu:  # who compiles must not see that the number of tokens matters
        return part(x)
    as_built = (nn.Linear.forward, nn.Sequential.forward) == _FORWARD and not _has_any_global_hook()
    if as_built and type(part) is nn.Sequential and is_untouched(part):
        return functools.reduce(lambda given, each: apply_linear(each, given), part, x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    is_slow = dtype in _HALVES and x.shape[:-1].numel() >= _FEWEST_TOKENS and not _multiplies(dtype)
    if not (as_built and is_slow and type(part) is nn.Linear and is_untouched(part) and _fit(part, x)):
        return part(x)
    with torch.autocast("cpu", enabled=False):
        bias = None if part.bias is None else part.bias.float()
        return F.linear(x.float(), part.weight.float(), bias).to(dtype)


def _fit(part: nn.Linear, x: Tensor) -> bool:
    """Whether all is plain and torch would multiply it: under autocast any of three dtypes, else one."""
    parameters: dict[str, Any] = part._parameters  # what a parametrization computes is not there
    tensors = [x, *(parameter for parameter in parameters.values() if parameter is not None)]
    dtypes = {tensor.dtype for tensor in tensors}
    fit = dtypes <= {torch.float32, *_HALVES} if torch.is_autocast_enabled("cpu") else dtypes == {x.dtype}
    return (
        fit and parameters.get("weight") is not None and all(is_plain(tensor) and tensor.is_cpu for tensor in tensors)
    )


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of halves, or is none that torch can say it of."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of a late torch
    return has.get("architecture") != "x86_64" or any(has.get(instructions) for instructions in _HALVES[dtype])
