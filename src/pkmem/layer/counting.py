"""How many parameters a model has, in its tables and elsewhere."""

from __future__ import annotations

from torch import nn

from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import Table


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in the tables (memory_params), however they are stored, and everywhere else (dense_params)."""
    tables = [part for part in model.modules() if isinstance(part, Table | QuantisedValues)]
    here = sum(table.weight.numel() for table in tables)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"dense_params": total - here, "memory_params": sum(table.num_parameters for table in tables)}
