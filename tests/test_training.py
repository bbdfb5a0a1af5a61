"""Training: what a run leaves behind, that a resumed run is the same run, and that nothing bad is trained on."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, TrainingArguments

from pkmem import training
from pkmem.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint
from pkmem.evaluation import count_parameters
from pkmem.huggingface import build_model
from pkmem.optim import RowAdam
from pkmem.recipe import TrainingConfig
from pkmem.saved import load_saved
from pkmem.state import load_json
from pkmem.training import Journal, NonFiniteLossError, build_optimizer, build_schedule, read_metrics, train
from tiny import MEMORY, MODEL, TRAINING, tiny

pytest_plugins = "tiny"

USAGE = {f"memory_0/{name}" for name in ("usage", "top1_usage", "kl", "dead_slots", "hottest_share")}


@contextmanager
def before_update(step: int, act: Callable[[Any], object]) -> Iterator[None]:
    """Calls `act` with the model right before an update, counted from 1."""
    begin = Journal.on_step_begin

    def acting(self: Journal, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == step - 1:
            act(kwargs["model"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "on_step_begin", acting)
        yield


def ctrl_c(_model: object) -> None:
    signal.raise_signal(signal.SIGINT)


def losses(run: Path) -> list[tuple]:
    return [(r["kind"], r["step"], r["loss"], r["lr"] if r["kind"] == "train" else None) for r in read_metrics(run)]


def assert_same_run(left: Path, right: Path) -> None:
    """Bitwise: losses, weights, optimizer, schedule, random generators."""
    assert losses(left) == losses(right)
    for name in ("model", "optimizer", "random"):
        ours, theirs = (load_file(run / "checkpoints" / "step-10" / f"{name}.safetensors") for run in (left, right))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (left, right))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    figures = [load_json(run / "summary.json") for run in (left, right)]
    assert figures[0]["loss"] == figures[1]["loss"]


# What a run leaves ------------------------------------------------------------------------------------------


def test_run_directory_holds_recipe_tokenizer_metrics_checkpoints_model_and_summary(run: Path, text: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "tokenizer", "metrics.jsonl", "tensorboard", "checkpoints", "model", "summary.json")
    }
    assert yaml.safe_load((run / "config.yaml").read_text()) == tiny(text, run).to_dict()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-9", "step-10"}
    verify_checkpoint(run / "checkpoints" / "step-10")
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    expected = load_file(run / "checkpoints" / "step-10" / "model.safetensors")
    saved = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_metrics_have_every_figure_at_every_interval_and_at_the_end(run: Path) -> None:
    records = read_metrics(run)
    assert [(r["kind"], r["step"]) for r in records] == [
        *(("train", 4), ("held_out", 5), ("train", 8), ("train", 10), ("held_out", 10))
    ]
    for record in records:
        speed = {"lr", "value_lr", "tokens_per_s"} if record["kind"] == "train" else {"perplexity", "num_tokens"}
        assert record.keys() == {"kind", "step", "tokens", "seconds", "loss", "bits_per_byte"} | speed | USAGE
        assert record["tokens"] == record["step"] * 128
        assert all(math.isfinite(figure) for key, figure in record.items() if key != "kind")
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    trained = [record for record in records if record["kind"] == "train"]
    assert trained[1]["tokens_per_s"] == pytest.approx(4 * 128 / (trained[1]["seconds"] - trained[0]["seconds"]))


def test_bits_per_byte_are_those_of_the_split(run: Path) -> None:
    ratios = {(r["kind"], round(r["bits_per_byte"] / r["loss"], 9)) for r in read_metrics(run)}
    assert len(ratios) == 2  # one for each split: each has its own bytes per token


def test_tensorboard_has_the_metrics(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    records = read_metrics(run)
    figures = {
        (f"{r['kind']}/{name}", r["step"]): figure
        for r in records
        for name, figure in r.items()
        if name not in ("kind", "step", "tokens", "seconds")
    }
    board = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert board == pytest.approx(figures, rel=1e-6)


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
    ],
    ids=["dense gradient", "shared values", "schedules", "llama", "no memory"],
)
def test_every_kind_of_run_resumes_bitwise(text: Path, tmp_path: Path, changes: dict) -> None:
    whole, stopped = (tiny(text, tmp_path / name, **changes) for name in ("whole", "stopped"))
    train(whole, progress=False)
    with before_update(5, ctrl_c), pytest.raises(KeyboardInterrupt):
        train(stopped, progress=False)
    train(stopped, resume=True, progress=False)
    assert_same_run(stopped.out, whole.out)


def test_a_run_resumed_after_kill_is_the_uninterrupted_run(run: Path, text: Path, tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from tiny import tiny
from pkmem.training import Journal, train

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
    killed = subprocess.run(command, cwd=Path(__file__).parent, env=same_threads, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [(r["kind"], r["step"]) for r in read_metrics(recipe.out)] == [("train", 4), ("held_out", 5)]
    checkpoint = latest_checkpoint(recipe.out)
    assert checkpoint == recipe.out / "checkpoints" / "step-3"
    train(recipe, resume=True, progress=False)  # what was recorded after step 3 is measured anew, once
    assert_same_run(recipe.out, run)
    events = EventAccumulator(str(recipe.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 10]


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


def test_resuming_needs_a_checkpoint_that_is_whole(run: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from: start it without --resume"):
        train(recipe, resume=True, progress=False)
    assert not recipe.out.exists()
    shutil.copytree(run, recipe.out)
    file = recipe.out / "checkpoints" / "step-10" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    metrics = (recipe.out / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors.*delete .*step-10 and resume from an earlier"):
        train(recipe, resume=True, progress=False)
    assert (recipe.out / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(file.parent)  # as the message says
    train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)


def test_half_a_record_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    training._drop_records_after(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


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


def test_several_processes_need_dense_value_gradients(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"there are 2 processes.*set training\.value_grad=dense"):
        train(tiny(text, tmp_path / "run"), progress=False)


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


def test_a_full_disk_leaves_the_previous_checkpoint_intact(run: Path, text: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("value_grad", ["rows", "dense"])
def test_values_have_their_own_rate_and_no_weight_decay(value_grad: Any) -> None:
    model = build_model(MODEL, MEMORY, 300, 0)
    config = TrainingConfig(lr=0.1, value_lr=0.2, weight_decay=0.3, beta2=0.9, value_grad=value_grad)
    dense, values = build_optimizer(model, config).optimizers
    assert isinstance(values, RowAdam) is (value_grad == "rows")
    (table,) = values.param_groups[0]["params"]
    assert table.shape == (64, 32)
    assert values.param_groups[0]["lr"] == 0.2
    assert values.param_groups[0].get("weight_decay", 0.0) == 0.0
    decayed, free = dense.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) + 1 == len(list(model.parameters()))
    for group in (decayed, free, values.param_groups[0]):
        assert group["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("value_schedule", ["same", "constant"])
def test_schedule_warms_up_then_falls(value_schedule: Any) -> None:
    model = build_model(MODEL, MEMORY, 300, 0)
    config = replace(TRAINING, schedule="linear", warmup_share=0.2, lr=1.0, value_lr=0.5, value_schedule=value_schedule)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config)
    rates = []
    for _ in range(config.num_steps):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))
        optimizer.step()
        schedule.step()
    falling = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [lr for lr, _ in rates] == pytest.approx(falling)
    values = [0.5] * 10 if value_schedule == "constant" else [lr / 2 for lr in falling]
    assert [value_lr for _, value_lr in rates] == pytest.approx(values)


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
    monkeypatch.setattr(training, "_TOKENIZER_CHARS", 5)
    assert list(training._first_chars(["abc", "de", "f", "never"])) == ["abc", "de", "f"]


def test_records_are_json_lines(run: Path) -> None:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)
