"""Each cell teaches a tiny model, asks what it says, and leaves figures that a file can hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pkmem
from pkmem.experiments.learning import cells, trial
from pkmem.experiments.learning.cells import CELLS, Scale, Setting, digest, perform
from pkmem.experiments.learning.results import FIRST_RATES, Run, load_found, save_found
from pkmem.layer.values import tables_in
from taught import SIZE, llama, tokenizer  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),  # of a library PEFT looks for
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
COSTS = {"near_miss_kl", "background_nats", "background_bits_per_byte", "background_kl"}


class MadeUpEdit:
    """Stands for what `pkmem.learn` returns: rows of the first table, others at each call."""

    def __init__(self, model, number: int) -> None:
        self.figures = {"recall": 1.0, "seconds_preparing": 1.0, "seconds_training": 2.0}
        self.rows = slice(16 * number, 16 * number + 16)
        self.old = tables_in(model)[0].weight.data[self.rows].clone()
        self.new = torch.randn_like(self.old)

    def apply(self, model) -> None:
        tables_in(model)[0].weight.data[self.rows] = self.new

    def undo(self, model) -> None:
        tables_in(model)[0].weight.data[self.rows] = self.old

    def save(self, path) -> None:
        path.write_bytes(bytes(100))


@pytest.fixture
def scale(tmp_path, tokenizer, monkeypatch) -> Scale:  # noqa: F811
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    learned = []
    asked.clear()

    def learn(model, tokenizer, facts, run, scale, clock=None, **settings):
        asked.update(settings)
        assert list(settings.get("others", ())) == (learned if run.cell == "sequence" else [])
        learned.append(MadeUpEdit(model, len(learned)))
        if clock is not None:
            for _ in range(2):
                clock.epoch(model)
        return learned[-1]

    def retrofit(model, seed):
        memory = pkmem.MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8, query_norm="layer")
        return pkmem.add_memory(model, [1], memory, placement="parallel", values="zero")

    monkeypatch.setattr(cells, "_learn", learn)
    monkeypatch.setattr(cells, "retrofit", retrofit)
    monkeypatch.setattr(cells, "quiz", lambda: trial_quiz)
    monkeypatch.setattr(trial, "read_documents", lambda data, split: [])
    return Scale(
        model=str(tmp_path / "model"), facts_per_kind=2, hundred=4, thousand=6, edits=4, facts_per_edit=2,
        batch_size=4, most_epochs=2, text_updates=3, text_sweep_updates=2, text_block_tokens=32, size=SIZE,
    )  # fmt: skip


asked: dict = {}  # the settings of the last lesson
trial_quiz = cells.quiz()[:2]
REAL_LEARN = cells._learn


def performed(cell: str, method: str, scale: Scale, seconds: float | None = None) -> dict:
    run = Run(cell, method, 1e-3)
    found = perform(run, scale, Setting(seconds))
    save_found(path := Path(scale.model), run, found)
    assert json.loads((path / f"{run.name}.json").read_text()) == load_found(path)[run]
    assert found["seconds"] >= 0
    assert found["peak_rss_bytes"] > 50_000_000
    assert found["environment"]["cores"]
    return found


@pytest.mark.parametrize("method", ["memory", "full", "lora"])
def test_the_comparison_asks_every_method_the_same(scale, method) -> None:
    found = performed("compare", method, scale)
    assert (found["facts"], found["phrasings"], len(found["epochs"])) == (6, 4, 2)
    assert set(found["epochs"][0]) == {"seconds", "recall", "held_out", *COSTS}
    assert set(found["figures"]) == {"recall", "held_out", "reversed", "chat", "quiz", *COSTS}
    assert found["figures"]["near_miss_kl"] > 0
    assert found["edit_bytes"] > 0
    assert (found["edit_bytes"] == 100) == (method == "memory")


def test_a_memory_is_taught_by_pkmem_learn(scale, monkeypatch) -> None:
    monkeypatch.setattr(cells, "_learn", REAL_LEARN)
    found = performed("hundred_code", "memory", scale)
    figures = found["edit_figures"]
    assert (figures["epochs"], figures["questions"]) == (2, 4)
    assert found["edit_bytes"] > 100
    assert 0 < figures["seconds_preparing"] + figures["seconds_training"] <= found["seconds"]
    assert found["figures"]["near_miss_kl"] > 0


@pytest.mark.parametrize(
    ("cell", "facts", "slots"), [("hundred_code", 4, None), ("few_rows", 4, 4000), ("thousand", 6, 48_000)]
)
def test_more_facts_are_taught_in_one_phrasing(scale, cell, facts, slots) -> None:
    found = performed(cell, "memory", scale)
    assert (asked.get("slots"), asked["recall"]) == (slots, 0.97)
    assert (found["facts"], found["phrasings"]) == (facts, 1)
    assert set(found["figures"]["recall"]) == ({"person", "code", "word"} if cell == "thousand" else {"code"})


def test_edits_in_sequence_are_taken_back_to_the_bit(scale) -> None:
    found = performed("sequence", "memory", scale)
    figures = found["figures"]
    assert len(asked["background"]) == 16
    assert found["seconds"] == 4 * 3.0
    assert figures["bitwise_as_before"]
    assert figures["half_bitwise_as_if_the_others_had_never_been_in"]
    assert len(figures["recall_of_each"]) == len(figures["recall_when_learned"]) == 4
    assert len(figures["recall_of_the_others"]) == len(figures["recall_of_those_taken_back"]) == 2


def test_edits_in_sequence_are_kept_until_the_run_is_finished(scale, tmp_path) -> None:
    perform(Run("sequence", "memory", 1e-3), scale, Setting(unfinished=tmp_path / "kept"))
    kept = sorted(file.name for file in (tmp_path / "kept").iterdir())
    assert kept == [f"edit-0{number}.safetensors" for number in range(4)]


def test_what_is_not_as_before_is_seen(scale, monkeypatch) -> None:
    monkeypatch.setattr(MadeUpEdit, "undo", lambda self, model: None)
    assert not performed("sequence", "memory", scale)["figures"]["bitwise_as_before"]


@pytest.mark.parametrize("method", ["memory", "lora"])
def test_the_trial_on_text_trains_for_updates_or_seconds(scale, method) -> None:
    found = performed("text", method, scale)
    assert found["updates"] == 3
    assert set(found["figures"]) == {
        f"{text}_bits_per_byte{when}" for text in ("held_out", "unrelated") for when in ("", "_before")
    }
    assert found["figures"]["held_out_bits_per_byte"] != found["figures"]["held_out_bits_per_byte_before"]
    assert performed("text", method, scale, seconds=1e-9)["updates"] == 0
    assert performed("text_sweep", method, scale)["updates"] == 2


def test_a_digest_sees_every_bit() -> None:
    model = llama()
    before = digest(model)
    assert digest(model) == before
    with torch.no_grad():
        model.lm_head.weight[3, 5] *= 1 + 1e-7
    assert digest(model) != before


def test_every_cell_has_its_rates() -> None:
    for name, cell in CELLS.items():
        assert set(cell.methods) <= set(FIRST_RATES[cell.sweep or name])
        assert replace(cell).about
