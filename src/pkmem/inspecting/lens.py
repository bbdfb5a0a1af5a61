"""What a value says: the tokens that it makes likelier, and those that it makes less likely."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pkmem.layer.memory import ProductKeyMemory
from pkmem.layer.quantised import QuantisedValues
from pkmem.ops.packing import unpack_rows

_LOGITS_AT_ONCE = 1 << 24


class Projection(NamedTuple):
    """Values projected onto the vocabulary.

    Args:
        tokens_for: (r, most) the tokens of largest logit, the largest first.
        tokens_against: (r, most) those of smallest logit, the smallest first.
        deviations: (r,) how far the largest logit stands from the mean of all, in their standard deviations.
    """

    tokens_for: Tensor
    tokens_against: Tensor
    deviations: Tensor


def output_embedding(model: PreTrainedModel, num_tokens: int) -> Tensor | None:
    """The rows (num_tokens, d) of a decoder's output embedding, fp32; None where it has none in floats."""
    embedding: nn.Module | None = model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight.detach()[:num_tokens].float().cpu()


def why_not_projected(memory: ProductKeyMemory, embedding: Tensor | None) -> str:
    """Why a memory's values cannot be held against the output embedding; empty where they can."""
    if embedding is None:
        return "The decoder has no output embedding in floats to project values onto."
    if memory.gate is not None:
        return "The output gate scales and mixes a value by the token that reads it, so the value alone says no tokens."
    if memory.config.value_width != embedding.shape[1]:
        return f"A value has {memory.config.value_width} numbers, the output embedding {embedding.shape[1]}."
    return ""


@torch.no_grad()
def project_values(
    memory: ProductKeyMemory, slots: Tensor, embedding: Tensor, most: int, progress: bool = False
) -> Projection:
    """Projects values onto the vocabulary: E v, without the decoder's final norm (Geva et al. 2022, section 3).

    A memory's output is a weighted sum of values, added to the residual stream, which E turns into logits at the end.

    Args:
        memory: whose values are as wide as the embedding, see `why_not_projected`.
        slots: (r,) of the values.
        embedding: (tokens, d) E.
        most: tokens for and tokens against, >= 1.
        progress: show a progress bar.
    """
    most, deviations = min(most, len(embedding)), torch.zeros(len(slots))
    sides = [torch.zeros(len(slots), most, dtype=torch.int64) for _ in range(2)]
    at_once = max(1, _LOGITS_AT_ONCE // max(1, len(embedding)))
    centre, covariance = _moments(embedding)
    for first in tqdm(range(0, len(slots), at_once), "projecting values", disable=not progress):
        part = slice(first, first + at_once)
        values = values_of(memory, slots[part])
        logits = values @ embedding.T
        largest, sides[0][part] = logits.topk(most)
        sides[1][part] = logits.topk(most, largest=False).indices
        values = values.double()
        spread = (values @ covariance * values).sum(1).clamp_min(0).sqrt()
        deviations[part] = ((largest[:, 0] - values @ centre) / spread.clamp_min(1e-300)).float()
    return Projection(sides[0], sides[1], deviations)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of rows, fp64: those of their products with any vector, without the products."""
    rows = rows.double()
    centre = rows.mean(0)
    return centre, (rows - centre).T @ (rows - centre) / len(rows)


def values_of(memory: ProductKeyMemory, slots: Tensor) -> Tensor:
    """The values (r, v) of slots (r,), fp32 on the CPU, however the table is stored."""
    values: nn.Module = memory.values
    rows: Tensor = memory.values.weight.detach()[slots.to(memory.values.weight.device)].cpu()
    return unpack_rows(rows, values.width, values.bits) if isinstance(values, QuantisedValues) else rows.float()
