"""pkmem: product-key memories (Lample et al. 2019) for anybody's PyTorch model.

Three floors, each usable alone: an operator (tensors), a layer (`nn.Module`), a language model (Hugging Face).

| paper      | here                      | shape                                                     |
|------------|---------------------------|-----------------------------------------------------------|
| x, q(x)    | `x`, `query`              | (n, d), (n, h, q)                                         |
| C, C'      | `sub_keys`                | (h, 2, s, q/2)                                            |
| |C|, |K|   | `num_sub_keys`, `num_slots` | s, s ** 2                                               |
| H, k       | `heads`, `knn`            |                                                           |
| q . k      | `scores`                  | (n, h, knn), before the softmax only                      |
| w          | `weights`                 | (n, h, knn), after the softmax only                       |
| I          | `slots`                   | (n, h, knn), slot i * s + j is the pair (i, j)            |
| v          | `values`                  | (m, v)                                                    |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pkmem.layer.config import MemoryConfig
from pkmem.lm import autoload

if TYPE_CHECKING:
    from pkmem.editing.edit import Edit as Edit
    from pkmem.editing.learning import learn as learn
    from pkmem.editing.retrofit import retrofit as retrofit
    from pkmem.layer.combined import CombinedOptimizer as CombinedOptimizer
    from pkmem.layer.drawing import undrawn_tables as undrawn_tables
    from pkmem.layer.memory import ProductKeyMemory as ProductKeyMemory
    from pkmem.layer.optim import RowAdam as RowAdam
    from pkmem.layer.optim import dense_parameters as dense_parameters
    from pkmem.layer.sharding import shard_values as shard_values
    from pkmem.layer.usage import MemoryUsage as MemoryUsage
    from pkmem.layer.values import tables_in as tables_in
    from pkmem.lm.huggingface import add_memory as add_memory
    from pkmem.ops import product_key_topk as product_key_topk
    from pkmem.ops import row_products as row_products
    from pkmem.ops import weighted_sum as weighted_sum
    from pkmem.text.facts import Fact as Fact

__version__ = "0.1.0"

# Imported on first use: the command line answers `--help` before torch could be loaded.
_contents = {
    "ProductKeyMemory": "pkmem.layer.memory",
    "MemoryUsage": "pkmem.layer.usage",
    "RowAdam": "pkmem.layer.optim",
    "CombinedOptimizer": "pkmem.layer.combined",
    "dense_parameters": "pkmem.layer.optim",
    "tables_in": "pkmem.layer.values",
    "shard_values": "pkmem.layer.sharding",
    "undrawn_tables": "pkmem.layer.drawing",
    "product_key_topk": "pkmem.ops",
    "row_products": "pkmem.ops",
    "weighted_sum": "pkmem.ops",
    "add_memory": "pkmem.lm.huggingface",
    "retrofit": "pkmem.editing.retrofit",
    "learn": "pkmem.editing.learning",
    "Edit": "pkmem.editing.edit",
    "Fact": "pkmem.text.facts",
}
__all__ = ["MemoryConfig", "__version__", *_contents]


def __getattr__(name: str) -> Any:
    if name not in _contents:
        raise AttributeError(f"module 'pkmem' has no attribute {name!r}")
    return getattr(importlib.import_module(_contents[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


autoload.register_when_imported()
