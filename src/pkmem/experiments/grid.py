"""An experiment family, run: every model in a process of its own, every finished one a file of its own.

OUT/FAMILY/SCALE/CELL__RATE__seedN.json   a finished run: recipe, figures, curve, machine, command
OUT/FAMILY/SCALE/speed__N.json            the speeds of all models, measured in turns
OUT/FAMILY/SCALE/runs/                    what is being trained; deleted run by run
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from pkmem.experiments.costs import costs
from pkmem.experiments.environment import environment
from pkmem.experiments.family import Family, Run, config_folder
from pkmem.experiments.results import difference, find_results, save_result, save_speeds, standing
from pkmem.files.documents import load_json
from pkmem.lm.build import build_model
from pkmem.lm.speed import measure_speed
from pkmem.text import read_documents
from pkmem.training.checkpoint import latest_checkpoint
from pkmem.training.journal import read_metrics
from pkmem.training.prepare import prepare_text
from pkmem.training.reading import read_recipe, read_yaml


class RunFailedError(ValueError):
    """A run ended without a result; the others go on."""


class TrainedElsewhereError(RunFailedError):
    """Another process has the run."""


def experiment(
    family: Family, out: Path, seeds: int = 1, data: str | None = None, resume: bool = False
) -> dict[str, list[str]]:
    """Runs what a family still lacks, one model at a time.

    A run that fails or is killed costs that run alone. Copying result files from another machine's OUT counts as
    having run them here.

    Args:
        family: the models.
        out: the directory of all families' results.
        seeds: seeds 0 .. seeds - 1 of each model, and as many measurements of the speed, >= 1.
        data: what to learn instead of the family's.
        resume: continue half-trained runs from their checkpoints; otherwise they start over.

    Returns:
        what is left: `failed` (runs, and why), `elsewhere` (runs that another process was training), `waiting` (runs
        that need one of those), `unused` (files that are there but of another recipe).

    Raises:
        ValueError: `seeds` is below 1, or the system is Windows and the family trains.
        KeyboardInterrupt: ended by Ctrl-C; the run in progress left a checkpoint.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds} but must be >= 1")
    folder = out / family.name / family.scale
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    elsewhere: list[str] = []
    if family.measures_speed:
        for number in range(seeds):
            _measure_unless_there(folder / f"speed__{number}.json", family, data)
    if not family.trains:
        return {"failed": [], "elsewhere": [], "waiting": [], "unused": []}
    now = standing(family, find_results(folder)[0], seeds, data)
    with tqdm(total=num_runs(family, seeds), initial=len(now.valid), desc=f"{family.name} {family.scale}") as bar:
        while run := next((run for run in now.missing if run.name not in [*failed, *elsewhere]), None):
            bar.set_postfix_str(run.name)
            try:
                tqdm.write(_train(family, run, folder, resume))
            except TrainedElsewhereError:
                elsewhere.append(run.name)
            except RunFailedError as error:
                failed[run.name] = str(error)
                tqdm.write(f"{run.name}: {error}", file=sys.stderr)
            now = standing(family, find_results(folder)[0], seeds, data)
            bar.n = len(now.valid)  # those of another process on the same folder too
            bar.refresh()
    return {
        "failed": [f"{name}: {reason}" for name, reason in failed.items()],
        "elsewhere": [run.name for run in now.missing if run.name in elsewhere],
        "waiting": now.waiting,
        "unused": [f"{file} {why}: move it away, or choose another --out" for file, why in now.unused.items()],
    }


def require_complete(left: dict[str, list[str]]) -> None:
    """Says what `experiment` left.

    Raises:
        ValueError: a run has no usable result; the message says what to do.
    """
    for reason in [*left["unused"], *left["waiting"]]:
        print(reason, file=sys.stderr)
    if left["failed"]:
        raise ValueError(f"{len(left['failed'])} runs have no result; run this again for {left['failed'][0]}")
    if left["elsewhere"]:
        raise ValueError(f"another process is training {left['elsewhere'][0]}: run this again when it has ended")
    if left["unused"] or left["waiting"]:
        raise ValueError("not all runs have a usable result: see above")


def num_runs(family: Family, seeds: int) -> int:
    """Runs of a family in all: at seed 0 all rates, at each other seed the best."""
    return sum(len(cell.rates) + seeds - 1 for cell in family.cells.values())


def train_command(family: Family, run: Run, base: Path | str, out: Path | str) -> list[str]:
    """The arguments that train a run: of `pkmem`, or of `pkmem.experiments.hashed_run` where it has hashed tables.

    Args:
        family, run: which.
        base: where the family's base recipe is.
        out: the run directory.
    """
    options = [
        f"{name}={setting if isinstance(setting, str) else json.dumps(setting)}"
        for name, setting in (family.overrides | run.settings).items()
    ]
    verb = ["--hashed", json.dumps(run.hashed)] if run.hashed else ["train"]
    return [*verb, "--config", str(base), "--out", str(out), *options]


def shown_command(family: Family, run: Run) -> str:
    """What a user types to train a run alone."""
    folder = config_folder()
    base = Path("configs") / family.base.relative_to(folder) if family.base.is_relative_to(folder) else family.base
    program = ["torchrun", *_torchrun_options(family, run)]
    if family.processes == 1:
        program = ["python", "-m", _program(run)] if run.hashed else ["pkmem"]
    return shlex.join([*program, *train_command(family, run, base, f"runs/{run.name}")])


def _torchrun_options(family: Family, run: Run) -> list[str]:
    return ["--standalone", "--nproc_per_node", str(family.processes), "-m", _program(run)]


def _program(run: Run) -> str:
    return "pkmem.experiments.hashed_run" if run.hashed else "pkmem"


def _train(family: Family, run: Run, folder: Path, resume: bool) -> str:
    """Trains one model in a process of its own and writes its result; returns a line about it."""
    file, out = folder / f"{run.name}.json", folder / "runs" / run.name
    lock = folder / "runs" / f"{run.name}.lock"
    with _locked(lock) as handle:
        if file.exists():
            raise RunFailedError(f"{file} is there but damaged: move it away")
        place = environment() | {"command": shown_command(family, run)}  # before: a commit may follow meanwhile
        if not _is_finished(out, run):
            _start(family, run, out, resume, handle)
        summary = load_json(out / "summary.json")
        curve = [record for record in read_metrics(out) if record["kind"] == "held_out"]
        save_result(file, family, run, {"summary": summary, "held_out": curve, "environment": place})
        shutil.rmtree(out)
        _log_file(out).unlink(missing_ok=True)
        lock.unlink()
    return (
        f"{run.name}: {summary['bits_per_byte']:.4f} bits per byte, perplexity {summary['perplexity']:.2f}, "
        f"{summary['train_seconds']:,.0f} s"
    )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[int]:
    """Holds a run; its process inherits the hold, so that it lasts should this process be killed.

    Raises:
        TrainedElsewhereError: another process has it.
        ValueError: the system is Windows, or the disk locks no files.
    """
    try:
        import fcntl
    except ImportError:
        raise ValueError("pkmem experiment locks its runs as Windows cannot: use Linux, macOS or WSL") from None
    with file.open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainedElsewhereError(file.stem) from None
        except OSError as error:  # as on Lustre without its mount option `flock`
            raise ValueError(
                f"{file.parent} is on a disk that locks no files ({error.strerror}): choose another --out"
            ) from error
        yield stream.fileno()


def _is_finished(out: Path, run: Run) -> bool:
    """Whether the run's process came to its end without us."""
    return (out / "summary.json").exists() and _is_of(out, run)


def _is_of(out: Path, run: Run) -> bool:
    config = out / "config.yaml"
    return config.exists() and difference(read_recipe(read_yaml(config)), run.recipe) is None


def _start(family: Family, run: Run, out: Path, resume: bool, lock: int) -> None:
    """Runs the process that trains to its end.

    Raises:
        RunFailedError: it failed or was killed.
        KeyboardInterrupt: by Ctrl-C, after the process has written its checkpoint.
    """
    go_on = resume and latest_checkpoint(out) is not None and _is_of(out, run)
    if not go_on:
        shutil.rmtree(out, ignore_errors=True)
    program = [_program(run)] if family.processes == 1 else ["torch.distributed.run", *_torchrun_options(family, run)]
    command = [*program, *train_command(family, run, family.base, out), *(["--resume"] if go_on else [])]
    with _log_file(out).open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=log, stderr=log, pass_fds=[lock], start_new_session=True
        )
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the child would be left alone
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)  # its session is its own: it was not told yet
            child.wait()
            raise KeyboardInterrupt(f"stopped in {run.name}; continue with --resume") from None
        finally:
            signal.signal(signal.SIGTERM, previous)
    if code < 0:
        raise RunFailedError(f"killed by {signal.Signals(-code).name}; run this again, with --resume to go on")
    if code > 0:
        raise RunFailedError(_last_line(_log_file(out)))
    assert _is_of(out, run), "the command line and the family read a recipe differently"


def _log_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "ended without a word").split("\r")[-1]


def _measure_unless_there(file: Path, family: Family, data: str | None) -> None:
    if file.exists():
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its memory is given back
        models = pool.submit(measure_family, family, data).result()
    save_speeds(file, family, models, environment())
    for name, speeds in models.items():
        prefill, decode, words = (
            speeds[f"{what}_per_s"] for what in ("prefill_tokens", "decode_tokens", "prefill_words")
        )
        print(f"{name}: {prefill:,.0f} tokens/s in prefill, {decode:,.0f} in decode, {words:,.0f} words/s")


def measure_family(family: Family, data: str | None = None) -> dict[str, dict[str, float]]:
    """Inference speed of a family's models, in turns; freshly drawn ones, since it does not depend on the weights.

    Returns:
        per cell prefill_tokens_per_s, decode_tokens_per_s and prefill_words_per_s, by the words (between blanks)
        of the held-out text.
    """
    recipes = {
        cell.name: family.run(cell, cell.rates[0], data=data).recipe
        for cell in family.cells.values()
        if cell.like is None  # the same model, trained for another time
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {}
    for name, recipe in recipes.items():
        dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        models[name] = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0).to(device, dtype)
    first = next(iter(recipes.values()))
    _, _, held_out = prepare_text(first, resume=False, progress=False)
    words_per_token = sum(len(text.split()) for text in read_documents(first.data, "validation")) / held_out.num_tokens
    return {
        name: speeds | {"prefill_words_per_s": speeds["prefill_tokens_per_s"] * words_per_token}
        for name, speeds in measure_speed(models, first.model.context_tokens).items()
    }


def describe(family: Family, seeds: int = 1, data: str | None = None) -> str:
    """What a family's runs would cost, and their commands; nothing is trained."""
    machine = family.machine
    lines = [
        f"{family.title} ({family.paper}), {family.scale}: {family.about}",
        f"hours of one {machine.name}, {machine.peak_tflops:g} TFLOP/s at {machine.utilisation:.0%} utilisation",
        "",
        f"{'cell':32} {'dense':>8} {'memory':>8} {'FLOP':>9} {'table':>9} {'moments':>9} {'hours':>9} {'runs':>5}",
    ]
    total = 0.0
    commands = []
    for cell in family.cells.values():
        run = family.run(cell, cell.rates[0], data=data)
        cost, count = costs(run.recipe, run.hashed), (len(cell.rates) + seeds - 1) * family.trains
        hours = cost.hours(machine)
        total += hours * count
        lines.append(
            f"{cell.name:32} {tqdm.format_sizeof(cost.dense_params):>8} {tqdm.format_sizeof(cost.memory_params):>8} "
            f"{cost.training_flops:>9.1e} {tqdm.format_sizeof(cost.table_bytes):>8}B {tqdm.format_sizeof(cost.moment_bytes):>8}B "
            f"{hours:>9.3g} {count:>5}"
        )
        if cell.like is None:
            commands.append(shown_command(family, run))
        else:
            commands.append(f"# {cell.name}: at most {cell.like}, for the seconds of {cell.match_seconds_of}")
    return "\n".join(
        [*lines, f"{'in all':81} {total:>9.3g} {num_runs(family, seeds) * family.trains:>5}", "", *commands]
    )
