"""The command line: a verb's arguments stand here, its work where it belongs, imported when the verb runs."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from pkmem.editing import verbs as editing
from pkmem.experiments.verb import experiment, experiment_arguments
from pkmem.planning.verb import plan, plan_arguments
from pkmem.training.freed_memory import keep_freed_memory
from pkmem.training.reading import Parser, as_flags, given_recipe, recorded_recipe

_CALM = {  # read when the libraries are imported: pkmem says itself what a user needs to know
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # or DDP says in each process that no parameter is unused
}


class Verb(NamedTuple):
    """A word of the command line.

    Args:
        add_arguments: adds what the verb takes to a parser.
        run: does it, given the options; its docstring says what, with an example.
    """

    add_arguments: Callable[[Parser], None]
    run: Callable[[Namespace], None]

    @property
    def text(self) -> str:
        """What the verb does, and an example."""
        return " ".join(str(self.run.__doc__).split())

    def parser(self) -> Parser:
        """A parser of the verb's arguments."""
        made = Parser(description=self.text)
        self.add_arguments(made)
        return made


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb; exits with 2 where the user can mend what went wrong, 130 after Ctrl-C, 141 where nobody reads on."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a console has no letter for is a question mark there
    if arguments[:1] in (["train"], ["plan"], ["retrofit"]):
        arguments = as_flags(arguments)
    try:
        parser = build_parser()
        chosen = parser.parse_args(arguments or ["--help"])
        options = chosen[chosen.subcommand]
        if chosen.subcommand == "train" and options.resume:
            options.given = parser.parse_args(arguments, defaults=False).train
        for name, setting in _CALM.items():
            os.environ.setdefault(name, setting)
        keep_freed_memory()
        VERBS[chosen.subcommand].run(options)
        sys.stdout.flush()
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():  # as in `pkmem inspect runs/x | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at its exit
            sys.exit(128 + 13)  # what a shell gives for SIGPIPE
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
    except KeyboardInterrupt as stop:
        print(f"pkmem: {str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _reader_has_gone() -> bool:
    """Whether it is the standard output that nobody reads, and not another pipe that broke."""
    if sys.platform == "win32":  # has no poll
        return False
    output = select.poll()
    output.register(1, 0)
    return bool(output.poll(0))


def _fail(message: str) -> NoReturn:
    print(f"pkmem: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def build_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(prog="pkmem", description="Language models with product-key memories (Lample et al. 2019).")
    verbs = parser.add_subcommands(title="verbs", metavar="VERB")
    for name, verb in VERBS.items():
        verbs.add_subcommand(name, verb.parser(), help=verb.text.split(". ")[0].rstrip("."))
    return parser


def _train_arguments(parser: Parser) -> None:
    parser.add_recipe()
    _flag(parser, "resume", "go on from the newest checkpoint of OUT")
    _flag(parser, "overwrite", "replace OUT if it is there")


def _train(options: Namespace) -> None:
    """Train a language model, with memories where model.memory_layers says.

    Example: pkmem train --config configs/tiny.yaml --data python --out runs/x memory.knn=16
    """
    from pkmem.training.processes import restarts_by_itself
    from pkmem.training.run import train

    resumes = options.resume and ((Path(options.out) / "config.yaml").exists() or not restarts_by_itself())
    recipe = recorded_recipe(Path(options.out), options.given) if resumes else given_recipe(options)
    summary = train(recipe, resume=options.resume, overwrite=options.overwrite)
    if os.environ.get("RANK", "0") == "0":  # torchrun: the first process speaks
        for name, figure in summary.items():
            print(f"{name:28} {figure:,.4f}" if isinstance(figure, float) else f"{name:28} {figure:,}")
        print(f"model: {recipe.out / 'model'}   metrics: {recipe.out / 'metrics.jsonl'}")


def _eval_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--data", type=str, default="python", help="text, as in `pkmem train --data`")
    parser.add_argument("--split", type=str, default="validation", help="train or validation")
    parser.add_argument("--max_tokens", type=int | None, default=None, help="evaluate about this many tokens")
    parser.add_argument("--context_tokens", type=int | None, default=None, help="tokens a block, else the model's")
    _values_argument(parser)
    _flag(parser, "speed", "measure prefill and decode as well")


def _eval(options: Namespace) -> None:
    """Perplexity, bits per byte and use of the memories on held-out text. Example: pkmem eval runs/x --data python"""
    import json

    from pkmem.training.saved import evaluate_saved

    figures = evaluate_saved(
        Path(options.model),
        options.data,
        options.split,
        options.max_tokens,
        options.context_tokens,
        options.speed,
        options["values"],  # .values is a method
    )
    print(json.dumps(figures, indent=2))


def _generate_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--prompt", type=str, default="def ", help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token every time")
    parser.add_argument("--top_k", type=int, default=50, help="draw among this many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    _values_argument(parser)


def _generate(options: Namespace) -> None:
    """Continue a text. Example: pkmem generate runs/x --prompt 'def main'"""
    from pkmem.training.saved import continue_text

    continue_text(
        Path(options.model),
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_k,
        options.seed,
        options["values"],
    )


def _inspect_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument("--data", type=str | None, default=None, help="a text to read, to say how they are used")
    parser.add_argument("--max_tokens", type=int, default=100_000, help="tokens of it to read")
    parser.add_argument("--hottest", type=int, default=5, help="slots to show per memory, and who reads them")
    parser.add_argument("--page", type=str | None, default=None, help="HTML file to write, to look inside in a browser")
    parser.add_argument("--compare", type=str | None, default=None, help="another checkpoint, for the page to compare")


def _inspect(options: Namespace) -> None:
    """Look inside the memories: sizes, values, who reads what. Example: pkmem inspect runs/x --data python --page x.html"""
    from pkmem.inspecting.saved import inspect_saved

    page, compare = (given and Path(given) for given in (options.page, options.compare))
    print(inspect_saved(Path(options.model), options.data, options.max_tokens, options.hottest, page, compare))


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="a run directory")
    parser.add_argument("--out", type=str | None, default=None, help="directory to make, else RUN/model-step-N")
    parser.add_argument("--step", type=int | None, default=None, help="of the checkpoint, else the newest valid one")
    _flag(parser, "overwrite", "replace OUT if it is there")


def _export(options: Namespace) -> None:
    """Write the Hugging Face directory of a checkpoint, from any number of processes. Example: pkmem export runs/x"""
    from pkmem.training.export import export_run

    print(export_run(Path(options.run), options.out and Path(options.out), options.step, options.overwrite))


def _convert_arguments(parser: ArgumentParser) -> None:
    _model_argument(parser)
    parser.add_argument(
        "--values",
        type=Literal["bf16", "int8", "int4", "same"],
        required=True,
        help="how numbers are stored (in few bits with a scale a row); same: as they are, laid out for --values mmap",
    )
    parser.add_argument("--out", type=str, required=True, help="directory to make")


def _convert(options: Namespace) -> None:
    """Store the value tables in few bits, in a file of their own, for inference.

    Example: pkmem convert runs/x --values int8 --out runs/x8
    """
    from pkmem.training.conversion import convert_saved

    print(convert_saved(Path(options.model), Path(options.out), options["values"]))  # .values is a method


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="runs/demo", help="where everything goes")
    parser.add_argument("--data", type=str, default="python", help="text to learn, as in `pkmem train --data`")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order")
    _flag(parser, "overwrite", "replace OUT if it is there")


def _demo(options: Namespace) -> None:
    """The paper's claim at laptop size, in about ten minutes: L layers with a memory against L and 2L without.

    Example: pkmem demo --out runs/demo
    """
    from pkmem.experiments.demo import demo

    demo(Path(options.out), options.overwrite, options.data, options.seed)


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=str, help="directories with results, such as an experiment's --out")
    parser.add_argument("--out", type=str, default="runs/report", help="the page's directory")


def _report(options: Namespace) -> None:
    """A page of experiments' results beside the paper's, from all machines. Example: pkmem report runs/experiments"""
    from pkmem.experiments.report import write_report

    page = write_report([Path(folder) for folder in options.folders], Path(options.out))
    print(f"{page}\n{page.with_suffix('.md')}")


def _warmup_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", type=str | None, default=None, help="a saved model whose tables are to be mapped"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of each table to read into memory, in (0, 1]")


def _warmup(options: Namespace) -> None:
    """Compile the CPU kernels ahead of their first use, once per machine and version; and read a model's tables ahead.

    Example: pkmem warmup runs/x
    """
    from pkmem.ops.backends import backend_module

    backend_module("cpu")  # says what it needs where that is missing
    from pkmem.ops import cpu

    print(f"{cpu.warmup()} CPU kernels are compiled")
    if options.model is not None:
        from pkmem.training.reading_ahead import read_tables_ahead

        print(read_tables_ahead(Path(options.model), options.share))


def _doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str | None, default=None, help="one to examine, such as cuda:0; else all")
    _flag(parser, "full", "tables past 2^31 elements, too")


def _doctor(options: Namespace) -> None:
    """Say what pkmem runs on here, check every backend, and switch on the kernels of a GPU. Example: pkmem doctor"""
    from pkmem.doctor.report import visit

    sys.exit(0 if visit(options.full, options.device) else 1)


def _bench_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", default=[], help="questions to measure, such as layer_forward; all if none")
    _flag(parser, "smoke", "tiny sizes, to see that everything runs")


def _bench(options: Namespace) -> None:
    """Measure this machine: pkmem against plain torch and peers, beside the floor. Example: pkmem bench layer_forward"""
    from pkmem.experiments.benchmarks import run_benchmarks

    run_benchmarks(options.names, options.smoke)


def _flag(parser: ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(f"--{name}", action=ActionYesNo, default=False, help=text)


def _values_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--values",
        type=Literal["bf16", "int8", "int4", "mmap"] | None,
        default=None,
        help="how the value tables are kept: in few bits, or mmap, in their file, read row by row; else as saved",
    )


def _model_argument(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="a run directory, one of its checkpoints, or any saved model directory")


VERBS = {
    "plan": Verb(plan_arguments, plan),
    "train": Verb(_train_arguments, _train),
    "eval": Verb(_eval_arguments, _eval),
    "generate": Verb(_generate_arguments, _generate),
    "inspect": Verb(_inspect_arguments, _inspect),
    "export": Verb(_export_arguments, _export),
    "convert": Verb(_convert_arguments, _convert),
    "demo": Verb(_demo_arguments, _demo),
    "experiment": Verb(experiment_arguments, experiment),
    "report": Verb(_report_arguments, _report),
    "warmup": Verb(_warmup_arguments, _warmup),
    "retrofit": Verb(editing.retrofit_arguments, editing.retrofit),
    "learn": Verb(editing.learn_arguments, editing.learn),
    "apply": Verb(editing.apply_arguments, editing.apply),
    "forget": Verb(editing.forget_arguments, editing.forget),
    "edits": Verb(editing.edits_arguments, editing.edits),
    "doctor": Verb(_doctor_arguments, _doctor),
    "bench": Verb(_bench_arguments, _bench),
}


if __name__ == "__main__":
    main()
