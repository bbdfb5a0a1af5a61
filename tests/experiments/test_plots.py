"""Learning curves: the held-out records alone, in a PNG."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pkmem.experiments.plots import plot_by_text, plot_learning_curves, plot_lines, plot_speeds, plot_usage


def records(bits: list[float]) -> list[dict]:
    held_out = [
        {"kind": "held_out", "step": i, "tokens": i * 1_000_000, "seconds": 7.0 * i, "bits_per_byte": b}
        for i, b in enumerate(bits, 1)
    ]
    return [{"kind": "train", "step": 1, "tokens": 5, "seconds": 3.0, "bits_per_byte": 99.0}, *held_out]


def test_curves_are_held_out_bits_per_byte_over_tokens_and_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    path = tmp_path / "curves.png"
    plot_learning_curves({"4 layers": records([3.0, 2.5, 2.25]), "8 layers": records([2.75])}, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    by_tokens, by_seconds = saved[0].axes
    assert [line.get_label() for line in by_tokens.lines] == ["4 layers", "8 layers"]
    assert by_tokens.lines[0].get_xydata().tolist() == [[1, 3.0], [2, 2.5], [3, 2.25]]
    assert by_seconds.lines[0].get_xydata().tolist() == [[7, 3.0], [14, 2.5], [21, 2.25]]
    assert by_seconds.lines[1].get_xydata().tolist() == [[7, 2.75]]
    assert [text.get_text() for text in saved[0].legends[0].texts] == ["4 layers", "8 layers"]
    assert by_tokens.get_xlabel() == "training tokens (millions)"
    assert by_seconds.get_xlabel() == "training time (seconds)"


def test_many_curves_have_colours_of_their_own_and_a_legend_below_the_axes(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_learning_curves(
        {f"a model with a long name, number {i}": records([3.0]) for i in range(16)}, tmp_path / "a.png"
    )
    by_tokens, by_seconds = drawn[0].axes
    for axes in (by_tokens, by_seconds):
        assert len({tuple(line.get_color()) for line in axes.lines}) == 16
        assert axes.get_window_extent().height > 300  # pixels, of the 400 that a picture without a legend has
        assert axes.get_window_extent().ymin > drawn[0].legends[0].get_window_extent().ymax


def test_a_run_without_an_evaluation_is_drawn_empty(tmp_path: Path) -> None:
    plot_learning_curves({"new": records([])}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), savefig(self, *a, **k)))
    return saved


def test_usage_is_drawn_of_models_with_a_memory_alone(tmp_path: Path, drawn: list[Figure]) -> None:
    reads = [{"tokens": i * 10**6, "memory_0/usage": i / 10, "memory_0/kl": 1 / i} for i in (1, 2)]
    plot_usage({"dense": [{"tokens": 1.0}], "memory": reads}, tmp_path / "usage.png")
    usage, kl = drawn[0].axes
    (line,) = usage.lines
    assert line.get_xydata().tolist() == [[1, 10], [2, 20]]
    assert kl.lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5]]
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")


def test_lines_are_sorted_and_levels_horizontal(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_lines({"a": [(4, 1.0), (2, 3.0)]}, {"none": 2.5}, tmp_path / "lines.png", "slots", "bits")
    line, level = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[2, 3.0], [4, 1.0]]
    assert set(level.get_ydata()) == {2.5}
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["a", "none"]


def test_what_a_memory_saves_is_drawn_beside_what_models_reach(tmp_path: Path, drawn: list[Figure]) -> None:
    bits = {"no memory": [(5e6, 1.5), (1.5e6, 1.7)], "512": [(1.5e6, 1.6), (5e6, 1.45)]}
    plot_by_text(bits, {"512, at equal tokens": [(5e6, 0.05), (1.5e6, 0.1)]}, tmp_path / "text.png")
    left, right = drawn[0].axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1.5, 1.7], [5, 1.5]], [[1.5, 1.6], [5, 1.45]]]
    assert right.lines[0].get_xydata().tolist() == [[1.5, 0.1], [5, 0.05]]
    assert left.get_xscale() == right.get_xscale() == "log"
    assert [text.get_text() for text in left.get_xticklabels()] == ["1.5", "5"]
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")


def test_speeds_are_points_with_names(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_speeds({"4 layers": (900.0, 20.0), "8 layers": (500.0, 18.0)}, tmp_path / "speeds.png")
    axes = drawn[0].axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[900, 20]], [[500, 18]]]
    assert [text.get_text() for text in axes.texts] == ["4 layers", "8 layers"]
