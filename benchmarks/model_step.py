"""Where does the time of a training step go that a memory adds to a small model, and what does malloc add to the step?

    python benchmarks/model_step.py

The model of configs/laptop.yaml, without and with a memory in its first block, and the optimizers of `pkmem train`. Each
part of the memory is called alone, on queries and hidden states like those of the model; a gradient's share is the time
of a forward with it less that of a forward alone. All that with memory kept for the next step; what that saves is
measured apart, in a fresh process for each turn.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness import Options, Ratio, Report, interleave
from pkmem import ProductKeyMemory, dense_parameters
from pkmem.experiments.family import config_folder
from pkmem.layer.memory import memories_in
from pkmem.lm.build import build_model
from pkmem.training.freed_memory import keep_freed_memory
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.trainer import build_optimizer

CASES = {"128² slots": {"memory.num_sub_keys": 128}, "512² slots": {"memory.num_sub_keys": 512}}
SMOKE = {"16² slots": {"memory.num_sub_keys": 16, "memory.knn": 4, "model.width": 16, "training.batch_tokens": 256}}
FRESH_PROCESSES = 7  # of each form, in turns
KINDS: tuple[Any, ...] = ("bf16", "row", "row_alone", "row_adagrad")
PLAIN, WITH, NEGLIGIBLE = "no memory", "with a memory", 1e-9
PARTS: dict[str, dict[str, float]] = {  # as sums of calls
    "all that a memory adds": {WITH: 1, PLAIN: -1},
    "queries and their gradient": {"queries": 1},
    "selection": {"selection": 1},
    "gradient of the selection": {"selection, gradient": 1, "selection": -1},
    "sums of values": {"sums": 1},
    "gradient of the weights": {"sums, gradient": 1, "sums": -1},
    "update of the values": {"sums, gradient, update": 1, "sums, gradient": -1},
}


def main() -> None:
    """Measures every case and writes model_step.json and model_step.md."""
    options = harness.start(__doc__, repeats=31)
    report = Report("model_step", options)
    for case, settings in (SMOKE if options.smoke else CASES).items():
        measure(report, options, case, settings)
        compare_malloc(report, options, case, settings)
    report.note("a step: 1,024 tokens forward and backward, all gradients but the values' clipped, both optimizers")
    report.note(
        "what the parts leave of all that a memory adds: autograd, hooks, the clipping and AdamW of its queries"
    )
    report.write()


def measure(report: Report, options: Options, case: str, settings: dict[str, Any]) -> None:
    """Adds one case to the report: what a memory adds to a step, and each of its parts."""
    laptop = read_yaml(config_folder() / "laptop.yaml")
    recipe = read_recipe(laptop, settings | {"model.memory_layers": [0]})
    model = new_model(recipe)
    contenders = {
        PLAIN: training_step(new_model(read_recipe(laptop, settings)), recipe),
        WITH: training_step(model, recipe),
        **calls(*memories_in(model).values(), recipe),
    }
    for kind in KINDS:
        leaner = replace(recipe, training=replace(recipe.training, value_moments=kind))
        contenders[kind] = training_step(new_model(leaner), leaner)
    timings = interleave(contenders, options.repeats).with_sum("a hundredth", {PLAIN: 0.01})
    report.keep(case, timings)
    for part, factors in PARTS.items():
        ratio = timings.with_sum(part, factors).ratio(part, "a hundredth")
        report.add(f"{case}: {part}, % of a step without a memory", ratio)
    for kind in KINDS:
        report.add(f"{case}: a step with value_moments fp32 / {kind}", timings.ratio(WITH, kind))


def compare_malloc(report: Report, options: Options, case: str, settings: dict[str, Any]) -> None:
    """Adds what it takes that malloc gives the memory of a step back to the system, which it does unless told."""
    ratios = []
    for _ in range(2 if options.smoke else FRESH_PROCESSES):
        given_back, kept = (_in_a_process_of_its_own(options, settings, keeps) for keeps in (False, True))
        ratios.append(given_back / kept)
    report.add(f"{case}: a step, freed memory given back to the system / kept, as `pkmem train` does", Ratio.of(ratios))


def _in_a_process_of_its_own(options: Options, settings: dict[str, Any], keeps: bool) -> float:
    environ = {name: text for name, text in os.environ.items() if name not in harness.TUNED_MALLOC}
    repeats, threads = options.repeats, options.threads
    code = f"import model_step; print(model_step.seconds_of_a_step({settings}, {keeps}, {repeats}, {threads}))"
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    finished = subprocess.run(command, cwd=folder, env=environ, check=True, capture_output=True, text=True)
    return float(finished.stdout)


def seconds_of_a_step(settings: dict[str, Any], keeps: bool, repeats: int, threads: int) -> float:
    """Median seconds of a step of the model with a memory, in a process that keeps freed memory or does not."""
    torch.set_num_threads(threads)
    if keeps:
        keep_freed_memory()
    recipe = read_recipe(read_yaml(config_folder() / "laptop.yaml"), settings | {"model.memory_layers": [0]})
    return interleave({WITH: training_step(new_model(recipe), recipe)}, repeats).median(WITH)


def new_model(recipe: Recipe) -> Any:
    """A model as `pkmem train` makes it."""
    torch.manual_seed(0)
    return build_model(recipe.model, recipe.memory, recipe.model.vocab_size, eos_token_id=0).train()


def training_step(model: Any, recipe: Recipe) -> Callable[[], None]:
    """A step of a model's training, with the optimizers of `pkmem train`."""
    optimizer, dense = build_optimizer(model, recipe.training), dense_parameters(model)
    context = recipe.model.context_tokens
    texts = torch.randint(recipe.model.vocab_size, (recipe.training.batch_tokens // context, context))

    def step() -> None:
        model(input_ids=texts, labels=texts).loss.backward()
        nn.utils.clip_grad_norm_(dense, recipe.training.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def calls(memory: ProductKeyMemory, recipe: Recipe) -> dict[str, Callable[[], object]]:
    """The memory's parts alone, as the calls that `PARTS` puts together."""
    memory = copy.deepcopy(memory)
    optimizer = build_optimizer(memory, replace(recipe.training, lr=NEGLIGIBLE, value_lr=NEGLIGIBLE))
    x = torch.randn(recipe.training.batch_tokens, recipe.model.width, requires_grad=True)
    query = memory.query(x).detach().requires_grad_()
    slots, weights = (part.detach() for part in memory.keys(query))
    weights.requires_grad_()
    back_of_sums = torch.randn_like(memory.values(slots, weights).detach())
    back_of_query, back_of_weights = torch.randn_like(query), torch.randn_like(weights)

    def sums(backward: bool, update: bool = False) -> None:
        out = memory.values(slots, weights)
        if backward:
            out.backward(back_of_sums)
        if update:
            optimizer.step()
        optimizer.zero_grad()

    def selection(backward: bool) -> None:
        _, chosen = memory.keys(query)
        if backward:
            chosen.backward(back_of_weights)

    return {
        "queries": lambda: memory.query(x).backward(back_of_query),
        "selection": lambda: selection(False),
        "selection, gradient": lambda: selection(True),
        "sums": lambda: sums(False),
        "sums, gradient": lambda: sums(True),
        "sums, gradient, update": lambda: sums(True, True),
    }


if __name__ == "__main__":
    main()
