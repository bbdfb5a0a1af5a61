"""The command line. Heavy imports stand inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from pkmem.training.recipe import Recipe

_ASSIGNMENT = re.compile(r"[a-z]\w*(\.\w+)*=")
_USER_ERROR = 2
_CALM = {  # read when the libraries are imported: pkmem says itself what a user needs to know
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class _Parser(ArgumentParser):
    """Errors are one line that names the fix."""

    verb: str | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # or memory.kn would be memory.knn

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _fail(_explain(message, self.verb))


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb; exits with 2 where the user can mend what went wrong, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        arguments = [f"--{text}" if _ASSIGNMENT.match(text) else text for text in arguments]
    parser = build_parser()
    chosen = parser.parse_args(arguments or ["--help"])
    for name, setting in _CALM.items():
        os.environ.setdefault(name, setting)
    try:
        if chosen.subcommand == "train" and chosen.train.resume:
            chosen.train = _recorded_options(chosen.train.out, parser.parse_args(arguments, defaults=False).train)
        _VERBS[chosen.subcommand](chosen[chosen.subcommand])
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except KeyboardInterrupt as stop:
        print(f"pkmem: {str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="pkmem", description="Language models with product-key memories (Lample et al. 2019).")
    verbs = parser.add_subcommands(title="verbs", metavar="VERB")
    for name, (add, text) in _ARGUMENTS.items():
        verb = _Parser(description=text)
        verb.verb = name
        add(verb)
        verbs.add_subcommand(name, verb, help=text.split(". ")[0].rstrip("."))
    return parser


# Verbs and their arguments ------------------------------------------------------------------------------


def _train_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="config", help="a recipe, such as configs/tiny.yaml; options after it override it"
    )
    parser.add_class_arguments(Recipe, as_group=False)
    parser.add_argument("--resume", action=ActionYesNo, default=False, help="go on from the newest checkpoint of OUT")
    parser.add_argument("--overwrite", action=ActionYesNo, default=False, help="replace OUT if it is there")


def _train(options: Namespace) -> None:
    from pkmem.training.run import train

    recipe = _recipe(options)
    summary = train(recipe, resume=options.resume, overwrite=options.overwrite)
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process speaks
        return
    for name, figure in summary.items():
        print(f"{name:28} {figure:,.4f}" if isinstance(figure, float) else f"{name:28} {figure:,}")
    print(f"model: {recipe.out / 'model'}   metrics: {recipe.out / 'metrics.jsonl'}")


def _recorded_options(out: Path, given: Namespace) -> Namespace:
    """The options a run was started with: a resumed run is the same run, so none of those given may differ."""
    recorded = out / "config.yaml"
    if not recorded.exists():
        raise ValueError(f"{out} has no config.yaml to resume from: start the run without --resume")
    parser = _Parser()
    _train_arguments(parser)
    kept: Namespace = parser.parse_args(["--config", str(recorded), "--out", str(out), "--resume"])
    for key, option in given.items():
        if key not in ("config", "resume", "overwrite") and kept.get(key) != option:
            raise ValueError(
                f"{key} is {kept.get(key)} in {recorded} and cannot become {option}: leave it out, or start a new --out"
            )
    return kept


def _recipe(options: Namespace) -> Recipe:
    parser = _Parser()
    parser.add_class_arguments(Recipe, "recipe")
    fields = {name: options[name] for name in ("data", "out", "tokenizer", "model", "memory", "training")}
    for name in ("model", "memory", "training"):
        if not isinstance(fields[name], Namespace):
            raise ValueError(f"{name} is {fields[name]!r} but must hold options, as `pkmem train --print_config` shows")
    recipe: Recipe = parser.instantiate(Namespace(recipe=Namespace(**fields))).recipe
    return recipe


def _eval_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--data", type=str, default="python", help="text, as in `pkmem train --data`")
    parser.add_argument("--split", type=str, default="validation", help="train or validation")
    parser.add_argument("--max_tokens", type=int | None, default=None, help="evaluate about this many tokens")
    parser.add_argument(
        "--context_tokens", type=int | None, default=None, help="tokens a block; the model's if left out"
    )
    parser.add_argument("--speed", action=ActionYesNo, default=False, help="measure prefill and decode as well")


def _eval(options: Namespace) -> None:
    import json

    from pkmem.layer.values import count_parameters
    from pkmem.lm.evaluation import evaluate
    from pkmem.lm.huggingface import context_tokens
    from pkmem.lm.recall import measure_recall
    from pkmem.lm.speed import measure_speed
    from pkmem.text import TokenBlocks, tokenize
    from pkmem.text.facts import SYNTHETIC, Facts
    from pkmem.training.saved import load_saved

    model, tokenizer = load_saved(Path(options.model))
    longest = context_tokens(model)
    context = longest if options.context_tokens is None else options.context_tokens
    if not 2 <= context <= longest:
        raise ValueError(f"context_tokens is {context} but must be in [2, {longest}], the model's")
    file = tokenize(options.data, options.split, tokenizer)
    if file.num_skipped:
        print(f"skipped {file.num_skipped} files or lines that are not readable text", file=sys.stderr)
    figures = count_parameters(model) | evaluate(
        model,
        TokenBlocks(file, context),
        file.bytes_per_token,
        batch_sequences=max(1, min(8, 8192 // context)),
        max_tokens=options.max_tokens,
        progress=True,
    )
    if options.data.startswith(SYNTHETIC):
        figures |= measure_recall(model, tokenizer, Facts.named(options.data), progress=True)
    if options.speed:
        figures |= measure_speed({"model": model}, context)["model"]
    print(json.dumps(figures, indent=2))


def _generate_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--prompt", type=str, default="def ", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--top_k", type=int, default=50, help="draw among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def _generate(options: Namespace) -> None:
    from transformers import TextStreamer, set_seed

    from pkmem.lm.huggingface import context_tokens
    from pkmem.training.saved import load_saved

    if options.max_new_tokens < 1 or options.temperature < 0 or options.top_k < 1:
        raise ValueError("max_new_tokens and top_k must be >= 1, temperature >= 0")
    model, tokenizer = load_saved(Path(options.model))
    set_seed(options.seed)
    prompt = options.prompt or tokenizer.bos_token or tokenizer.eos_token
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    context = context_tokens(model)
    room = context - inputs["input_ids"].shape[1]
    if room < 1:
        raise ValueError(f"the prompt has {context - room} tokens but the model's context is {context}: shorten it")
    draws = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    model.generate(
        **inputs,
        max_new_tokens=min(options.max_new_tokens, room),
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(draws if options.temperature else {"do_sample": False}),
    )


def _inspect_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--data", type=str | None, default=None, help="read this text and say how the memories are used"
    )
    parser.add_argument("--max_tokens", type=int, default=100_000, help="tokens of it to read")
    parser.add_argument(
        "--hottest", type=int, default=5, help="slots to show per memory, with the tokens that read them"
    )


def _inspect(options: Namespace) -> None:
    from pkmem.lm.huggingface import context_tokens
    from pkmem.lm.inspection import describe_memories, describe_reads
    from pkmem.text import TokenBlocks, tokenize
    from pkmem.training.saved import load_saved

    if options.hottest < 0:
        raise ValueError(f"hottest is {options.hottest} but must be >= 0")
    model, tokenizer = load_saved(Path(options.model))
    print(describe_memories(model))
    if options.data is not None:
        blocks = TokenBlocks(tokenize(options.data, "validation", tokenizer), context_tokens(model))
        print(describe_reads(model, tokenizer, blocks, options.max_tokens, options.hottest))


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="runs/demo", help="where everything goes")
    parser.add_argument("--data", type=str, default="python", help="text to learn, as in `pkmem train --data`")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    parser.add_argument("--overwrite", action=ActionYesNo, default=False, help="replace OUT if it is there")


def _demo(options: Namespace) -> None:
    from pkmem.experiments.demo import demo

    demo(Path(options.out), options.overwrite, options.data, options.seed)


def _experiment_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "name",
        type=str,
        help="table1, speed, size, position, keys or heads of the paper; layers, scaling or facts beyond it; "
        "a file of configs/experiments each",
    )
    parser.add_argument("--scale", type=str, default="laptop", help="laptop, gpu or paper")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. SEEDS - 1 of each model")
    parser.add_argument(
        "--out", type=str, default="runs/experiments", help="where all families' results go, a file per run"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        type=str,
        help="some of the family's models alone, such as 4_layers 8_layers; their speed is not measured",
    )
    parser.add_argument("--data", type=str | None, default=None, help="text to learn instead of the family's")
    parser.add_argument(
        "--resume", action=ActionYesNo, default=False, help="continue half-trained runs; they start over otherwise"
    )
    parser.add_argument(
        "--dry_run", action=ActionYesNo, default=False, help="say what the runs cost, and their commands; train nothing"
    )


def _experiment(options: Namespace) -> None:
    from pkmem.experiments.family import load_family
    from pkmem.experiments.grid import describe, experiment

    family = load_family(options.name, options.scale)
    if options.cells:
        family = family.only(options.cells)
    if options.dry_run:
        print(describe(family, options.seeds, options.data))
        return
    left = experiment(family, Path(options.out), options.seeds, options.data, options.resume)
    for reason in [*left["unused"], *left["waiting"]]:
        print(reason, file=sys.stderr)
    if left["failed"]:
        raise ValueError(f"{len(left['failed'])} runs have no result; run this again for {left['failed'][0]}")
    if left["elsewhere"]:
        raise ValueError(f"another process is training {left['elsewhere'][0]}: run this again when it has ended")
    if left["unused"] or left["waiting"]:
        raise ValueError("not all runs have a usable result: see above")
    print(f"all results are in {Path(options.out) / family.name / family.scale}; next: pkmem report {options.out}")


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=str, help="directories with results, such as an experiment's --out")
    parser.add_argument("--out", type=str, default="runs/report", help="the page's directory")


def _report(options: Namespace) -> None:
    from pkmem.experiments.report import write_report

    page = write_report([Path(folder) for folder in options.folders], Path(options.out))
    print(f"{page}\n{page.with_suffix('.md')}")


def _warmup_arguments(parser: ArgumentParser) -> None:
    """None."""


def _warmup(options: Namespace) -> None:
    from importlib.util import find_spec

    if find_spec("numba") is None:
        raise ValueError("numba is not installed, so there is nothing to compile: pip install 'pkmem[cpu]'")
    from pkmem.ops import cpu

    print(f"{cpu.warmup()} CPU kernels are compiled")


def _bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", default=[], help="questions to measure, such as layer_forward; all if none")
    parser.add_argument("--smoke", action=ActionYesNo, default=False, help="tiny sizes, to see that everything runs")


def _bench(options: Namespace) -> None:
    import subprocess

    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.is_dir():
        raise ValueError("the benchmarks are in pkmem's source tree, not in its wheel: run this from a checkout")
    unknown = sorted(set(options.names) - set(_BENCHMARKS))
    if unknown:
        raise ValueError(f"no benchmark is called {unknown[0]!r}: they are {', '.join(_BENCHMARKS)}")
    for name in options.names or _BENCHMARKS:
        command = [sys.executable, str(folder / f"{name}.py"), *(["--smoke"] if options.smoke else [])]
        if subprocess.run(command).returncode:
            raise ValueError(f"benchmark {name} failed: its output above says why")


def _model_argument(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="a run directory, one of its checkpoints, or any saved model directory")


_ARGUMENTS = {
    "train": (
        _train_arguments,
        "Train a language model, with memories where model.memory_layers says. "
        "Example: pkmem train --config configs/tiny.yaml --data python --out runs/x memory.knn=16",
    ),
    "eval": (
        _eval_arguments,
        "Perplexity, bits per byte and use of the memories on held-out text. Example: pkmem eval runs/x --data python",
    ),
    "generate": (_generate_arguments, "Continue a text. Example: pkmem generate runs/x --prompt 'def main'"),
    "inspect": (
        _inspect_arguments,
        "Look inside the memories: sizes, values, who reads what. Example: pkmem inspect runs/x --data python",
    ),
    "demo": (
        _demo_arguments,
        "The paper's claim at laptop size, in about ten minutes: L layers with a memory against L and 2L without. "
        "Example: pkmem demo --out runs/demo",
    ),
    "experiment": (
        _experiment_arguments,
        "Run one of the paper's tables or figures, model by model; finished runs are kept and skipped. "
        "Example: pkmem experiment table1 --scale laptop --seeds 3, after a look with --dry_run",
    ),
    "report": (
        _report_arguments,
        "A page with the results of experiments beside the paper's, from all machines they ran on. "
        "Example: pkmem report runs/experiments --out runs/report",
    ),
    "warmup": (
        _warmup_arguments,
        "Compile the CPU kernels ahead of their first use. Once per machine and version. Example: pkmem warmup",
    ),
    "bench": (
        _bench_arguments,
        "Measure this machine: pkmem against plain torch and its peers, interleaved, beside the floor. "
        "Example: pkmem bench layer_forward",
    ),
}
_BENCHMARKS = ("operators", "layer_forward", "training_step", "growth", "peak_memory", "billion", "demo_backends")
_VERBS = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "inspect": _inspect,
    "demo": _demo,
    "experiment": _experiment,
    "report": _report,
    "warmup": _warmup,
    "bench": _bench,
}


# Errors -------------------------------------------------------------------------------------------------


def _explain(message: str, verb: str | None) -> str:
    """One line; an unknown key comes with the nearest one that the verb has."""
    line = " ".join(message.split())
    mistyped = re.match(r'Parser key "([\w.]+)": (.+?)(?:\. Got| Errors: .* Given) value: (.*)', line)
    if mistyped:
        key, expected, given = mistyped.groups()
        choices, types = re.search(r"Literal\[(.+)\]", expected), re.findall(r"<class '(\w+)'>", expected)
        allowed = f"one of {choices[1]}" if choices else f"of type {' or '.join(types)}".replace("NoneType", "null")
        return f"{key} is {given} but must be {allowed}"
    found = re.search(r"[Uu]nrecognized arguments: --([^= ]+)|'(\w+)' does not accept option '([\w.]+)'", line)
    if found is None:
        return line
    unknown = found[1] or found[3]
    near = difflib.get_close_matches(unknown, _known_keys(verb or found[2]), 1, 0.5)
    return f"unknown option {unknown!r}" + (f": did you mean {near[0]!r}?" if near else "; see --help")


def _known_keys(verb: str | None) -> list[str]:
    parser = _Parser()
    if verb in _ARGUMENTS:
        _ARGUMENTS[verb][0](parser)
    return [action.dest for action in parser._actions]


def _fail(message: str) -> NoReturn:
    print(f"pkmem: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_USER_ERROR)


if __name__ == "__main__":
    main()
