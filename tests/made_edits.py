"""Edits of random values for a tiny model, shared by the tests of editing.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import torch
from torch import Tensor, nn

from pkmem import Edit
from pkmem.editing.fingerprint import fingerprint, saved_tensors, table_names
from pkmem.text.facts import Fact

FACT = Fact(("Home of Alda is", "Alda lives in"), "Rome")


def made_edit(model: nn.Module, rows: list[int], seed: int = 0) -> Edit:
    """An edit of these rows of every table of a model, to random values."""
    draw = torch.Generator().manual_seed(seed)
    tensors, places = saved_tensors(model), torch.tensor(rows)
    old = {name: tensors[name][places].clone() for name in table_names(model)}
    new = {name: torch.randn(t.shape, generator=draw).to(t.dtype) for name, t in old.items()}
    figures = {"recall": 0.75, "questions": 2}
    return Edit(dict.fromkeys(old, places), old, new, [FACT], figures, fingerprint(model))


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model's state holds, as bytes."""
    return {name: t.detach().clone().reshape(-1).view(torch.uint8) for name, t in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two such copies are equal."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
