"""The file beside the weights: what a process that never heard of pkmem makes of a saved model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decoders import ids, reloaded, with_memories, with_todays_transformers
from pkmem.lm import modeling_pkmem
from pkmem.lm.huggingface import PkmemConfig, PkmemForCausalLM

KIND = "Hugging Face protocol"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoConfig
assert "pkmem" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(torch.tensor([[1, 2, 3]])).logits.sum().item())
model.save_pretrained(sys.argv[1] + "/again")
"""
WITHOUT_PKMEM = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pkmem":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess:
    """A fresh Python, whose cache of code from models is its own."""
    modules = folder.parent / "modules"
    prefix = f"import os\nos.environ['HF_MODULES_CACHE'] = {str(modules)!r}\n"
    return subprocess.run(
        [sys.executable, "-c", prefix + program, str(folder)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.case(
    KIND,
    "Load with `trust_remote_code=True` in a process that did not import pkmem, and save again",
    "works",
    "https://github.com/huggingface/transformers/issues/24737",
)
def test_a_process_that_did_not_import_pkmem_loads_with_trust_and_saves_the_same(tmp_path) -> None:
    model, folder = with_memories("llama", share_values=True), tmp_path / "a-model.v1"
    model.save_pretrained(folder)
    done = run(LOAD, folder)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model(torch.tensor([[1, 2, 3]])).logits.sum().item(), rel=1e-5)
    for name in ("modeling_pkmem.py", "model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()
    auto_maps = [json.loads((part / "config.json").read_text())["auto_map"] for part in (folder, folder / "again")]
    assert auto_maps[0] == auto_maps[1]


@pytest.mark.case(KIND, "Load where pkmem is not installed", "refused: ImportError, run `pip install pkmem`", "")
def test_where_pkmem_is_missing_the_error_says_what_to_install(tmp_path) -> None:
    with_memories().save_pretrained(tmp_path / "model")
    done = run(WITHOUT_PKMEM + LOAD, tmp_path / "model")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("Run `pip install pkmem`")


@pytest.mark.case(
    KIND,
    "Load without `trust_remote_code` in a process that did not import pkmem",
    "refused: ValueError, import pkmem first or pass trust_remote_code=True",
    "",
)
def test_without_trust_the_error_asks_for_it(tmp_path) -> None:
    with_memories().save_pretrained(tmp_path / "model")
    done = run(LOAD.replace("True", "False"), tmp_path / "model")
    assert done.returncode == 1
    assert "pass the argument `trust_remote_code=True`" in done.stderr


@pytest.mark.case(KIND, "Load a model that was saved before pkmem wrote that file", "works: after `import pkmem`", "")
@pytest.mark.parametrize("trust", [None, False, True])
def test_a_model_saved_without_the_file_loads_after_an_import(trust, tmp_path) -> None:
    model = with_memories()
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_pkmem.py").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert torch.equal(loaded(x := ids()).logits, model(x).logits)
    loaded.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "modeling_pkmem.py").exists()


def test_the_file_names_the_classes_that_are_registered() -> None:
    assert modeling_pkmem.PkmemConfig is PkmemConfig
    assert modeling_pkmem.PkmemForCausalLM is PkmemForCausalLM


@with_todays_transformers
def test_no_copy_of_the_package_is_saved_when_transformers_asks_for_one(tmp_path) -> None:
    for kind, auto in ((PkmemConfig, "AutoConfig"), (PkmemForCausalLM, "AutoModelForCausalLM")):
        kind.register_for_auto_class(auto)
        assert not kind.is_remote_code()
    with_memories().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.py")] == ["modeling_pkmem.py"]


@pytest.mark.case(
    KIND, "Save in shards (`max_shard_size`)", "works: the names are those of `state_dict`, for every family", ""
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_are_saved_in_shards_under_the_names_they_have(family, tmp_path) -> None:
    model = with_memories(family, share_values=True, placement="parallel")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = {name for file in tmp_path.glob("model-*.safetensors") for name in load_file(file)}
    tied = {name for name in model.state_dict() if name in model.all_tied_weights_keys}
    assert stored == set(model.state_dict()) - tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.case(KIND, "Load a mixture of experts that was saved in the decoder's own format", "works", "")
def test_a_mixture_saved_in_the_decoders_format_loads(tmp_path) -> None:
    model = with_memories("mixtral", placement="parallel")
    model.save_pretrained(tmp_path, save_original_format=True)
    assert any("experts.3.w1" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.case(
    KIND,
    "Load in another dtype, on a device map, lazily (`dtype`, `device_map`, `low_cpu_mem_usage`)",
    "works",
    "",
)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}, "dtype": torch.bfloat16}, torch.bfloat16),
        ({"low_cpu_mem_usage": True}, torch.float32),
        ({"attn_implementation": "eager"}, torch.float32),
    ],
)
def test_a_model_is_loaded_as_asked(options, dtype, tmp_path) -> None:
    model = with_memories("llama", share_values=True)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert loaded.dtype == loaded.config.dtype == loaded.base.config.dtype == dtype
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.base.config._attn_implementation == options.get("attn_implementation", "sdpa")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.to(dtype).state_dict()), rtol=0, atol=0)
    assert loaded(ids()).logits.isfinite().all()


def test_a_saved_model_with_a_stray_weight_says_so_to_who_asks(tmp_path) -> None:
    model = with_memories()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "stray": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"stray"}
    assert reloaded(model, tmp_path / "again").num_parameters() == model.num_parameters()
