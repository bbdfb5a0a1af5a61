"""Result files: what is written is read, what is damaged is named, sweeps and equal seconds are worked out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pkmem.experiments.family import Cell, Family, Machine, Metric
from pkmem.experiments.results import (
    NotYetError,
    Result,
    Speeds,
    at_edge,
    best_of_sweep,
    difference,
    find_results,
    load_result,
    of_best_rate,
    runs_of,
    save_result,
    save_speeds,
    standing,
)
from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.training.recipe import Recipe, TrainingConfig

RATES = tuple({"training.lr": lr} for lr in (0.1, 0.2, 0.3))


def family_of(*cells: Cell) -> Family:
    return Family(
        name="little",
        scale="laptop",
        title="Little",
        paper="none",
        about="seconds",
        base=Path("base.yaml"),
        base_recipe={"training": {"batch_tokens": 256}},
        overrides={},
        cells={cell.name: cell for cell in cells},
        machine=Machine("core", 0.1, 0.5),
    )


SWEPT, SINGLE = Cell("swept", "swept", rates=RATES), Cell("single", "single", {"model.memory_layers": [1]})
TIMED = Cell("timed", "timed", SWEPT.overrides, SWEPT.rates, like="swept", match_seconds_of="single")
FAMILY = family_of(SWEPT, SINGLE, TIMED)


def save(folder: Path, cell: Cell, number: int = 0, seed: int = 0, bits: float = 2.0, **summary: float) -> Result:
    run = FAMILY.run(cell, cell.rates[number], seed)
    figures = {"bits_per_byte": bits, "perplexity": 9.0, "train_seconds": 10.0, "train_tokens_per_s": 50.0}
    record = {"kind": "held_out", "tokens": 256, "seconds": 1.5, "bits_per_byte": 3.0}
    found = {"summary": figures | summary, "held_out": [record], "environment": {"commit": "abc"}}
    save_result(folder / f"{run.name}.json", FAMILY, run, found)
    result = load_result(folder / f"{run.name}.json")
    assert isinstance(result, Result)
    return result


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = save(tmp_path, SINGLE, seed=3, bits=1.5)
    assert (result.family, result.scale, result.cell, result.seed) == ("little", "laptop", "single", 3)
    assert result.rate == "lr0.002_value_lr0.002"
    assert difference(result.recipe, FAMILY.run(SINGLE, {}, 3).recipe) is None
    assert result.summary["bits_per_byte"] == 1.5
    assert result.held_out[0]["seconds"] == 1.5
    assert "out" not in json.loads(result.file.read_text())["recipe"]


def test_speeds_are_read_as_they_were_written(tmp_path: Path) -> None:
    models = {"single": {"prefill_tokens_per_s": 5.0, "decode_tokens_per_s": 2.0, "prefill_words_per_s": 1.0}}
    save_speeds(tmp_path / "speed__0.json", FAMILY, models, {"commit": "abc"})
    speeds = load_result(tmp_path / "speed__0.json")
    assert isinstance(speeds, Speeds)
    assert speeds.models == models
    assert speeds.recipes["single"].model.memory_layers == [1]
    assert find_results(tmp_path)[1] == [speeds]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"perplexity"', '"complexity"'),
        lambda text: text.replace('"bits_per_byte": 2.0', '"bits_per_byte": "2"'),
        lambda text: text.replace('"seconds": 1.5', '"second": 1.5'),
        lambda text: text.replace('"family"', '"familie"'),
        lambda text: text.replace('"batch_tokens": 256', '"batch_tokens": 3'),
    ],
)
def test_a_damaged_file_is_named_and_left_out(damage, tmp_path: Path) -> None:
    good, bad = save(tmp_path, SWEPT, 0), save(tmp_path, SWEPT, 1).file
    bad.write_text(damage(bad.read_text()))
    results, speeds, damaged = find_results(tmp_path)
    assert [result.file for result in results] == [good.file]
    assert speeds == []
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{bad} is not a result of an experiment, or damaged (")


def test_other_files_and_those_of_unfinished_runs_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copy(save(tmp_path, SWEPT).file, tmp_path / "runs")
    (tmp_path / "summary.json").write_text("{")
    results, _, damaged = find_results(tmp_path)
    assert len(results) == 1
    assert damaged == []
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper", SINGLE)
    assert len(find_results(tmp_path)[0]) == 2


def test_the_difference_of_two_recipes_names_fields() -> None:
    model = ModelConfig(memory_layers=[1])
    one, other = Recipe("a", model=model), Recipe("b", Path("elsewhere"), model=model, memory=MemoryConfig(knn=3))
    assert difference(one, replace(one, out=Path("x"))) is None
    assert difference(one, other) == "data a -> b, memory.knn 32 -> 3"


def test_what_a_model_without_a_memory_does_not_read_is_no_difference() -> None:
    dense = Recipe("a", model=ModelConfig(memory_layers=[]))
    unread = replace(dense, memory=MemoryConfig(knn=3), training=replace(dense.training, value_lr=0.5))
    assert difference(dense, unread) is None
    assert difference(dense, replace(unread, training=replace(dense.training, lr=0.5))) is not None
    with_memory = replace(unread, model=ModelConfig(memory_layers=[1]))
    assert "memory.knn None -> 3" in str(difference(dense, with_memory))


def test_the_best_of_a_sweep_is_for_the_other_seeds(tmp_path: Path) -> None:
    results = [save(tmp_path, SWEPT, 0, bits=2.0), save(tmp_path, SWEPT, 1, bits=1.9)]
    with pytest.raises(NotYetError, match=r"swept has no result at seed 0 for lr0\.3"):
        runs_of(FAMILY, SWEPT, 1, results)
    assert [run.rate for run in runs_of(FAMILY, SWEPT, 0, [])] == ["lr0.1", "lr0.2", "lr0.3"]
    results += [save(tmp_path, SWEPT, 2, bits=1.95), save(tmp_path, SWEPT, 2, seed=1, bits=1.0)]
    assert best_of_sweep(FAMILY, SWEPT, results).rate == "lr0.2"
    assert [run.name for run in runs_of(FAMILY, SWEPT, 4, results)] == ["swept__lr0.2__seed4"]


def test_the_best_is_by_the_familys_metric(tmp_path: Path) -> None:
    by_recall = replace(FAMILY, metric=Metric("recall", greater_is_better=True))
    recalls = (0.5, 0.75, 0.25)
    results = [save(tmp_path, SWEPT, n, bits=2.0 - recall, recall=recall) for n, recall in enumerate(recalls)]
    assert best_of_sweep(by_recall, SWEPT, results).rate == "lr0.2"
    assert [result.rate for result in of_best_rate(by_recall, SWEPT, results)] == ["lr0.2"]
    assert [run.rate for run in runs_of(by_recall, SWEPT, 1, results)] == ["lr0.2"]
    without = save(tmp_path, SINGLE)
    now = standing(by_recall, [*results, without], 1)
    assert now.unused == {without.file: "has no recall"}
    assert without not in now.valid


@pytest.mark.parametrize(("bits", "expected"), [([1, 2, 3], True), ([2, 1, 3], False), ([3, 2, 1], True)])
def test_a_best_rate_at_the_edge_is_noticed(bits: list[float], expected: bool, tmp_path: Path) -> None:
    results = [save(tmp_path, SWEPT, number, bits=b) for number, b in enumerate(bits)]
    assert at_edge(FAMILY, SWEPT, best_of_sweep(FAMILY, SWEPT, results)) is expected


def test_one_rate_has_no_edge(tmp_path: Path) -> None:
    assert not at_edge(FAMILY, SINGLE, save(tmp_path, SINGLE))


def test_equal_seconds_are_tokens_at_the_best_runs_speeds(tmp_path: Path) -> None:
    results = [save(tmp_path, SWEPT, 0, bits=2.0, train_tokens_per_s=50), save(tmp_path, SWEPT, 1, bits=1.9)]
    results[1] = save(tmp_path, SWEPT, 1, bits=1.9, train_tokens_per_s=100)
    with pytest.raises(NotYetError, match="swept"):
        runs_of(FAMILY, TIMED, 0, results)
    results.append(save(tmp_path, SWEPT, 2, bits=2.1, train_tokens_per_s=70))
    with pytest.raises(NotYetError, match="single"):
        runs_of(FAMILY, TIMED, 0, results)
    results.append(save(tmp_path, SINGLE, train_seconds=9.0))
    for run in runs_of(FAMILY, TIMED, 0, results):
        assert run.recipe.training.num_tokens == 768  # 900 fit, in updates of 256


def test_equal_seconds_are_of_one_machine(tmp_path: Path) -> None:
    def ran_on(vectors: str, result: Result) -> Result:
        return replace(result, environment={"processor": "one", "vectors": vectors})

    swept = [save(tmp_path, SWEPT, number, bits=2.0 - number) for number in range(3)]  # the last is the best
    rows = [ran_on("AVX512", swept[0]), ran_on("AVX512", swept[1]), ran_on("AVX2", swept[2])]
    single = ran_on("AVX512", save(tmp_path, SINGLE, train_seconds=9.0))
    rows[1].summary["train_tokens_per_s"] = rows[0].summary["train_tokens_per_s"] = 100.0
    for run in runs_of(FAMILY, TIMED, 0, [*rows, single]):
        assert run.recipe.training.num_tokens == 768  # 9 s of 100 tokens/s; 450 of the machine that is slower
    with pytest.raises(NotYetError, match=r"of two machines .*AVX2.*AVX512.*run it again where the other ran"):
        runs_of(FAMILY, TIMED, 0, [*(ran_on("AVX2", result) for result in swept), single])


def test_where_a_family_stands(tmp_path: Path) -> None:
    results = [save(tmp_path, SINGLE), save(tmp_path, SWEPT, 0), save(tmp_path, SWEPT, 2)]
    results.append(replace(results[0], summary={}))  # a copy
    other = replace(results[2], recipe=replace(results[2].recipe, training=TrainingConfig(lr=0.3, batch_tokens=512)))
    now = standing(FAMILY, [*results[:2], other, results[3], replace(results[0], scale="gpu")], 2)
    assert now.valid == [results[1], results[0]]  # in the family's order
    assert [run.name for run in now.missing] == ["swept__lr0.2__seed0", "single__lr0.002_value_lr0.002__seed1"]
    assert now.unused == {other.file: "is of another recipe (training.batch_tokens 512 -> 256)"}
    assert [text.split(":")[0] for text in now.waiting] == ["timed, seed 0", "swept, seed 1", "timed, seed 1"]
    elsewhere = standing(FAMILY, results, 1, data="other text")
    assert elsewhere.valid == []
    assert "data python -> other text" in elsewhere.unused[results[0].file]
