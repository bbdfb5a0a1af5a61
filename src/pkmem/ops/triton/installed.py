"""Whether the Triton that the kernels need is there, asked before an import of theirs could fail less clearly."""

from __future__ import annotations

import re

_LEAST = (3, 5)  # what the oldest torch that pkmem takes brings


def require_triton() -> None:
    """Checks that Triton is there and new enough.

    Raises:
        ImportError: it is not; the message names the version found and the least one.
    """
    least = ".".join(map(str, _LEAST))
    try:
        from triton import __version__ as found
    except ImportError as error:
        raise ImportError(f"Triton {least} or newer is needed but cannot be imported ({error})") from error
    if _numbers(found) < _LEAST:
        raise ImportError(f"Triton {least} or newer is needed but {found} is installed: a newer torch brings it")


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version such as 3.5.1+git1a2b."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


require_triton()
