"""The paper's claim at laptop size: L layers with a memory against L and 2L layers without (section 4.3)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from pkmem.experiments.environment import environment
from pkmem.experiments.family import Family, config_folder, load_family
from pkmem.experiments.plots import plot_learning_curves
from pkmem.files.documents import empty, save_json
from pkmem.lm.huggingface import context_tokens
from pkmem.lm.speed import measure_speed
from pkmem.text import read_documents, train_tokenizer
from pkmem.training.journal import read_metrics
from pkmem.training.reading import read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.run import train

FIGURES = (  # of a model, in the order of the table: key, title, format
    ("dense_params", "dense parameters", "{:,.0f}"),
    ("memory_params", "memory parameters", "{:,.0f}"),
    ("bits_per_byte", "held-out bits per byte", "{:.4f}"),
    ("perplexity", "held-out perplexity", "{:.2f}"),
    ("train_tokens_per_s", "training tokens/s", "{:,.0f}"),
    ("prefill_tokens_per_s", "prefill tokens/s", "{:,.0f}"),
    ("decode_tokens_per_s", "decode tokens/s", "{:,.0f}"),
    ("usage", "usage", "{:.1%}"),
    ("top1_usage", "top-1 usage", "{:.1%}"),
    ("kl", "KL (nats)", "{:.3f}"),
)
PROMPT = "def read_lines(path):\n"


def recipes(out: Path, data: str = "python", seed: int = 0) -> dict[str, Recipe]:
    """The three runs of configs/demo.yaml: same data, tokens, order and seed; each model at its own best rate."""
    family, chosen = _models()
    runs = {name: family.run(family.cells[model["cell"]], model["rate"], seed, data) for name, model in chosen.items()}
    return {name: replace(run.recipe, out=out / name, tokenizer=str(out / "tokenizer")) for name, run in runs.items()}


def labels() -> dict[str, str]:
    """What the three models are called: dense, memory, deep."""
    family, chosen = _models()
    return {name: family.cells[model["cell"]].label for name, model in chosen.items()}


def _models() -> tuple[Family, dict[str, dict[str, Any]]]:
    """The experiment that the three models are from, and the cell and rate of each."""
    document = read_yaml(config_folder() / "demo.yaml")
    return load_family(document["experiment"], document["scale"]), document["models"]


def demo(out: Path, overwrite: bool = False, data: str = "python", seed: int = 0) -> dict[str, Any]:
    """Trains the three models, compares them and leaves table, plot, sample and figures in `out`.

    Args:
        out: the directory of the demo; three run directories, learning_curves.png, summary.json.
        overwrite: replace it if it is there.
        data: what to learn, as in `pkmem train --data`.
        seed: of weights and data order.

    Returns:
        the content of summary.json: `{"models": {"dense": {...}, "memory": {...}, "deep": {...}}, ...}`.

    Raises:
        ValueError: `out` exists, or the data cannot be used.
    """
    documents = read_documents(data, "train")
    _make_room(out, overwrite)
    runs = recipes(out, data, seed)
    tokenizer = train_tokenizer(documents, runs["dense"].model.vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    summaries = {name: train(recipe) for name, recipe in runs.items()}
    models = {name: AutoModelForCausalLM.from_pretrained(recipe.out / "model") for name, recipe in runs.items()}
    speeds = measure_speed(models, runs["dense"].model.context_tokens)
    summary = {
        "models": {name: _figures(summaries[name] | speeds[name]) for name in runs},
        "environment": environment(),
        "recipes": {name: recipe.to_dict() for name, recipe in runs.items()},
    }
    save_json(out / "summary.json", summary)
    plot_learning_curves(
        {label: read_metrics(runs[name].out) for name, label in labels().items()}, out / "learning_curves.png"
    )
    print(table(summary["models"]))
    print(_ratios(summary["models"]))
    print(f"\nA sample of the model with memory:\n\n{sample(models['memory'], out / 'memory' / 'model')}\n")
    print(f"learning curves: {out / 'learning_curves.png'}\nevery figure:    {out / 'summary.json'}", flush=True)
    return summary


def _make_room(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(f"{out} already exists: choose another --out, or --overwrite it")
        if not (out / "tokenizer").exists():
            raise ValueError(f"{out} is not a demo's directory (it has no tokenizer): choose another --out")
        empty(out)
    out.resolve().mkdir(parents=True, exist_ok=True)


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: summary.get(key, summary.get(f"memory_0/{key}")) for key, _, _ in FIGURES}


def table(models: dict[str, dict[str, Any]]) -> str:
    """The figures of the three models as text, a figure a line."""
    called = labels()
    rows = [["", *(called[name] for name in models)]]
    for key, title, form in FIGURES:
        rows.append([title, *("-" if model[key] is None else form.format(model[key]) for model in models.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{title:{widths[0]}}" + "".join(f"  {x:>{w}}" for x, w in zip(cells, widths[1:], strict=True))
        for title, *cells in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ratios(models: dict[str, dict[str, Any]]) -> str:
    gain = models["dense"]["bits_per_byte"] - models["memory"]["bits_per_byte"]
    prefill, decode = (
        models["memory"][key] / models["deep"][key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )
    called = labels()
    return (
        f"\nmemory against {called['dense']}: {gain:+.4f} bits per byte saved"
        f"\nmemory against {called['deep']}: {models['deep']['bits_per_byte'] - models['memory']['bits_per_byte']:+.4f} "
        f"bits per byte saved, prefill {prefill:.2f}x, decode {decode:.2f}x as fast"
    )


def sample(model: Any, folder: Path) -> str:
    """A short continuation of a fixed prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    room = context_tokens(model) - inputs["input_ids"].shape[1]
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=min(80, room), do_sample=True, temperature=0.7, top_k=50)
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text
