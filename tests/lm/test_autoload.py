import subprocess
import sys

import pytest

import pkmem


def run(program: str) -> str:
    """What a fresh Python prints."""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_importing_pkmem_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numba', 'triton', 'numpy', 'jsonargparse', 'pkmem.ops', 'pkmem.lm.huggingface'}"
    assert run(f"import sys, pkmem; print({heavy} & set(sys.modules))") == "set()"


def test_a_layer_on_the_reference_backend_needs_torch_only() -> None:
    program = """
import sys, torch, pkmem
config = pkmem.MemoryConfig(dim=4, num_sub_keys=4, knn=2, query_dim=4)
memory = pkmem.ProductKeyMemory(config)
memory.backend = "reference"
optimizer = pkmem.RowAdam(memory)
memory(torch.randn(3, 4)).sum().backward()
optimizer.step()
print({'transformers', 'numba', 'jsonargparse', 'pkmem.ops.cpu', 'pkmem.ops.triton'} & set(sys.modules))
"""
    assert run(program) == "set()"


REGISTERED = """
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
name = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["pkmem"]].__name__
print(name, [type(finder).__name__ for finder in sys.meta_path].count("_Watcher"), transformers.__spec__.loader)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, pkmem",
        # Libraries look whether transformers is there long before somebody imports it.
        "import importlib.util, pkmem; assert importlib.util.find_spec('transformers'); import transformers",
    ],
)
def test_the_model_class_is_known_whichever_is_imported_first(imports) -> None:
    name, watchers, loader = run(f"import sys; {imports}{REGISTERED}").split(maxsplit=2)
    assert name == "PkmemForCausalLM"
    assert watchers == "0"  # nothing is left behind in Python's import machinery
    assert "SourceFileLoader" in loader


def test_without_transformers_its_import_fails_as_ever() -> None:
    program = """
import sys, pkmem
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
try:
    import transformers
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(program) == "No module named 'transformers'"


def test_two_registrations_leave_one_watcher() -> None:
    program = """
import sys, pkmem
pkmem.lm.autoload.register_with_transformers()
print([type(finder).__name__ for finder in sys.meta_path].count("_Watcher"))
"""
    assert run(program) == "1"


def test_the_package_lists_its_contents_and_gives_each() -> None:
    assert dir(pkmem) == sorted(pkmem.__all__)
    for name in dir(pkmem):
        assert getattr(pkmem, name) is not None
    assert pkmem.ProductKeyMemory.__module__ == "pkmem.layer.memory"
    assert pkmem.add_memory.__module__ == "pkmem.lm.huggingface"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pkmem' has no attribute 'ProductKeyMemry'"):
        pkmem.ProductKeyMemry  # noqa: B018
