"""Training: what a run leaves behind, that a resumed run is the same run, and that nothing bad is trained on."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from pkmem.files.documents import load_json, save_json
from pkmem.layer.counting import count_parameters
from pkmem.lm.recall import measure_recall
from pkmem.text.synthetic import SyntheticFacts
from pkmem.training import prepare
from pkmem.training.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint
from pkmem.training.journal import read_metrics
from pkmem.training.recipe import Recipe
from pkmem.training.run import sequences_per_process, train
from pkmem.training.saved import load_saved
from pkmem.training.trainer import MemoryTrainer, NonFiniteLossError
from runs import assert_same_run, before_update, ctrl_c, losses, tensors_of
from tiny import TRAINING, tiny

pytest_plugins = "tiny"

USAGE = {f"memory_0/{name}" for name in ("usage", "top1_usage", "kl", "dead_slots", "hottest_share")}


# What a run leaves ------------------------------------------------------------------------------------------


def test_run_directory_holds_recipe_tokenizer_metrics_checkpoints_model_and_summary(run: Path, text: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "tokenizer", "metrics.jsonl", "tensorboard", "checkpoints", "model", "summary.json")
    }
    assert yaml.safe_load((run / "config.yaml").read_text()) == tiny(text, run).to_dict()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-9", "step-10"}
    verify_checkpoint(run / "checkpoints" / "step-10")
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    expected = tensors_of(run / "checkpoints" / "step-10")
    saved = load_file(run / "model" / "model.safetensors")
    assert {name for name in expected if name.startswith("model.")} == {f"model.{name}" for name in saved}
    assert all(torch.equal(saved[key], expected[f"model.{key}"]) for key in saved)


def test_a_dense_model_has_no_memory_figures(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run", model={"memory_layers": []}, training={"num_tokens": 128})
    summary = train(recipe, progress=False)
    assert summary["memory_params"] == 0
    for names in (summary, *read_metrics(recipe.out)):
        assert not [name for name in names if name.startswith("memory_0/") or name == "value_lr"]


def test_summary_is_that_of_the_saved_model(run: Path) -> None:
    summary = load_json(run / "summary.json")
    model, _ = load_saved(run)
    assert {name: summary[name] for name in ("dense_params", "memory_params")} == count_parameters(model)
    assert summary["train_tokens"] == 1280
    assert summary["train_tokens_per_s"] == pytest.approx(1280 / summary["train_seconds"])
    assert summary.keys() > USAGE


def test_of_facts_the_summary_has_what_the_model_recalls(text: Path, tmp_path: Path) -> None:
    facts = SyntheticFacts(50)
    recipe = tiny(
        Path("synthetic:facts:50"), tmp_path / "run", model={"context_tokens": 64}, training={"num_tokens": 128}
    )
    summary = train(recipe, progress=False)
    recalled = measure_recall(*load_saved(recipe.out), facts)
    assert {"recall", "bits_per_fact", "bits_per_param"} <= recalled.keys()
    assert {name: summary[name] for name in recalled} == recalled
    assert load_json(recipe.out / "summary.json") == summary


def test_a_context_too_short_for_a_fact_costs_the_recall_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(
        Path("synthetic:facts:50"), tmp_path / "run", model={"context_tokens": 8}, training={"num_tokens": 128}
    )
    summary = train(recipe, progress=False)
    assert "recall" not in summary
    assert load_json(recipe.out / "summary.json") == summary
    assert "what it recalls was not measured: a prompt and its value take" in capsys.readouterr().err


def test_training_lowers_the_loss(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run", training={"num_tokens": 20 * 512, "batch_tokens": 512, "lr": 0.01})
    train(recipe, progress=False)
    held_out = [record["loss"] for record in read_metrics(recipe.out) if record["kind"] == "held_out"]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < held_out[0] - 0.5


def test_the_same_recipe_gives_the_same_run(run: Path, text: Path, tmp_path: Path) -> None:
    train(tiny(text, tmp_path / "again"), progress=False)
    assert_same_run(tmp_path / "again", run)
    train(tiny(text, tmp_path / "other", training={"seed": 1}), progress=False)
    assert losses(tmp_path / "other") != losses(run)


def test_micro_batches_do_not_change_the_update(text: Path, tmp_path: Path) -> None:
    for micro_batches in (1, 2):  # batch norm and dropout would differ by micro-batch
        recipe = tiny(
            text,
            tmp_path / str(micro_batches),
            model={"dropout": 0.0},
            memory={"query_norm": "layer", "query_dropout": 0.0},
            training={"micro_batches": micro_batches, "num_tokens": 512},
        )
        train(recipe, progress=False)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "12")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-4), key
    one_loss, two_loss = (read_metrics(tmp_path / name)[0]["loss"] for name in "12")
    assert one_loss == pytest.approx(two_loss, rel=1e-6)


def test_bf16_trains(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run", training={"precision": "bf16", "num_tokens": 512})
    assert train(recipe, progress=False)["loss"] == pytest.approx(math.log(300), abs=0.3)
    weights = load_file(recipe.out / "model" / "model.safetensors").values()
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float32}


def test_a_given_tokenizer_is_used(run: Path, text: Path, tmp_path: Path) -> None:
    recipe = replace(tiny(text, tmp_path / "run", model={"vocab_size": 400}), tokenizer=str(run / "tokenizer"))
    train(replace(recipe, training=replace(TRAINING, num_tokens=128)), progress=False)
    tokenizers = [AutoTokenizer.from_pretrained(folder / "tokenizer").get_vocab() for folder in (run, recipe.out)]
    assert tokenizers[0] == tokenizers[1]
    assert load_saved(recipe.out)[0].get_input_embeddings().num_embeddings == len(tokenizers[0])


# Resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 5, 9, 10])  # 4, 5 and 10 record something, 3, 6, 9 and 10 are checkpoints
def test_a_run_resumed_after_ctrl_c_is_the_uninterrupted_run(run: Path, text: Path, tmp_path: Path, step: int) -> None:
    recipe = tiny(text, tmp_path / "run")
    with before_update(step, ctrl_c), pytest.raises(KeyboardInterrupt, match=f"stopped at step {step}.*--resume"):
        train(recipe, progress=False)
    verify_checkpoint(recipe.out / "checkpoints" / f"step-{step}")
    assert not (recipe.out / "summary.json").exists()
    train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"value_grad": "dense"}},
        {"model": {"memory_layers": [0, 1], "share_values": True, "placement": "parallel"}},
        {"training": {"schedule": "inverse_sqrt", "value_schedule": "constant", "precision": "bf16"}},
        {"model": {"family": "llama"}, "memory": {"query_norm": "rms", "gate": True}},
        {"model": {"memory_layers": []}},
        {"training": {"async_save": True}},
        {"training": {"value_moments": "row"}},
        {"training": {"value_moments": "row_alone"}},
        {"training": {"value_moments": "row_adagrad"}},
    ],
    ids=[
        "dense gradient",
        "shared values",
        "schedules",
        "llama",
        "no memory",
        "saved in background",
        "row",
        "row alone",
        "row Adagrad",
    ],
)
def test_every_kind_of_run_resumes_bitwise(text: Path, tmp_path: Path, changes: dict) -> None:
    whole, stopped = (tiny(text, tmp_path / name, **changes) for name in ("whole", "stopped"))
    train(whole, progress=False)
    with before_update(5, ctrl_c), pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False)
    train(stopped, resume=True, progress=False)
    assert_same_run(stopped.out, whole.out)


@pytest.mark.linux
def test_a_run_resumed_after_kill_is_the_uninterrupted_run(run: Path, text: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from tiny import tiny
from pkmem.training.journal import Journal
from pkmem.training.run import train

def on_step_begin(self, args, state, control, **kwargs):
    begin(self, args, state, control, **kwargs)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

begin, Journal.on_step_begin = Journal.on_step_begin, on_step_begin
train(tiny(Path(sys.argv[1]), Path(sys.argv[2])), progress=False)
"""
    recipe = tiny(text, tmp_path / "run")
    command = [sys.executable, "-c", script, str(text), str(recipe.out)]
    same_threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums go by thread
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], env=same_threads, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [(r["kind"], r["step"]) for r in read_metrics(recipe.out)] == [("train", 4), ("held_out", 5)]
    checkpoint = latest_checkpoint(recipe.out)
    assert checkpoint == recipe.out / "checkpoints" / "step-3"
    train(recipe, resume=True, progress=False)  # what was recorded after step 3 is measured anew, once
    assert_same_run(recipe.out, run)
    events = EventAccumulator(str(recipe.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 10]


@pytest.mark.linux
def test_sigterm_leaves_a_checkpoint_too_even_beside_ctrl_c(text: Path, tmp_path: Path) -> None:
    def both(model: object) -> None:  # as where a scheduler ends a group of processes
        ctrl_c(model)
        signal.raise_signal(signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step, act in ((5, lambda _: signal.raise_signal(signal.SIGTERM)), (7, both)):
        recipe = tiny(text, tmp_path / f"run{step}")
        with before_update(step, act), pytest.raises(KeyboardInterrupt, match=f"stopped at step {step}.*--resume"):
            train(recipe, progress=False)
        assert latest_checkpoint(recipe.out) == recipe.out / "checkpoints" / f"step-{step}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_stops_at_once(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def twice(model: object) -> None:
        ctrl_c(model)
        ctrl_c(model)

    handler = signal.getsignal(signal.SIGINT)
    with before_update(5, twice), pytest.raises(KeyboardInterrupt) as caught:
        train(tiny(text, tmp_path / "run"), progress=False)
    assert str(caught.value) == ""
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-3"
    assert signal.getsignal(signal.SIGINT) is handler


def test_resuming_a_finished_run_changes_nothing(run: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run")
    shutil.copytree(run, recipe.out)
    shutil.rmtree(recipe.out / "model")
    summary = train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)
    assert summary == load_json(run / "summary.json")


def test_resuming_takes_the_newest_checkpoint_that_is_whole(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tiny(text, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from: start it without --resume"):
        train(recipe, resume=True, progress=False)
    assert not recipe.out.exists()
    shutil.copytree(run, recipe.out)
    for step, name in ((10, "shard-00001-of-00001.safetensors"), (9, "optimizer.json")):
        file = recipe.out / "checkpoints" / f"step-{step}" / name
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
    metrics = (recipe.out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"step-9/optimizer\.json.*delete .*step-9 and resume from an earlier"):
        train(recipe, resume=True, progress=False)
    assert (recipe.out / "metrics.jsonl").read_bytes() == metrics
    file.write_bytes(kept)
    capsys.readouterr()
    train(recipe, resume=True, progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"skipped step-10: .*step-10/shard-00001-of-00001\.safetensors: \d+ bytes instead of", line)
    assert_same_run(recipe.out, run)


def test_a_checkpoint_of_an_earlier_version_is_named_and_its_model_still_loads(
    run: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tiny(text, tmp_path / "run")
    shutil.copytree(run, recipe.out)
    shutil.rmtree(recipe.out / "checkpoints")
    old = shutil.copytree(run / "model", recipe.out / "checkpoints" / "step-9")
    save_json(old / "manifest.json", {"model.safetensors": {"size": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match=r"step-9 was made by an earlier version of pkmem and cannot be resumed"):
        train(recipe, resume=True, progress=False)
    load_saved(old)


# Several processes ------------------------------------------------------------------------------------------

WORKER = """
import faulthandler, json, os, signal, sys
from pathlib import Path

import torch

from pkmem.training.trainer import MemoryTrainer
from pkmem.training.run import train
from tiny import tiny

faulthandler.dump_traceback_later(120, exit=True)  # should they wait for each other for ever
text, folder, changes, sitting = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
rank, signals = int(os.environ["RANK"]), {5: signal.SIGINT, 8: signal.SIGKILL}
backward = MemoryTrainer.training_step

def training_step(self, model, inputs, *rest):
    out, step = Path(self.args.output_dir), self.state.global_step + 1
    if (sitting, out.name, rank) == ("first", "run", 1) and step in signals:
        signal.raise_signal(signals.pop(step))
    if (out.name, rank, step) == ("poisoned", 1, 2):
        self.model.get_input_embeddings().weight.data[:] = torch.nan
    if out.name == "run":
        with (folder / f"seen_by_{rank}.jsonl").open("a") as seen:
            print(json.dumps([step, rank, inputs["input_ids"].tolist()]), file=seen)
    return backward(self, model, inputs, *rest)

def ending(out):
    try:
        train(tiny(text, out, **changes))
    except (KeyboardInterrupt, ValueError) as error:
        return f"{type(error).__name__}: {error}"

MemoryTrainer.training_step = training_step
if sitting == "first":
    endings = [ending(folder / name) for name in ("run", "poisoned", "run")]
    (folder / f"endings_of_{rank}.json").write_text(json.dumps(endings))
for name in ("run",) if sitting == "first" else ("run", "alone_at_first"):
    train(tiny(text, folder / name, **changes), resume=True, progress=False)
"""


def by_step(seen: Iterable[tuple[int, Any, list[list[int]]]]) -> dict[int, list[list[int]]]:
    """The sequences of each update, those that a process saw again when it went on from a checkpoint once."""
    parts = {(step, rank, tuple(sequence)) for step, rank, batch in seen for sequence in batch}
    return {step: sorted(list(sequence) for at, _, sequence in parts if at == step) for step, *_ in parts}


def up_to_step_9(run: Path, copy: Path) -> None:
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-10")


@pytest.mark.slow  # four imports of everything, half a minute
def test_two_processes_train_what_one_trains(text: Path, tmp_path: Path) -> None:
    """Stopped by Ctrl-C in one of them, resumed, killed, resumed again; resumed on one, and two after one."""
    changes = {
        "model": {"dropout": 0.0},
        "memory": {"query_norm": "layer", "query_dropout": 0.0},
        "training": {"value_grad": "dense"},
    }
    alone, together = tiny(text, tmp_path / "alone", **changes), tmp_path / "run"
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        backward = MemoryTrainer.training_step

        def recording(self: MemoryTrainer, model: Any, inputs: Any, *rest: Any) -> Any:
            batches.append((self.state.global_step + 1, 0, inputs["input_ids"].tolist()))
            return backward(self, model, inputs, *rest)

        patch.setattr(MemoryTrainer, "training_step", recording)
        summary = train(alone, progress=False)
    up_to_step_9(alone.out, tmp_path / "alone_at_first")

    (tmp_path / "worker.py").write_text(WORKER)
    place = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "worker.py"), str(text), str(tmp_path), json.dumps(changes)]
    first, second = (
        subprocess.run([*command, sitting], env=place, capture_output=True, text=True, check=False)
        for sitting in ("first", "second")
    )
    assert first.returncode > 0
    assert "SIGKILL" in first.stderr
    assert second.returncode == 0, second.stderr

    seen = [json.loads(line) for file in tmp_path.glob("seen_by_*.jsonl") for line in file.read_text().splitlines()]
    assert {len(batch) for _, _, batch in seen} == {1}  # of the two sequences of a backward pass
    assert by_step(seen) == by_step(batches)

    up_to_step_9(together, tmp_path / "together_at_first")
    train(tiny(text, tmp_path / "together_at_first", **changes), resume=True, progress=False)
    for run in (together, tmp_path / "alone_at_first", tmp_path / "together_at_first"):
        for ours, theirs in zip(losses(run), losses(alone.out), strict=True):
            assert (*ours[:2], ours[3]) == (*theirs[:2], theirs[3])
            assert ours[2] == pytest.approx(theirs[2], rel=1e-4)
    shared = load_json(together / "summary.json")
    assert shared["loss"] == pytest.approx(summary["loss"], rel=1e-4)
    assert [shared[name] for name in ("train_tokens", "num_tokens")] == [summary["train_tokens"], summary["num_tokens"]]
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.out.iterdir()}
    events = EventAccumulator(str(together / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 10]

    for rank in range(2):
        stopped, poisoned, again = load_json(tmp_path / f"endings_of_{rank}.json")
        assert stopped == "KeyboardInterrupt: stopped at step 5; continue with --resume"
        assert poisoned.startswith("NonFiniteLossError: the loss is nan at step 2; nothing was updated with it")
        assert (
            again == f"ValueError: {together} already exists: choose another --out, or --overwrite it, or --resume it"
        )
    assert latest_checkpoint(tmp_path / "poisoned") is None
    assert first.stderr.count("training a byte-level BPE") == 2  # the first process, for two runs


# What is refused --------------------------------------------------------------------------------------------


def test_a_run_directory_is_never_overwritten_unasked(run: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run", training={"num_tokens": 128})
    recipe.out.mkdir()  # empty: nothing to lose
    train(recipe, progress=False)
    (recipe.out / "old").touch()
    with pytest.raises(ValueError, match="already exists: choose another --out, or --overwrite it, or --resume it"):
        train(recipe, progress=False)
    assert (recipe.out / "old").exists()
    train(recipe, overwrite=True, progress=False)
    assert not (recipe.out / "old").exists()
    assert [r["step"] for r in read_metrics(recipe.out)] == [1, 1]


@pytest.mark.case(
    "Environments", "overwrite a run whose folder is a link to another disk, or where a disk is mounted", "works", ""
)
@pytest.mark.case("Environments", "train into a link whose target was deleted", "works: the target is made anew", "")
def test_a_run_directory_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)  # which is not there yet
    tokenizer = SimpleNamespace(save_pretrained=Path.mkdir)
    recipe = tiny(tmp_path, link)
    prepare.make_run_directory(recipe, tokenizer)
    (disk / "old" / "folder").mkdir(parents=True)
    (disk / "kept").symlink_to(tmp_path)
    remove = os.rmdir

    def mounted(path: Path, **where: int) -> None:
        assert Path(path).name not in ("disk", "link"), "Device or resource busy"
        remove(path, **where)

    monkeypatch.setattr("os.rmdir", mounted)
    prepare.make_run_directory(recipe, tokenizer)
    assert {path.name for path in disk.iterdir()} == {"config.yaml", "tokenizer"}
    assert link.is_symlink()
    assert tmp_path.is_dir()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_overwrite_refuses_what_is_no_run(text: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "thesis"
    precious = out / "thesis.txt" if kind == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="is not a run directory"):
        train(tiny(text, out), overwrite=True, progress=False)
    assert precious.read_text() == "years of work"


def test_a_recipe_that_cannot_start_leaves_everything_as_it_was(run: Path, text: Path, tmp_path: Path) -> None:
    bad = [
        (tiny(tmp_path / "nowhere", tmp_path / "new"), "no such file or directory"),
        (tiny(text, tmp_path / "new", model={"family": "lama"}), "did you mean 'llama'"),
        (tiny(text, tmp_path / "new", model={"context_tokens": 8192}, training={"batch_tokens": 16384}), "more data"),
        (tiny(text, tmp_path / "new", memory={"value_dim": 8}), "leave value_dim out"),
    ]
    old = shutil.copytree(run, tmp_path / "old")
    for recipe, message in bad:
        with pytest.raises(ValueError, match=message):
            train(recipe, progress=False)
        assert not recipe.out.exists()
        with pytest.raises(ValueError, match=message):
            train(replace(recipe, out=old), overwrite=True, progress=False)
        assert_same_run(old, run)


def test_empty_data_is_refused(tmp_path: Path, text: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="no file to read there"):
        train(tiny(tmp_path / "data", tmp_path / "run"), progress=False)
    (tmp_path / "data" / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no text for the train split; give more documents"):
        train(tiny(tmp_path / "data", tmp_path / "run"), progress=False)


def test_a_file_that_is_no_text_is_skipped_and_counted(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = shutil.copytree(text, tmp_path / "data")
    (data / "latin1.txt").write_bytes("café\n".encode("latin-1") * 100)
    train(tiny(data, tmp_path / "run", training={"num_tokens": 128}), progress=False)
    assert capsys.readouterr().err.splitlines() == [
        f"skipped 1 files or lines of the {split} text that are not readable" for split in ("training", "held-out")
    ]


def test_processes_share_the_sequences_of_a_backward_pass() -> None:
    assert [sequences_per_process(tiny(Path("text"), Path("run")), processes) for processes in (1, 2)] == [2, 1]


@pytest.mark.parametrize(("batch_tokens", "num_processes"), [(128, 3), (128, 4), (6 * 64, 4), (10 * 64, 3)])
def test_a_batch_that_processes_cannot_share_comes_with_one_they_can(batch_tokens: int, num_processes: int) -> None:
    def recipe(batch_tokens: int) -> Recipe:
        return tiny(Path("text"), Path("run"), training={"batch_tokens": batch_tokens})

    with pytest.raises(
        ValueError, match=rf"is {batch_tokens} but .* {num_processes} processes = \d+: try \d+"
    ) as caught:
        sequences_per_process(recipe(batch_tokens), num_processes)
    unit, near = (int(number) for number in re.findall(r"(?:= |try )(\d+)", str(caught.value)))
    assert unit == 32 * 2 * num_processes  # context_tokens * micro_batches * processes
    assert abs(near - batch_tokens) < unit
    assert sequences_per_process(recipe(near), num_processes) * unit == near


# What goes wrong on the way ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(run: Path, text: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def poison(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight.data[:] = math.nan
        seen.update(model=model, before=[p.detach().clone() for p in model.parameters()])

    recipe = tiny(text, tmp_path / "run")
    with before_update(6, poison), pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 6.*lower"):
        train(recipe, progress=False)
    for before, after in zip(seen["before"], seen["model"].parameters(), strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.detach().nan_to_num(7.0))
    verify_checkpoint(recipe.out / "checkpoints" / "step-3")
    train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)


@pytest.mark.parametrize("rate", ["lr", "value_lr"])
def test_an_absurd_learning_rate_is_noticed(text: Path, tmp_path: Path, rate: str) -> None:
    recipe = tiny(text, tmp_path / "run", training={rate: 1e30, "checkpoint_every_steps": 1})
    with pytest.raises(NonFiniteLossError, match=f"start a new --out with a lower .*{rate}") as caught:
        train(recipe, progress=False)
    step = int(str(caught.value).split("at step ")[1].split(";")[0])
    assert latest_checkpoint(recipe.out) == recipe.out / "checkpoints" / f"step-{step - 1}"
    verify_checkpoint(recipe.out / "checkpoints" / f"step-{step - 1}")


@pytest.mark.linux
def test_a_full_disk_leaves_the_previous_checkpoint_intact(run: Path, text: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_model: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # enough for metrics, not for weights

    recipe = tiny(text, tmp_path / "run")
    try:
        with (
            before_update(4, fill),
            pytest.raises(CheckpointError, match=r"step-6: no space left.*the previous checkpoint step-3 is intact"),
        ):
            train(recipe, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (recipe.out / "checkpoints").iterdir()] == ["step-3"]
    train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)


# Parts ------------------------------------------------------------------------------------------------------


def test_progress_is_on_stderr_and_can_be_silenced(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = tiny(text, tmp_path / "loud", training={"num_tokens": 128})
    train(recipe)
    loud = capsys.readouterr()
    assert loud.out == ""
    assert "training a byte-level BPE of 300 tokens" in loud.err
    assert "loud: 100%" in loud.err
    assert "bpb=" in loud.err
    train(replace(recipe, out=tmp_path / "quiet"), progress=False)
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""


def test_training_works_outside_the_main_thread(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run", training={"num_tokens": 128})
    with ThreadPoolExecutor(1) as pool:
        summary = pool.submit(train, recipe, progress=False).result()
    assert summary == load_json(recipe.out / "summary.json")


def test_a_tokenizer_is_trained_on_the_first_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_TOKENIZER_CHARS", 5)
    assert list(prepare._first_chars(["abc", "de", "f", "never"])) == ["abc", "de", "f"]
