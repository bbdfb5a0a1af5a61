"""The tables of teach.md say what the result files say, and that something is not measured where there are none."""

import pytest

import learning
from pkmem.experiments.learning.kinds import KINDS
from pkmem.experiments.learning.results import FIRST_RATES, METHODS, Run, save_found


def epoch(seconds: float, recall: float, damage: float) -> dict[str, float]:
    figures = {"near_miss_kl": 10 * damage, "background_kl": damage, "background_nats": -damage}
    return {"seconds": seconds, "recall": recall, "held_out": recall / 2, **figures}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The memory recalls enough after 20 s, full fine-tuning after 40 s, LoRA never."""
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    for seed in range(2):
        for place, method in enumerate(METHODS):
            more = 0.01 * seed
            epochs = [
                epoch(10 * (place + 1), 0.5, 0.1 + more),
                epoch(20 * (place + 1), 0.98 - 0.1 * (place == 2), 0.2 + more),
            ]
            shares = {
                name: dict.fromkeys(KINDS, 0.25 * (place + 1)) for name in ("recall", "held_out", "reversed", "chat")
            }
            figures = {**shares, "near_miss_kl": 1.0, "background_kl": 0.5, "quiz": 0.7}
            found = {
                "seconds": 20.0,
                "epochs": epochs,
                "figures": figures,
                "edit_bytes": 3e6,
                "peak_rss_bytes": 1.5e9,
                "edit_figures": {"seconds_preparing": 6.0, "seconds_training": 14.0},
            }
            tried = FIRST_RATES["compare"][method]
            for i, rate in enumerate(tried if seed == 0 else [tried[1]]):  # the one in the middle is the best
                worse = [one | {"recall": one["recall"] - 0.2} for one in epochs] if seed == 0 and i != 1 else epochs
                save_found(tmp_path, Run("compare", method, rate, seed), found | {"epochs": worse})
    of_edits = {"recall_when_learned": [1.0, 0.9], "recall_of_each": [0.9, 0.8]}
    of_edits |= {"recall_of_the_others": {"1": 0.7}, "recall_of_those_taken_back": {"0": 0.0}}
    sequence = found | {"edit_bytes": [1e6, 2e6], "figures": figures | of_edits}
    save_found(tmp_path, Run("sequence", "memory", 1e-3), sequence)
    for place, method in enumerate(("memory", "lora")):
        bits = {"held_out_bits_per_byte": 1.1 + place, "unrelated_bits_per_byte": 1.2 + place}
        bits |= {f"{name}_before": 1.0 for name in bits}
        save_found(tmp_path, Run("text", method, 1e-3), {"updates": 7, "seconds": 9.0, "figures": bits})


@pytest.mark.usefixtures("results")
def test_tables_have_the_figures_of_the_runs() -> None:
    tables = {
        name: [line.strip("| ").split(" | ") for line in text.splitlines()] for name, text in learning.tables().items()
    }
    recall = {row[0]: row[1:] for row in tables["learn_at_equal_recall"]}
    assert recall["memory"][0] == "98%"
    assert recall["memory"][3] == "0.2050 <small>(0.2000 to 0.2100)</small>"
    assert recall["memory"][-1] == "20"
    assert recall["full fine-tuning"][-1] == "40"
    assert recall["LoRA (0 of 2)"] == ["-"] * 6
    seconds = {row[0]: row[1:] for row in tables["learn_at_equal_seconds"]}
    assert (seconds["memory"][0], seconds["full fine-tuning"][0]) == ("98%", "50%")
    assert ["LoRA, word", "75%", "75%", "75%", "75%"] in tables["learn_by_kind"]
    assert ["memory", "0.05", "6", "7", "1.50", "3.0", "70%"] in tables["learn_machine_costs"]
    assert ["20 edits of 10 facts", "75%", "1.00", "0.5000", "6", "14", "3.0"] in tables["learn_more_facts"]
    assert [row[1:] for row in tables["learn_in_sequence"][2:]] == [
        ["95.0%", "90%"],
        ["85.0%", "80%"],
        ["70.0%", "70%"],
        ["0.0%", "0%"],
    ]
    assert ["before", "0", "0", "1.000", "1.000"] in tables["learn_on_text"]
    assert ["LoRA", "7", "9", "2.100", "2.200"] in tables["learn_on_text"]
    assert len(tables["learn_rates"]) == 2 + 9
    learning.learning()


def test_without_results_a_table_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    assert set(learning.tables().values()) == {learning.NOT_YET}
    learning.learning()
