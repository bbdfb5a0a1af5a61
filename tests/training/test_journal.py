"""The journal of a run: every record at its time, once, in the file and in TensorBoard alike."""

import json
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pkmem.training import journal
from pkmem.training.journal import read_metrics

pytest_plugins = "tiny"

USAGE = {f"memory_0/{name}" for name in ("usage", "top1_usage", "kl", "dead_slots", "hottest_share")}
EVALUATED = {"perplexity", "num_tokens", "repeated_share", "repeated_loss", "new_loss"}


def test_metrics_have_every_figure_at_every_interval_and_at_the_end(run: Path) -> None:
    records = read_metrics(run)
    assert [(r["kind"], r["step"]) for r in records] == [
        *(("train", 4), ("held_out", 5), ("train", 8), ("train", 10), ("held_out", 10))
    ]
    for record in records:
        own = {"lr", "value_lr", "tokens_per_s"} if record["kind"] == "train" else EVALUATED
        assert record.keys() == {"kind", "step", "tokens", "seconds", "loss", "bits_per_byte"} | own | USAGE
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


def test_half_a_record_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    journal._drop_records_after(path, 1)
    assert path.read_text() == '{"step": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_board_is_read_after_the_one_it_continues(tmp_path: Path) -> None:
    """TensorBoard orders files by name, a second and then the process: within a second the later could come first."""
    while time.time() % 1 > 0.9:  # so that the file below is still of this second when it is looked at
        time.sleep(0.01)
    second = int(time.time())
    (tmp_path / f"events.out.tfevents.{second:010d}.host.with.dots.99999999.0").touch()
    journal._wait_for_a_later_name(tmp_path)
    assert int(time.time()) > second


def test_records_are_json_lines(run: Path) -> None:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)
