"""Makes `import pkmem` enough for other libraries to know what is pkmem's.

`AutoModelForCausalLM` knows its models, `torch.utils.flop_counter.FlopCounterMode` the operations of its operators.
Neither library has an entry point for that, and both take long to import, so their import is watched: the moment
somebody imports one, pkmem's part is registered; who never does, pays nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTERING = {"transformers": "pkmem.lm.huggingface", "torch.utils.flop_counter": "pkmem.ops.flops"}


def register_when_imported() -> None:
    """Registers pkmem's part with each library now if it is loaded, else right after it is."""
    watched = {finder.watched for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for library, ours in _REGISTERING.items():
        if library in sys.modules:
            importlib.import_module(ours)
        elif library not in watched:
            sys.meta_path.insert(0, _Watcher(library))


class _Watcher(importlib.abc.MetaPathFinder):
    def __init__(self, watched: str) -> None:
        self.watched = watched

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.watched:
            return None
        # Asked does not mean imported: many libraries only look whether it is there, so the watch goes on.
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Watcher))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader, self)
        return spec


class _LoadThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any, watcher: _Watcher) -> None:
        self._loader, self._watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self._watcher]
        importlib.import_module(_REGISTERING[self._watcher.watched])
