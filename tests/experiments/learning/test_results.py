"""The sweep of learning rates brackets the best, and result files are read back or refused by name."""

import inspect

import pytest

from pkmem import learn
from pkmem.experiments.learning.results import (
    FIRST_RATES,
    MOST_RATES,
    Run,
    best_rate,
    first_with,
    last_within,
    load_found,
    rates_to_try,
    save_found,
)

EPOCHS = [
    {"seconds": 2.0, "held_out": 0.5, "recall": 0.5, "near_miss_kl": 1.0, "background_kl": 0.1},
    {"seconds": 4.0, "held_out": 0.5, "recall": 0.98, "near_miss_kl": 2.0, "background_kl": 0.2},
    {"seconds": 6.0, "held_out": 0.5, "recall": 1.0, "near_miss_kl": 3.0, "background_kl": 0.3},
]


def swept(losses: dict[float, float | None], sweep: str = "compare", method: str = "full") -> dict:
    """Results of a sweep by rate; None for one that recalls too little."""
    return {
        Run(sweep, method, rate): {
            "epochs": [EPOCHS[0] if loss is None else EPOCHS[1] | {"background_kl": loss, "near_miss_kl": 1.0}]
        }
        for rate, loss in losses.items()
    }


def test_a_sweep_begins_with_three_rates_and_waits_for_all() -> None:
    first = list(FIRST_RATES["compare"]["full"])
    assert rates_to_try({}, "compare", "full") == first == [1e-5, 3e-5, 1e-4]
    assert best_rate({}, "compare", "full") is None
    assert best_rate(swept({1e-5: 1, 3e-5: 2}), "compare", "full") is None


def test_a_sweep_ends_with_its_best_between_two_others() -> None:
    found = swept({1e-5: 3, 3e-5: 1, 1e-4: 2})
    assert rates_to_try(found, "compare", "full") == [1e-5, 3e-5, 1e-4]
    assert best_rate(found, "compare", "full") == 3e-5


@pytest.mark.parametrize(
    ("losses", "beyond"),
    [
        ({1e-5: 1, 3e-5: 2, 1e-4: 3}, [3e-6]),
        ({1e-5: 3, 3e-5: 2, 1e-4: 1}, [3e-4]),
        ({1e-5: 3, 3e-5: 2, 1e-4: 1, 3e-4: 0.5}, [3e-4, 1e-3]),
        ({1e-5: 3, 3e-5: 2, 1e-4: 1, 3e-4: 1.5}, [3e-4]),
    ],
)
def test_a_sweep_goes_on_beyond_a_best_at_its_edge(losses, beyond) -> None:
    found = swept(losses)
    assert rates_to_try(found, "compare", "full") == [1e-5, 3e-5, 1e-4, *beyond]
    assert (best_rate(found, "compare", "full") is None) == (beyond[-1] not in losses)


def test_a_sweep_without_end_ends() -> None:
    losses = {1e-5: 5, 3e-5: 4, 1e-4: 3, 3e-4: 2, 1e-3: 1}
    assert len(rates_to_try(swept(losses), "compare", "full")) == MOST_RATES
    assert best_rate(swept(losses), "compare", "full") == 1e-3


def test_a_rate_that_teaches_too_little_is_not_the_best() -> None:
    assert best_rate(swept({1e-5: None, 3e-5: 9, 1e-4: 10}), "compare", "full") == 3e-5


def test_a_rate_that_is_gentle_because_it_teaches_one_phrasing_alone_is_not_the_best() -> None:
    found = swept({1e-5: 1, 3e-5: 9, 1e-4: 10})
    found[Run("compare", "full", 1e-5)]["epochs"][0]["held_out"] = 0.3
    assert best_rate(found, "compare", "full") == 3e-5
    found[Run("compare", "full", 1e-5)]["epochs"][0]["held_out"] = 0.45
    assert rates_to_try(found, "compare", "full")[-1] == 3e-6


def test_a_memory_has_the_rate_that_learn_has() -> None:
    own = inspect.signature(learn).parameters["lr"].default
    found = swept({0.02: 1, 0.05: 2, 0.1: 3}, method="memory")
    assert best_rate({}, "compare", "memory") == best_rate(found, "compare", "memory") == own
    assert rates_to_try(found, "compare", "memory") == [0.02, 0.05, 0.1]


def test_a_rate_for_text_is_chosen_by_its_held_out_bits() -> None:
    bits = {1e-3: 1.2, 3e-3: 1.1, 1e-2: 1.3}
    found = {Run("text_sweep", "memory", rate): {"figures": {"held_out_bits_per_byte": x}} for rate, x in bits.items()}
    assert best_rate(found, "text_sweep", "memory") == 3e-3


def test_epochs_are_found_by_recall_and_by_seconds() -> None:
    assert first_with(EPOCHS, 0.97) == EPOCHS[1]
    assert first_with(EPOCHS[:1], 0.97) is None
    assert last_within(EPOCHS, 5) == EPOCHS[1]
    assert last_within(EPOCHS, 1) is None


def test_results_are_read_back_and_other_files_refused(tmp_path) -> None:
    run = Run("compare", "lora", 3e-4, seed=2)
    save_found(tmp_path, run, {"seconds": 1.5, "figures": {}})
    assert [file.name for file in tmp_path.iterdir()] == ["compare-lora-lr0.0003-seed2.json"]
    ((found, document),) = load_found(tmp_path).items()
    assert (found, document["seconds"]) == (run, 1.5)
    (tmp_path / "x-lr1-seed0.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x-lr1-seed0.json is not a result of `pkmem experiment learn`.*move it away"):
        load_found(tmp_path)
