"""Claims: every pair that one is about, and plainly whether it holds, fails, or cannot be told."""

from pathlib import Path

import pytest

from made_results import HERE, make, make_speeds, rates_of
from pkmem.experiments.claims import Spread, claims, speeds_of
from pkmem.experiments.family import Family, load_family
from pkmem.experiments.results import Result, Speeds, find_results, of_best_rate, runs_of, save_result

TABLE1 = load_family("table1", "laptop")
PAIR = "4 layers + memory against 8 layers: "


def found_in(folder: Path, family: Family) -> tuple[dict[str, list[Result]], list[Speeds]]:
    """Per cell its results at the best rate of seed 0, and the speeds."""
    results, speeds, _ = find_results(folder)
    return {cell.name: of_best_rate(family, cell, results) for cell in family.cells.values()}, speeds


def table1(folder: Path, faster: float = 0.9, **changed: object) -> list[str]:
    make(folder, TABLE1, seeds=2, **changed)
    make_speeds(folder, TABLE1, faster=faster)
    return claims(TABLE1, *found_in(folder, TABLE1))


def test_spread_is_sample_deviation_and_range() -> None:
    assert Spread((1.0, 2.0, 6.0)).text(".2f") == "3.00 ± 2.65 (1.00 to 6.00)"
    assert Spread((1.5,)).text(".2f") == "1.50"


def test_the_claim_is_told_with_seeds_speeds_and_equal_seconds(tmp_path: Path) -> None:
    found = table1(tmp_path)
    saved = -0.04 * 4 + 0.2
    assert (
        f"{PAIR}{saved:+.4f} ± 0.0000 ({saved:+.4f} to {saved:+.4f}) bits per byte saved, "
        "better at 2 of 2 seeds; 1.80x as fast in prefill, 1.80x in decode. The claim holds."
    ) in found
    timed = saved + 0.1
    assert any(text.startswith(f"4 layers + memory against 8 layers at equal seconds: {timed:+.4f}") for text in found)
    assert any(text.startswith("4 layers + memory against 4 layers at equal seconds: +0.3000") for text in found)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        (
            {"4_layers_1_memory": {"bits_per_byte": 2.3}},
            "better at 0 of 2 seeds; 1.80x as fast in prefill, 1.80x in decode. The claim does not hold.",
        ),
        (
            {"8_layers": {"bits_per_byte": 2.5}},
            "But 8 layers are no better than 4 layers here, so that it says little.",
        ),
    ],
)
def test_a_claim_that_fails_or_says_little_is_told(changed: dict, verdict: str, tmp_path: Path) -> None:
    (line,) = (text for text in table1(tmp_path, **changed) if text.startswith(PAIR))
    assert verdict in line


def test_a_slower_memory_loses_the_claim(tmp_path: Path) -> None:
    (line,) = (text for text in table1(tmp_path, faster=0.4) if text.startswith(PAIR))
    assert line.endswith("0.80x as fast in prefill, 0.80x in decode. The claim does not hold.")


def test_what_cannot_be_told_yet_is_told(tmp_path: Path) -> None:
    make(tmp_path, TABLE1, seeds=1)
    best, _ = found_in(tmp_path, TABLE1)
    (line,) = (text for text in claims(TABLE1, best, []) if text.startswith(PAIR))
    assert line.endswith("; speeds not measured yet. Whether the claim holds cannot be said yet.")
    nothing = claims(TABLE1, {name: [] for name in TABLE1.cells}, [])
    assert (
        f"{PAIR}not both trained yet; speeds not measured yet. Whether the claim holds cannot be said yet." in nothing
    )
    assert claims(load_family("speed", "laptop"), best, []) == []  # table1 says it


def test_speeds_of_a_cell_trained_for_another_time_are_those_of_its_like(tmp_path: Path) -> None:
    make_speeds(tmp_path, TABLE1, number=0)
    make_speeds(tmp_path, TABLE1, number=1)
    speeds = find_results(tmp_path)[1]
    for name in ("8_layers", "8_layers_equal_seconds"):
        assert speeds_of(speeds, TABLE1.cells[name], "prefill_tokens_per_s") == (10_000, 10_000)
    assert speeds_of(speeds, TABLE1.cells["8_layers"], "unknown") == ()


def test_every_pair_of_a_family_is_compared(tmp_path: Path) -> None:
    family = load_family("keys", "laptop")
    for cell, bits in (("product_32", 2.0), ("flat_32", 2.25), ("product_64", 1.75)):
        for seed in (0, 1):
            summary = {
                "bits_per_byte": bits + seed * (cell == "flat_32") / 4,
                "perplexity": 9.0,
                "train_seconds": 9.0,
                "train_tokens_per_s": 9.0,
            }
            found = {"summary": summary, "held_out": [], "environment": HERE}
            for run in runs_of(family, family.cells[cell], seed, find_results(tmp_path)[0]):
                save_result(tmp_path / f"{run.name}.json", family, run, found)
    texts = claims(family, *found_in(tmp_path, family))
    starts = [f"{family.cells[model].label} against {family.cells[rival].label}: " for model, rival in family.pairs]
    assert [text.startswith(start) for text, start in zip(texts, starts, strict=True)] == [True] * len(starts)
    by_start = dict(zip(starts, texts, strict=True))
    unknown = "speeds not measured yet. Whether the claim holds cannot be said yet."
    assert by_start["32² product keys against 32² flat keys: "].endswith(
        f": +0.3750 ± 0.1768 (+0.2500 to +0.5000) bits per byte saved, better at 2 of 2 seeds; {unknown}"
    )
    assert by_start["64² product keys against 64² flat keys: "].endswith(f": not both trained yet; {unknown}")
    timed = by_start["128² product keys against 128² flat keys at the seconds of 128² product keys: "]
    assert timed.endswith(": not both trained yet.")  # whose speeds are no other than at equal tokens


def test_pairs_are_compared_by_the_familys_metric(tmp_path: Path) -> None:
    family = load_family("facts", "laptop")
    for cell, bits in (("memory", 5.5), ("dense", 3.25)):
        for run in runs_of(family, family.cells[cell], 0, []):
            better = run.rate in rates_of(family, cell)[:1]
            summary = dict.fromkeys(("bits_per_byte", "perplexity", "train_seconds", "train_tokens_per_s"), 9.0)
            summary |= {"bits_per_fact": bits if better else 0.5}
            found = {"summary": summary, "held_out": [], "environment": HERE}
            save_result(tmp_path / f"{run.name}.json", family, run, found)
    texts = claims(family, *found_in(tmp_path, family))
    assert "dense + memory against dense: +2.2500 bits per fact gained, better at 1 of 1 seeds." in texts
