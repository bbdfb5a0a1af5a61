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
print(name, "transformers" in [getattr(finder, "watched", "") for finder in sys.meta_path], transformers.__spec__.loader)
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
    name, is_watched, loader = run(f"import sys; {imports}{REGISTERED}").split(maxsplit=2)
    assert name == "PkmemForCausalLM"
    assert is_watched == "False"  # nothing is left behind in Python's import machinery
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


def test_two_registrations_leave_one_watcher_of_each_library() -> None:
    program = """
import sys, pkmem
pkmem.lm.autoload.register_when_imported()
print(*sorted(finder.watched for finder in sys.meta_path if hasattr(finder, "watched")))
"""
    assert run(program) == "torch.utils.flop_counter transformers"


@pytest.mark.parametrize("imports", ["pkmem, torch.utils.flop_counter", "torch.utils.flop_counter, pkmem"])
def test_the_counter_of_torch_knows_the_operators_whichever_is_imported_first(imports) -> None:
    program = f"""
import sys, {imports}
from pkmem import ops
from torch.utils.flop_counter import FlopCounterMode
table, slots = torch.zeros(9, 5), torch.zeros(2, 3, dtype=torch.int64)
with FlopCounterMode(display=False) as counter:
    ops.weighted_sum(table, slots, torch.zeros(2, 3), backend="reference")
print(counter.get_total_flops(), [f.watched for f in sys.meta_path if hasattr(f, "watched")])
"""
    assert run(program) == "60 ['transformers']"


def test_the_package_lists_its_contents_and_gives_each() -> None:
    assert dir(pkmem) == sorted(pkmem.__all__)
    for name in dir(pkmem):
        assert getattr(pkmem, name) is not None
    assert pkmem.ProductKeyMemory.__module__ == "pkmem.layer.memory"
    assert pkmem.add_memory.__module__ == "pkmem.lm.huggingface"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pkmem' has no attribute 'ProductKeyMemry'"):
        pkmem.ProductKeyMemry  # noqa: B018
