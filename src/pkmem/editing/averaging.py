"""Weights averaged over their latest updates, so that what single updates did by chance is gone (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class RunningMean:
    """The exponential mean of weights over updates; they can stand for it, and go on from where they were.

    Args:
        weights: are updated in place.
        kept: share of the mean that an update keeps, in [0, 1); the first updates count alike.
    """

    def __init__(self, weights: Sequence[Tensor], kept: float) -> None:
        self._weights, self._kept = weights, kept
        self._num_updates = 0
        self._means = [weight.detach().clone() for weight in weights]
        self._latest: list[Tensor] = []

    def count(self) -> None:
        """Takes an update of the weights into the mean."""
        self._num_updates += 1
        kept = min(self._kept, 1 - 1 / self._num_updates)
        for mean, weight in zip(self._means, self._weights, strict=True):
            mean.lerp_(weight.detach(), 1 - kept)

    def enter(self) -> None:
        """Puts the mean in the place of the weights."""
        self._latest = [weight.detach().clone() for weight in self._weights]
        for weight, mean in zip(self._weights, self._means, strict=True):
            weight.data = mean.clone()

    def leave(self) -> None:
        """Puts the weights back, as the latest update left them, if the mean is in their place."""
        for weight, latest in zip(self._weights, self._latest, strict=False):
            weight.data = latest
        self._latest = []
