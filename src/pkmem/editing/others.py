"""The other edits of a model while one is learned: some of them in, so that each holds with and without the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pkmem.editing.edit import Edit
from pkmem.editing.fingerprint import saved_tensors, table_names


class Others:
    """Edits of a model, of which it has those that it is told to have.

    Args:
        model: theirs.
        edits: n of them.

    Attributes:
        inside: (n,) which of them the model has.
    """

    def __init__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        self.inside = [edit.is_in(model) for edit in edits]
        self._edits = edits
        tensors = saved_tensors(model)
        self._tables = {name: tensors[name] for name in table_names(model)}

    @property
    def num(self) -> int:
        """How many they are."""
        return len(self._edits)

    def check_in(self, model: nn.Module) -> None:
        """Puts in those that are not.

        Raises:
            ValueError: one is of another model, or is neither in nor out: rows of it have been changed since.
        """
        for place, edit in enumerate(self._edits):
            if not self.inside[place]:
                edit.apply(model)
                self.inside[place] = True

    def hold(self, which: Sequence[bool]) -> None:
        """Lets the model have these, (n,), and no other."""
        for place, (edit, wanted) in enumerate(zip(self._edits, which, strict=True)):
            if wanted != self.inside[place]:
                edit.write(self._tables, edit.new if wanted else edit.old)
                self.inside[place] = wanted

    def hold_only(self, places: Sequence[int]) -> None:
        """Lets the model have those at these places, and no other."""
        self.hold([place in places for place in range(len(self._edits))])

    def hold_none(self) -> None:
        """Lets the model have none of them."""
        self.hold_only([])

    def hold_all(self) -> None:
        """Lets the model have all of them."""
        self.hold_only(range(len(self._edits)))

    def one_by_one(self) -> Iterator[list[int]]:
        """The model with each of them alone: its place."""
        for place in range(len(self._edits)):
            self.hold_only([place])
            yield [place]

    def in_turn(self, draw: torch.Generator, times: int, but: Iterable[list[int]] = ()) -> Iterator[list[int]]:
        """The model without any, with some of them, drawn so many times, and with all: their places, each set once.

        Args:
            draw: draws.
            times: how often; of few edits there are fewer sets than that.
            but: places of sets that are left out.
        """
        drawn = [self._some(torch.rand((), generator=draw), draw) for _ in range(times if len(self._edits) > 1 else 0)]
        left_out = list(but)
        for inside in [[], *drawn, list(range(len(self._edits)))]:
            if inside not in left_out:
                left_out.append(inside)
                self.hold_only(inside)
                yield inside

    def hold_some(self, draw: torch.Generator, hard: Sequence[Sequence[int]] = ()) -> list[int]:
        """Lets the model have none or one, half of the time, and else some, drawn; returns their places.

        There most is to be learned: what others changed often helps.

        Args:
            draw: draws.
            hard: places with which the answers did not hold; where there are any, it is one of these half of the time.
        """
        if not self._edits:
            return []
        if hard and torch.rand((), generator=draw) < 0.5:
            inside = hard[int(torch.randint(len(hard), (), generator=draw))]
            self.hold_only(inside)
            return list(inside)
        share = 2 * torch.rand((), generator=draw) - 1
        if share > 0:
            inside = self._some(share, draw)
            self.hold_only(inside)
            return inside
        one = int(torch.randint(len(self._edits) + 1, (), generator=draw))
        inside = [one] if one < len(self._edits) else []
        self.hold_only(inside)
        return inside

    def _some(self, share: Tensor, draw: torch.Generator) -> list[int]:
        drawn = torch.rand(len(self._edits), generator=draw) < share
        return [place for place, is_in in enumerate(drawn.tolist()) if is_in]


@contextlib.contextmanager
def all_in(model: nn.Module, edits: Sequence[Edit]) -> Iterator[Others]:
    """Within the block a model has all of some edits; then it has those that it had before.

    Raises:
        ValueError: see `Others.check_in`.
    """
    others = Others(model, edits)
    before = list(others.inside)
    try:
        others.check_in(model)
        yield others
    finally:
        others.hold(before)
