"""Makes `import pkmem` enough for `AutoModelForCausalLM` to know pkmem's models.

transformers has no entry point for model classes and takes seconds to import, so its import is watched:
the moment somebody imports it, pkmem's classes are registered; who never does, pays nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = "transformers"


def register_with_transformers() -> None:
    """Registers pkmem's model classes now if transformers is loaded, else right after it is."""
    if _WATCHED in sys.modules:
        importlib.import_module("pkmem.lm.huggingface")
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _WATCHED:
            return None
        # Asked does not mean imported: many libraries only look whether it is there, so the watch goes on.
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Watcher))
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


class _LoadThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]
        importlib.import_module("pkmem.lm.huggingface")
