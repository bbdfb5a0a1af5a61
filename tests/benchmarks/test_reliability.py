"""The trials of docs/reliability.md hold in their short form, and what they found is kept trial by trial."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reliability import __main__ as reliability
from benchmarks.reliability.outcome import Outcome


@pytest.mark.linux
@pytest.mark.parametrize("number", reliability.TRIALS)
def test_a_trial_holds_in_its_short_form(number: int) -> None:
    outcomes = list(reliability.TRIALS[number](True))
    assert {outcome.number for outcome in outcomes} == {number}
    assert [outcome for outcome in outcomes if outcome.holds is False] == []
    if not [outcome for outcome in outcomes if outcome.holds]:
        pytest.skip("; ".join(outcome.found for outcome in outcomes))


def made_trials(monkeypatch: pytest.MonkeyPatch, **found: bool | None) -> None:
    """Trials 1, 2, ... that find what is given; `broken` raises after it."""

    def trial(number: int, name: str, holds: bool | None) -> reliability.Trial:
        def run(short: bool) -> Iterator[Outcome]:
            yield Outcome(number, name, "yes", f"short: {short}", holds)
            if name == "broken":
                raise ArithmeticError("no such number")

        return run

    trials = {number: trial(number, name, holds) for number, (name, holds) in enumerate(found.items(), 1)}
    monkeypatch.setattr(reliability, "TRIALS", trials)


def kept(out: Path) -> dict[str, list[str]]:
    trials = json.loads(out.read_text())["trials"]
    return {number: [outcome["found"] for outcome in trial["outcomes"]] for number, trial in trials.items()}


def test_trials_run_anew_replace_their_own_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "reliability.json"
    made_trials(monkeypatch, first=True, second=None)
    assert reliability.main(["--out", str(out)]) == 0
    before = json.loads(out.read_text())["trials"]
    assert kept(out) == {"1": ["short: False"], "2": ["short: False"]}
    assert reliability.main(["2", "--short", "--out", str(out)]) == 0
    assert kept(out) == {"1": ["short: False"], "2": ["short: True"]}
    after = json.loads(out.read_text())["trials"]
    assert after["1"] == before["1"]
    assert after["2"]["environment"]["command"] == "python -m benchmarks.reliability 2 --short"
    assert after["2"]["environment"]["versions"]["torch"]


def test_a_trial_that_does_not_hold_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_trials(monkeypatch, first=True, second=False)
    assert reliability.main(["--out", str(tmp_path / "r.json")]) == 1
    assert "DOES NOT HOLD  second" in capsys.readouterr().out
    assert reliability.main(["1", "--short"]) == 0


def test_a_trial_that_breaks_off_does_not_hold_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made_trials(monkeypatch, broken=True, second=True)
    assert reliability.main(["--out", str(tmp_path / "r.json")]) == 1
    assert kept(tmp_path / "r.json") == {
        "1": ["short: False", "ArithmeticError: no such number"],
        "2": ["short: False"],
    }


def test_the_page_explains_every_trial_and_shows_what_was_found_in_full() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for number in reliability.TRIALS:
        assert f"\n{number}. **" in page
    trials = json.loads(reliability.RESULTS.read_text())["trials"]
    assert set(trials) <= {str(number) for number in reliability.TRIALS}
    assert not [number for number, trial in trials.items() if trial["short"]]
    assert not [outcome for trial in trials.values() for outcome in trial["outcomes"] if outcome["holds"] is False]
