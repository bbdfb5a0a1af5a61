"""The demo: three runs that differ in the model alone, compared in a table, a plot and summary.json."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from pkmem.experiments import demo as module
from pkmem.experiments.demo import FIGURES, demo, labels, recipes, table
from pkmem.experiments.family import config_folder, load_family
from pkmem.experiments.results import best_of_sweep, difference, find_results
from pkmem.training.checkpoint import latest_checkpoint
from pkmem.training.recipe import Recipe
from tiny import tiny

pytest_plugins = "tiny"

KEYS = {
    *("dense_params", "memory_params", "bits_per_byte", "perplexity", "train_tokens_per_s", "prefill_tokens_per_s"),
    *("decode_tokens_per_s", "usage", "top1_usage", "kl"),
}


def tiny_recipes(out: Path, data: str, seed: int) -> dict[str, Recipe]:
    """The demo's recipes, each with a tiny one's sizes."""
    real, small = recipes(out, data, seed), tiny(Path(data), out)
    training = dataclasses.replace(small.training, seed=seed, num_tokens=512)
    made = {}
    for name, recipe in real.items():
        model = dataclasses.replace(
            small.model, num_layers=recipe.model.num_layers, memory_layers=recipe.model.memory_layers
        )
        made[name] = dataclasses.replace(recipe, model=model, memory=small.memory, training=training)
    return made


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """The demo's directory, what it returned and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(module, "recipes", tiny_recipes)
        summary = demo(out, data=str(text))
    return out, summary, printed.getvalue()


def test_the_three_recipes_differ_only_where_they_should() -> None:
    dense, memory, deep = (recipe.to_dict() for recipe in recipes(Path("o"), "d", 3).values())
    assert labels() == {"dense": "4 layers", "memory": "4 layers + memory", "deep": "8 layers"}
    assert list(recipes(Path("o"))) == ["dense", "memory", "deep"]
    for other, changed in (
        (memory, {"memory_layers": [0]}),
        (deep, {"num_layers": 2 * dense["model"]["num_layers"]}),
    ):
        assert other["model"] == dense["model"] | changed
        rates = {"lr", "value_lr"}  # each model's own best
        assert {k: v for k, v in other["training"].items() if k not in rates} == {
            k: v for k, v in dense["training"].items() if k not in rates
        }
        for name in ("data", "tokenizer", "memory"):
            assert other[name] == dense[name]
    assert dense["model"]["memory_layers"] == deep["model"]["memory_layers"] == []
    assert {recipe["out"] for recipe in (dense, memory, deep)} == {"o/dense", "o/memory", "o/deep"}
    assert dense["training"]["seed"] == 3
    assert dense["data"] == "d"


def test_each_model_has_the_rate_that_its_experiment_found_best() -> None:
    document = yaml.safe_load((config_folder() / "demo.yaml").read_text())
    family = load_family(document["experiment"], document["scale"])
    results = find_results(Path(__file__).parents[2] / "experiments" / "results" / family.name / family.scale)[0]
    for name, recipe in recipes(Path("o")).items():
        best = best_of_sweep(family, family.cells[document["models"][name]["cell"]], results).recipe
        assert difference(dataclasses.replace(recipe, tokenizer=best.tokenizer), best) is None


def test_summary_has_every_figure_of_every_model(finished: tuple[Path, dict, str]) -> None:
    out, summary, _ = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["models"].keys() == {"dense", "memory", "deep"}
    for name, figures in summary["models"].items():
        assert figures.keys() == KEYS
        missing = {key for key, figure in figures.items() if figure is None}
        assert missing == (set() if name == "memory" else {"usage", "top1_usage", "kl"})
        trained = json.loads((out / name / "summary.json").read_text())
        assert figures["bits_per_byte"] == trained["bits_per_byte"]
        assert figures["train_tokens_per_s"] == trained["train_tokens_per_s"]
        assert figures["prefill_tokens_per_s"] > 0
        assert figures["decode_tokens_per_s"] > 0
    assert (
        summary["models"]["memory"]["usage"] == json.loads((out / "memory/summary.json").read_text())["memory_0/usage"]
    )
    dense, memory, deep = summary["models"].values()
    assert memory["memory_params"] == 64 * 32
    assert dense["memory_params"] == deep["memory_params"] == 0
    assert deep["dense_params"] > dense["dense_params"]
    assert summary["environment"]["versions"]["torch"]
    assert summary["recipes"]["deep"]["model"]["num_layers"] == 8


def test_table_and_ratios_are_printed(finished: tuple[Path, dict, str]) -> None:
    _, summary, printed = finished
    assert table(summary["models"]) in printed
    lines = table(summary["models"]).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == list(labels().values())
    for line, (key, title, form) in zip(lines[2:], FIGURES, strict=True):
        cells = ["-" if m[key] is None else form.format(m[key]) for m in summary["models"].values()]
        assert re.split(r"\s{2,}", line) == [title, *cells]
    assert len({len(line) for line in lines}) == 1
    dense, memory, deep = summary["models"].values()
    assert f"{dense['bits_per_byte'] - memory['bits_per_byte']:+.4f} bits per byte saved" in printed
    speed = memory["decode_tokens_per_s"] / deep["decode_tokens_per_s"]
    assert f"decode {speed:.2f}x as fast" in printed
    assert module.PROMPT.strip() in printed


def test_curves_checkpoints_and_models_are_left(finished: tuple[Path, dict, str]) -> None:
    out, _, printed = finished
    assert (out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "learning_curves.png") in printed
    for name in ("dense", "memory", "deep"):
        assert latest_checkpoint(out / name) is not None
        assert (out / name / "model" / "model.safetensors").exists()


def test_all_three_have_one_tokenizer(finished: tuple[Path, dict, str]) -> None:
    out = finished[0]
    tokenizers = {
        (out / name / "tokenizer" / "tokenizer.json").read_text() for name in (".", "dense", "memory", "deep")
    }
    assert len(tokenizers) == 1


def test_an_existing_directory_is_refused_unless_it_is_a_demo_to_overwrite(
    finished: tuple[Path, dict, str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished[0]
    before = (out / "summary.json").read_bytes()
    with pytest.raises(ValueError, match="already exists: choose another --out, or --overwrite it"):
        demo(out, data=str(text))
    with pytest.raises(ValueError, match="no such file or directory"):
        demo(out, overwrite=True, data=str(tmp_path / "nowhere"))
    assert (out / "summary.json").read_bytes() == before
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not a demo's directory"):
        demo(tmp_path, overwrite=True, data=str(text))
    assert (tmp_path / "thesis.txt").exists()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "recipes", stop)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path, overwrite=True, data=str(text))
    assert list(tmp_path.iterdir()) == []
