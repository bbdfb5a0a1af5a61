"""What several processes do together: all of them see what each has done, and the first failure ends all alike."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


class Together:
    """The processes of a group, or this one alone.

    Args:
        group: of torch.distributed, of its own where another thread uses it; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in each process, in all of them.

        Raises:
            Exception: in all processes, what `work` raised in the first of those where it did.
        """
        if self.group is None:
            return [work()]
        outcome: list[Any] = [None, None]  # what was returned, what was raised
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = _portable(error, self.rank)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.group)
        for _, raised in outcomes:
            if raised is not None:
                raise raised
        return [returned for returned, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, where alone it runs, or raises there; in all of them."""
        return cast(T, self.each(lambda: work() if self.rank == 0 else None)[0])


def _portable(error: Exception, rank: int) -> Exception:
    """The error, saying in which process it was; as text where it cannot leave it."""
    error.add_note(f"in process {rank}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__} in process {rank}: {error}")
    return error
