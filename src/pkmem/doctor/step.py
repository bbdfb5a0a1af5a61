"""A training step of a memory by the functions of a backend alone: for checks of repeats, of waiting and of time."""

from __future__ import annotations

import torch
from torch import Tensor

from pkmem.doctor.checks import Case
from pkmem.doctor.sizes import Selection
from pkmem.ops.arguments import AdamStep


class Step:
    """Everything a step needs, on the device, and what a backend computes from it.

    Args:
        case: whose backend, dtype and random numbers it takes.
        size: of the selection; the table has a row for each slot.
        width: of the table.
    """

    def __init__(self, case: Case, size: Selection, width: int) -> None:
        self.case, self.size, self.width, self.backend = case, size, width, case.module
        self.given = [case.there(tensor) for tensor in self._drawn()]
        self.values = case.there(case.normal(size.num_sub_keys**2, width))
        self.moments = torch.zeros(2, *self.values.shape, device=case.device)
        # Tensors, so that nothing has to be copied to the device.
        scalars = (torch.full((), number, dtype=torch.float64, device=case.device) for number in (0.01, 1.0, 1.0))
        lr, step, scale = scalars
        self.update = AdamStep(lr=lr, betas=(0.9, 0.98), eps=1e-8, step=step, scale=scale)

    def _drawn(self) -> list[Tensor]:
        size, width = self.size, self.width
        query, sub_keys = (size.num_tokens, size.heads, 2 * size.half), (size.heads, 2, size.num_sub_keys, size.half)
        return [self.case.normal(*shape) for shape in (query, sub_keys, (size.num_tokens, width))]

    def renew(self) -> None:
        """Other queries, sub-keys and gradients, in the same memory."""
        for tensor, other in zip(self.given, self._drawn(), strict=True):
            tensor.copy_(other)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and slots (n, h, knn), sums (n, v)."""
        scores, slots = self.backend.product_key_topk(self.given[0], self.given[1], self.size.knn)
        return scores, slots, self.backend.weighted_sum(self.values, slots.flatten(1), scores.softmax(-1).flatten(1))

    def train(self) -> None:
        """The step as a model takes it; the table changes."""
        self._update(self.values, *self.moments)

    def results(self) -> dict[str, Tensor]:
        """All that a backend computes in a step, by name; the table is as before."""
        updated = self.values.clone(), self.moments[0].clone(), self.moments[1].clone()
        results = self._update(*updated)
        results |= zip(("values", "first moments", "second moments"), updated, strict=True)
        return results

    def _update(self, values: Tensor, first_moment: Tensor, second_moment: Tensor) -> dict[str, Tensor]:
        query, sub_keys, back = self.given
        scores, slots, summed = self.read()
        flat, weights = slots.flatten(1), scores.softmax(-1).flatten(1)
        slopes = self.backend.row_products(values, flat, back)
        gradients = self.backend.product_key_topk_backward(slopes.view_as(scores), query, sub_keys, slots)
        reads = self.backend.sort_reads([flat], [weights], [back], len(values))
        norm, finite = self.backend.row_gradient_norm(reads), self.backend.gradient_is_finite(reads)
        self.backend.adam_rows(values, first_moment, second_moment, reads, self.update)
        return {
            "scores": scores, "slots": slots, "sums": summed, "inner products": slopes,
            "gradient of queries": gradients[0], "gradient of sub-keys": gradients[1],
            "norm of the table's gradient": norm, "whether it is finite": finite,
        }  # fmt: skip
