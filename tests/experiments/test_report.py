"""The report: from result files alone, whole or partial or mixed, with what is missing named."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from html_reader import Reader
from made_results import HERE, figures, make, make_speeds, rates_of
from pkmem.experiments import report
from pkmem.experiments.family import load_family
from pkmem.experiments.plots import plot_by_text, plot_lines
from pkmem.experiments.report import write_report
from pkmem.experiments.results import Result, find_results, runs_of, save_result

TABLE1 = load_family("table1", "laptop")
LOWEST, *LOW, BEST, HIGHEST = rates_of(TABLE1, "4_layers")
MEMORY_RATES = rates_of(TABLE1, "4_layers_1_memory")


@pytest.fixture(scope="module")
def table1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All results of table 1 at laptop size with two seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("results")
    family = load_family("table1", "laptop")
    make(folder, family, seeds=2)
    make_speeds(folder, family, faster=0.9)
    return folder


def page_of(folders: list[Path], out: Path) -> tuple[str, Reader]:
    return read(write_report(folders, out).parent)


def read(page: Path) -> tuple[str, Reader]:
    """The Markdown, and the HTML as read."""
    return (page / "index.md").read_text(), Reader((page / "index.html").read_text())


@pytest.fixture(scope="module")
def of_table1(table1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of those results, which takes seconds to draw; not to be changed."""
    return write_report([table1], tmp_path_factory.mktemp("page")).parent


def row_of(markdown: str, label: str) -> dict[str, str]:
    """A row of the first table."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.splitlines() if "| " in line]
    return dict(zip(rows[0], next(row for row in rows if row[0] == label), strict=True))


def test_the_table_has_means_spreads_usage_speed_and_rates(of_table1: Path) -> None:
    markdown, _ = read(of_table1)
    row = row_of(markdown, "4 layers + memory")
    bits = [2.5 - 0.16 - 0.2, 2.5 - 0.16 - 0.2 + 0.01]
    assert row["bits per byte"] == f"{sum(bits) / 2:.4f} ± 0.0071 ({bits[0]:.4f} to {bits[1]:.4f})"
    assert row["dense"] == "4,000"
    assert row["in memory"] == "10"
    assert row["usage"] == "50.0%"
    assert row["KL"] == "1.250"
    assert row["prefill tokens/s"] == "18,000"
    assert row["decode tokens/s"] == "180"
    assert row["words/s"] == "4,500"
    assert row["learning rate"] == MEMORY_RATES[-2]
    assert row["seeds"] == "2"
    assert row_of(markdown, "4 layers + 2 memories")["usage"] == "50.0%, 60.0%"
    assert row_of(markdown, "4 layers")["usage"] == "-"
    assert row_of(markdown, "8 layers at equal seconds")["seeds"] == "2"


def test_a_figure_that_some_seeds_lack_says_so_and_what_it_means(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    assert "a repeated token" not in page_of([folder], tmp_path / "none")[0]
    for seeds, text in (([1], "1.250, 1 of 2 seeds"), ([0, 1], "1.250")):
        for seed in seeds:
            file = folder / f"table1/laptop/4_layers__{BEST}__seed{seed}.json"
            document = json.loads(file.read_text())
            document["summary"] |= {"repeated_loss": 1.25, "new_loss": 3.5}
            file.write_text(json.dumps(document))
        markdown, _ = page_of([folder], tmp_path / f"out{len(seeds)}")
        row = row_of(markdown, "4 layers")
        assert row["nats per repeated token"] == text
        assert row["nats per new token"] == text.replace("1.250", "3.500")
        assert row_of(markdown, "8 layers")["nats per new token"] == "-"
        assert "a repeated token ends a pair of tokens that stood before in its context, a new one does not" in markdown


def test_the_papers_numbers_stand_beside_ours(of_table1: Path) -> None:
    markdown, page = read(of_table1)
    assert "| 12 | 17.7 | 15.6 | 14.8 | 14.5 | 15.0 | 13.7 |" in markdown
    assert "arXiv 1907.05242" in markdown
    assert "17.7" in page.texts


def test_claims_stand_on_the_page_and_nothing_is_missing(of_table1: Path) -> None:
    markdown, _ = read(of_table1)
    assert "\n- 4 layers + memory against 8 layers: +0.0400 ± 0.0000" in markdown
    assert "missing" not in markdown
    assert "mixed" not in markdown


def test_a_sweep_is_shown_and_its_edge_told(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    highest = folder / f"table1/laptop/4_layers__{HIGHEST}__seed0.json"
    document = json.loads(highest.read_text())
    document["summary"]["bits_per_byte"] = 2.3
    highest.write_text(json.dumps(document))
    markdown, _ = page_of([folder], tmp_path / "out")
    edge = "at the edge of those tried: a better one may lie beyond"
    others = "; ".join(f"{rate}: 2.3900" for rate in (LOWEST, *LOW))
    assert f"| 4 layers | {HIGHEST}: 2.3000; {BEST}: 2.3400; {others} | {edge} |" in markdown
    bits = dict.fromkeys(MEMORY_RATES[-2:], "2.1400") | dict.fromkeys(MEMORY_RATES[:-2], "2.1900")
    tried = "; ".join(f"{rate}: {figure}" for rate, figure in bits.items())
    assert f"| 4 layers + memory | {tried} |" in markdown


def test_every_run_names_machine_commit_and_command(table1: Path, of_table1: Path) -> None:
    markdown, _ = read(of_table1)
    results = find_results(table1)[0]
    for result in results:
        assert f"| {result.file.name} | 2 cores of P (2 used), torch 2 | abc | c |" in markdown


def test_html_has_all_tables_and_pictures_inside(of_table1: Path) -> None:
    markdown, page = read(of_table1)
    images = [attributes["src"] for tag, attributes in page.seen if tag == "img"]
    assert len(images) == 2  # curves, usage
    files = re.findall(r"^Picture: .* \((.*)\)$", markdown, re.MULTILINE)
    for image, file in zip(images, files, strict=True):
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")) == (of_table1 / file).read_bytes()
        assert (of_table1 / file).read_bytes().startswith(b"\x89PNG")
    assert sum(tag == "table" for tag, _ in page.seen) == 4  # ours, the paper's, the sweeps, the runs


def test_a_family_of_lengths_shows_what_is_saved_at_equal_tokens_and_seconds(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(report, "plot_by_text", lambda *given: (drawn.append(given), plot_by_text(*given)))
    make(tmp_path / "in", load_family("more_text", "laptop"), seeds=1)
    markdown, _ = page_of([tmp_path / "in"], tmp_path / "out")
    ((bits, saved, _),) = drawn
    lengths = [1.5e6, 5e6, 15e6, 45e6]
    assert list(bits) == ["no memory", "num_sub_keys 128", "num_sub_keys 512"]
    assert bits["no memory"] == [(length, pytest.approx(2.34)) for length in lengths]
    assert bits["num_sub_keys 512"] == [(length, pytest.approx(2.14)) for length in lengths]
    assert saved["num_sub_keys 128, at equal tokens"] == [(length, pytest.approx(0.2)) for length in lengths]
    assert saved["num_sub_keys 512, at equal seconds"] == [(length, pytest.approx(0.3)) for length in lengths]
    assert "(laptop_more_text_text.png)" in markdown
    assert "laptop_more_text_lines.png" not in markdown


def test_what_is_saved_is_that_of_the_seeds_that_both_have(tmp_path: Path, monkeypatch) -> None:
    """A second seed of the model with the memory, far worse, has no rival and so moves nothing."""
    drawn = []
    monkeypatch.setattr(report, "plot_by_text", lambda *given: (drawn.append(given), plot_by_text(*given)))
    family = load_family("more_text", "laptop")
    folder = tmp_path / "in"
    make(folder, family, seeds=2)
    for file in folder.rglob("4_layers_1500k__*__seed1.json"):
        file.unlink()
    for file in folder.rglob("4_layers_1_memory_512_1500k__*__seed1.json"):
        document = json.loads(file.read_text())
        document["summary"]["bits_per_byte"] = 9.0
        file.write_text(json.dumps(document))
    page_of([folder], tmp_path / "out")
    ((_, saved, _),) = drawn
    assert saved["num_sub_keys 512, at equal tokens"][0] == (1.5e6, pytest.approx(0.2))


def test_partial_results_name_what_is_missing(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    lost = f"8_layers__{rates_of(TABLE1, '8_layers')[1]}__seed0"
    (folder / f"table1/laptop/{lost}.json").unlink()
    (folder / "table1/laptop/speed__0.json").unlink()
    markdown, _ = page_of([folder], tmp_path / "out")
    assert f"- missing: {lost}\n" in markdown
    reason = f"8_layers has no result at seed 0 for {rates_of(TABLE1, '8_layers')[1]}"
    assert f"- missing: 8_layers, seed 1: {reason}" in markdown
    assert "- missing: 8_layers_equal_seconds, seed 0: 8_layers has no result" in markdown
    assert "- missing: the speeds (pkmem experiment table1 --scale laptop)" in markdown
    assert "4 layers + memory against 8 layers: " in markdown
    assert "Whether the claim holds cannot be said yet." in markdown
    assert f"not complete: {reason}" in markdown
    assert "prefill tokens/s" not in row_of(markdown, "8 layers")  # no model has it


def test_one_result_alone_makes_a_page(table1: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    there = f"4_layers__{HIGHEST}__seed0"
    shutil.copy(table1 / f"table1/laptop/{there}.json", tmp_path / "in")
    markdown, _ = page_of([tmp_path / "in"], tmp_path / "out")
    assert row_of(markdown, "4 layers")["bits per byte"] == "2.3400"
    (missing,) = re.findall(r"^- missing: (2_layers__.*)$", markdown, re.MULTILINE)
    family = load_family("table1", "laptop")
    untried = [run.name for cell in family.cells.values() if cell.like is None for run in runs_of(family, cell, 0, [])]
    assert missing.split(", ") == [name for name in untried if name != there]
    assert "- missing: 8_layers_equal_seconds, seed 0: 8_layers has no result" in markdown


def test_several_directories_are_one_and_differences_are_told(table1: Path, tmp_path: Path) -> None:
    other = shutil.copytree(table1, tmp_path / "other")
    for file in other.rglob("*.json"):
        document = json.loads(file.read_text())
        document["environment"] |= {"commit": "def", "gpu": "G"}
        file.write_text(json.dumps(document))
    for file in list(other.rglob("*.json"))[::2]:
        file.unlink()
    some = shutil.copytree(table1, tmp_path / "some")
    for file in other.rglob("*.json"):
        (some / file.relative_to(other)).unlink()
    markdown, _ = page_of([some, other], tmp_path / "out")
    assert "- mixed: 2 commits: abc; def" in markdown
    assert "- mixed: 2 machines: 2 cores of P (2 used), torch 2; G, torch 2" in markdown
    assert "missing: " not in markdown
    assert row_of(markdown, "8 layers")["seeds"] == "2"


def test_results_of_other_recipes_and_damaged_ones_are_named(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    old, broken = (folder / f"table1/laptop/4_layers__{rate}__seed0.json" for rate in (BEST, LOWEST))
    tokens = TABLE1.run(TABLE1.cells["4_layers"], {}).recipe.training.num_tokens
    document = json.loads(old.read_text())
    document["recipe"]["training"]["num_tokens"] = 7_000_000
    old.write_text(json.dumps(document))
    broken.write_text("{")
    markdown, _ = page_of([folder], tmp_path / "out")
    assert f"- unused: {old} is of another recipe (training.num_tokens 7000000 -> {tokens})" in markdown
    assert f"- {broken} is not a result of an experiment, or damaged" in markdown
    assert f"- missing: 4_layers__{LOWEST}__seed0" in markdown


def test_results_without_a_family_or_cell_are_named(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    rates = (BEST, HIGHEST, LOWEST)
    cell, family, scale = (folder / f"table1/laptop/4_layers__{rate}__seed0.json" for rate in rates)
    for file, change in ((cell, {"cell": "5_layers"}), (family, {"family": "table9"}), (scale, {"scale": "phone"})):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    markdown, _ = page_of([folder], tmp_path / "out")
    assert f"- unused: {cell} is of no run of the family as it is" in markdown
    assert "## table9, laptop\n\n- unused: there is no such family any more (no experiment 'table9'" in markdown
    assert "## table1, phone\n\n- unused: there is no such family any more (" in markdown


def test_speed_takes_perplexity_from_table1_and_draws_figure_4(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    make_speeds(folder, load_family("speed", "laptop"))
    markdown, _ = page_of([folder], tmp_path / "out")
    section = markdown[markdown.index("figure 4") :]
    assert "(laptop_speed_speeds.png)" in section
    assert row_of(section, "8 layers")["perplexity"].startswith("65.55")
    assert "against 8 layers" not in section  # the claims are table1's
    assert "| 12 | 14.89 |" in section
    alone = page_of([folder / "speed"], tmp_path / "alone")[0]
    assert "perplexity" not in row_of(alone, "8 layers")
    assert row_of(alone, "8 layers")["words/s"] == "2,500"


def test_speeds_of_other_models_are_not_used(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    file = folder / "table1/laptop/speed__0.json"
    document = json.loads(file.read_text())
    document["recipes"]["4_layers"]["model"]["width"] *= 2
    file.write_text(json.dumps(document))
    markdown, _ = page_of([folder], tmp_path / "out")
    assert f"- unused: {file} measured other models than the family's" in markdown
    assert "words/s" not in row_of(markdown, "4 layers")


def test_speeds_of_a_model_that_is_no_more_serve_the_others(table1: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(table1, tmp_path / "in")
    file = folder / "table1/laptop/speed__0.json"
    document = json.loads(file.read_text())
    for part in ("recipes", "models"):
        document[part]["5_layers"] = document[part]["4_layers"]
    file.write_text(json.dumps(document))
    markdown, _ = page_of([folder], tmp_path / "out")
    assert "measured other models" not in markdown
    assert row_of(markdown, "4 layers")["words/s"] == "5,000"


@pytest.mark.parametrize("name", ["size", "position", "keys", "heads", "layers", "scaling", "facts"])
def test_every_other_family_has_a_section(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(name, "laptop")
    folder = tmp_path / "in" / name / "laptop"
    folder.mkdir(parents=True)
    results: list[Result] = []
    for cell in family.cells.values():
        for run in runs_of(family, cell, 0, results):
            summary = figures("4_layers_1_memory", True, 0) | {"bits_per_fact": 4.5, "recall": 0.75}
            found = {"summary": summary, "held_out": [], "environment": HERE}
            save_result(folder / f"{run.name}.json", family, run, found)
        results = find_results(folder)[0]
    plotted: list[dict] = []
    monkeypatch.setattr(report, "plot_lines", lambda lines, *rest: plotted.append(lines) or plot_lines(lines, *rest))
    markdown, _ = page_of([tmp_path / "in"], tmp_path / "out")
    assert f"## {family.title} ({family.paper}), laptop" in markdown
    for cell in family.cells.values():
        assert row_of(markdown, cell.label)["seeds"] == "1"
    assert (f"(laptop_{name}_lines.png)" in markdown) == bool(family.plot)
    for lines in plotted:  # a model trained for another time is no point beside the one it is like
        assert all(len(points) == len(dict(points)) for points in lines.values())


def test_nothing_to_report_says_how_to_make_a_result(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no result in .*in: make one with `pkmem experiment NAME --out .*in`"):
        write_report([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "in" / "a__b__seed0.json").write_text("{")
    with pytest.raises(ValueError, match=r"a__b__seed0\.json is not a result of an experiment, or damaged"):
        write_report([tmp_path / "in"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere is not a directory: give the --out of an experiment"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_page_replaces_a_page_and_nothing_else(table1: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds no page of `pkmem report`: choose another --out"):
        write_report([table1], tmp_path)
    (tmp_path / "thesis.txt").unlink()
    markdown, html = page_of([table1], tmp_path)
    (tmp_path / "index.html").unlink()  # which a repository need not keep
    again, html_again = page_of([table1], tmp_path)
    assert (again, html_again.texts) == (markdown, html.texts)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")
def test_a_browser_shows_the_page(of_table1: Path, tmp_path: Path) -> None:
    html = of_table1 / "index.html"
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400", f"--screenshot={picture}"]
    subprocess.run([str(BROWSER), *options, html.as_uri()], check=True, timeout=60, capture_output=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (2400, 1200)
    assert pixels[..., :3].std() > 0.05  # something is drawn
