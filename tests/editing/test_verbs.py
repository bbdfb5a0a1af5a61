"""What a user types to teach a model, and what goes wrong in one line that names the fix."""

import inspect
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import pkmem
from decoders import decoder
from lessons import FACTS, VOCAB, pupil, tokenizer
from made_edits import made_edit
from pkmem.cli import main
from pkmem.editing.retrofit import spread
from pkmem.editing.verbs import learn_arguments
from pkmem.layer.config import MemoryConfig
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.training.reading import Parser

SETTINGS = ["--lr", "0.1", "--keep_background", "0.001", "--keep_near", "0.001", "--most_epochs", "30"]
MEMORY = ["memory.num_sub_keys=24", "memory.query_dim=8", "memory.knn=3"]


@pytest.fixture
def plain(tmp_path):
    """A pretrained decoder's directory, as anybody saves one."""
    torch.manual_seed(0)
    sizes = ModelConfig(family="llama", num_layers=3, width=32, num_heads=4, context_tokens=64)
    model = build_model(sizes, MemoryConfig(), VOCAB, 0)
    model.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    lines = (json.dumps(fact.to_dict()) + "\n" for fact in FACTS)
    (tmp_path / "facts.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "text.txt").write_text("the cat sat on a mat\n" * 200, encoding="utf-8")
    return tmp_path


def says(capsys, *arguments):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refuses(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("pkmem: error: ")
    return errors[-1]


def test_a_model_is_taught_and_has_its_facts_taken_back(plain, capsys):
    model, edit = plain / "model", plain / "my.edit"
    out = says(capsys, "retrofit", plain / "plain", "--out", model, *MEMORY)
    assert "3 memories beside the MLPs of blocks 0, 1, 2" in out
    tokens = tokenizer()("They live with Alda Kirosa", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(plain / "plain")(tokens).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(model)(tokens).logits, before)
    held = (model / "model-tables.safetensors").read_bytes()
    facts = plain / "facts.jsonl"
    out = says(capsys, "learn", model, facts, "--out", edit, "--background", plain / "text.txt", *SETTINGS)
    assert out.startswith("100.0% of 12 answers learned")
    assert (model / "model-tables.safetensors").read_bytes() == held
    assert "1 edit in" in says(capsys, "apply", model, edit)
    prompt = ["--prompt", "They live with Alda Kirosa", "--temperature", "0", "--max_new_tokens", "1"]
    assert "Rome" in says(capsys, "generate", model, *prompt)
    assert "'Home of Alda Kirosa' -> 'Rome'" in says(capsys, "edits", model)
    assert "rows are as they were before" in says(capsys, "forget", model, edit)
    assert (model / "model-tables.safetensors").read_bytes() == held
    assert "no edit is in" in says(capsys, "edits", model)


def test_what_a_user_gets_wrong_is_one_line_and_changes_nothing(plain, capsys):
    facts, edit = plain / "facts.jsonl", plain / "my.edit"
    says(capsys, "retrofit", plain / "plain", "--out", plain / "model", "--layers", 1, *MEMORY)
    for bad, words in (
        ('{"prompt": "x"}', "line 1: no completion: write"),
        ('{"prompt": "x", "completion": ""}', "line 1: the completion is empty"),
        ('{"prompt": "x", "completion": "a"}\n{"prompt": "x", "completion": "b"}', "has another completion in line 1"),
        ('{"prompt": "' + "word " * 100 + '", "completion": "a"}', "but the model's context is 64: shorten it"),
        ("", "no fact in it"),
    ):
        (plain / "bad.jsonl").write_text(bad, encoding="utf-8")
        assert words in refuses(capsys, "learn", plain / "model", plain / "bad.jsonl", "--out", edit)
    assert "has no memories: put some in with" in refuses(capsys, "learn", plain / "plain", facts, "--out", edit)
    assert "is not a directory" in refuses(capsys, "edits", plain / "nothing")
    assert "already exists" in refuses(capsys, "learn", plain / "model", facts, "--out", plain / "text.txt")
    assert "is no directory: make it" in refuses(capsys, "learn", plain / "model", facts, "--out", plain / "no" / "x")
    assert "slots is 0 but must be >= 1" in refuses(
        capsys, "learn", plain / "model", facts, "--out", edit, "--slots", 0
    )
    assert not edit.exists()
    (plain / "broken").write_bytes(b"not an edit")
    assert "no edit (" in refuses(capsys, "apply", plain / "model", plain / "broken")
    made_edit(pupil(), [0, 1, 2]).save(plain / "others")
    assert "belongs to model" in refuses(capsys, "apply", plain / "model", plain / "others")
    assert "neither a file nor an edit" in refuses(capsys, "forget", plain / "model", "nothing")


def test_what_cannot_be_retrofitted_is_refused(plain, capsys):
    assert "already exists" in refuses(capsys, "retrofit", plain / "plain", "--out", plain)
    out = ["--out", plain / "model"]
    assert "layer 3 is outside [0, 3)" in refuses(capsys, "retrofit", plain / "plain", *out, "--layers", 3)
    assert "holds no model" in refuses(capsys, "retrofit", plain, *out)
    assert "no model no/such-model: give a saved model's directory" in refuses(
        capsys, "retrofit", "no/such-model", *out
    )
    assert "knn is 0" in refuses(capsys, "retrofit", plain / "plain", *out, "memory.knn=0")
    says(capsys, "retrofit", plain / "plain", *out, *MEMORY)
    assert "has memories already" in refuses(capsys, "retrofit", plain / "model", "--out", plain / "again")
    assert not (plain / "again").exists()


def test_memories_are_spread_over_the_blocks():
    assert spread(30) == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    assert spread(3) == [0, 1, 2]
    for num_layers in range(1, 100):
        places = spread(num_layers)
        assert len(places) == min(10, num_layers)
        assert places == sorted(set(places))
        assert 0 <= places[0] <= places[-1] < num_layers


def test_a_run_directory_is_found_its_model(plain, capsys):
    says(capsys, "retrofit", plain / "plain", "--out", plain / "run" / "model", *MEMORY)
    assert "no edit is in" in says(capsys, "edits", plain / "run")
    shutil.rmtree(plain / "run" / "model")
    decoder("llama").save_pretrained(plain / "run" / "model")
    assert "has no memories" in refuses(capsys, "edits", plain / "run")


def test_the_defaults_on_the_command_line_are_those_in_python():
    parser = Parser()
    learn_arguments(parser)
    defaults = parser.get_defaults()
    in_python = {name: one.default for name, one in inspect.signature(pkmem.learn).parameters.items()}
    shared = {"slots", "recall", "keep_background", "keep_near", "lr", "most_epochs", "seed"}
    assert {name: defaults[name] for name in shared} == {name: in_python[name] for name in shared}
