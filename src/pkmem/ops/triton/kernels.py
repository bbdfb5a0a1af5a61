"""The kernels that this process compiled, for those who want to look at them."""

from __future__ import annotations

from typing import Any

from pkmem.ops.triton import bag, packed, rows, selection, selection_backward


def functions() -> list[Any]:
    """Every kernel of this backend, and the functions that kernels call."""
    members = [
        member for module in (bag, packed, rows, selection, selection_backward) for member in vars(module).values()
    ]
    return [member for member in dict.fromkeys(filter(callable, members)) if hasattr(member, "device_caches")]


def compiled_kernels() -> dict[str, Any]:
    """Every kernel that this process compiled to launch it, by `title` and device."""
    return {
        f"{title(compiled)} on {device}": compiled
        for function in functions()
        for device, (compiled_ones, *_) in function.device_caches.items()
        for compiled in compiled_ones.values()
    }


def title(compiled: Any) -> str:
    """What a kernel was compiled for: `_sort (KNN 32, BLOCK 4; *i64:16, i32; 1 warps, 3 stages)`.

    Constants first, then the types of the other arguments; `:16` stands behind multiples of 16.
    """
    source, options = compiled.src, compiled.metadata
    constants = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}
    sizes = ", ".join(f"{name} {value}" for name, value in constants.items() if value is not None)
    types = ", ".join(
        kind + (":16" if source.attrs.get((place,)) else "")
        for place, kind in enumerate(source.signature.values())
        if kind != "constexpr"
    )
    return f"{options.name} ({sizes}; {types}; {options.num_warps} warps, {options.num_stages} stages)"
