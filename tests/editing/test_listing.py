"""The verbs apply, forget and edits: what they say, and what they refuse with exit code 2."""

import json
from pathlib import Path

import pytest

from lessons import pupil, tokenizer
from made_edits import made_edit
from pkmem.cli import main
from pkmem.editing.directory import save_with_tables_apart


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_with_tables_apart(pupil(), tokenizer(), tmp_path / "model")
    for place in range(2):
        made_edit(pupil(), [place, 9 + place], seed=place).save(tmp_path / f"{place}.edit")
    return tmp_path / "model"


def said(capsys: pytest.CaptureFixture, *arguments: object) -> list[str]:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("pkmem: error: ")


def test_edits_go_in_are_listed_and_go_out(saved: Path, capsys: pytest.CaptureFixture) -> None:
    model = pupil()
    edits = [made_edit(model, [place, 9 + place], seed=place) for place in range(2)]
    first = f"model {edits[0].fingerprint} in {saved}"
    assert said(capsys, "edits", saved) == [first, "no edit is in"]
    lines = said(capsys, "apply", saved, saved.parent / "0.edit", saved.parent / "1.edit")
    assert lines[:2] == [first, "2 edits in, 12 rows changed"]
    assert lines == said(capsys, "edits", saved)
    for edit in edits:
        at = lines.index(f"{edit.name}: 1 facts, 6 rows, 0.0 MB")
        assert lines[at + 1 : at + 3] == ["  recall 0.75, questions 2", "  'Home of Alda is' -> 'Rome'"]
    lines = said(capsys, "forget", saved, edits[0].name)
    assert lines[:3] == [f"{edits[0].name} is out: 6 rows are as they were before", first, "1 edit in, 6 rows changed"]
    said(capsys, "forget", saved, saved.parent / "1.edit")
    assert said(capsys, "edits", saved) == [first, "no edit is in"]


def test_a_copy_that_is_not_in_and_trained_values_are_told(saved: Path, capsys: pytest.CaptureFixture) -> None:
    (saved / "edits").mkdir()
    edit = made_edit(pupil(), [1])
    copy = saved / "edits" / f"{edit.name}.safetensors"
    edit.save(copy)
    assert said(capsys, "edits", saved)[1:] == [
        "no edit is in",
        f"{edit.name}: not in, though a copy is here (an apply or a forget was interrupted): "
        f"apply it again, or delete {copy}",
    ]
    model = pupil()
    made_edit(model, [4]).apply(model)
    save_with_tables_apart(model, tokenizer(), saved.parent / "trained")
    assert said(capsys, "edits", saved.parent / "trained")[1:] == [
        "no edit is in, but its values are not zero: they were trained"
    ]


def test_what_is_wrong_is_one_line(saved: Path, capsys: pytest.CaptureFixture) -> None:
    edit = saved.parent / "0.edit"
    other = saved.parent / "other.edit"
    made_edit(pupil("gpt2"), [1]).save(other)
    (saved.parent / "empty").mkdir()
    (saved.parent / "broken.edit").write_text(json.dumps({}))
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    for arguments, words in (
        (("apply", saved, edit, other), "belongs to model"),
        (("apply", saved, edit, edit), "is given twice: name it once"),
        (("apply", saved, saved.parent / "broken.edit"), "broken.edit: no edit ("),
        (("apply", saved, saved.parent / "absent.edit"), "absent.edit: no edit (No such file or directory)"),
        (("apply", saved.parent / "empty", edit), "holds no model (no config.json)"),
        (("apply", saved.parent / "absent", edit), "is not a directory"),
        (("forget", saved, edit), "is not in: nothing to do"),
        (("forget", saved, "0123456789ab"), "is neither a file nor an edit in"),
        (("edits", saved.parent / "empty"), "holds no model (no config.json)"),
    ):
        assert words in refused(capsys, *arguments)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("verb", ["apply", "forget", "edits"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"Example: pkmem {verb} " in " ".join(capsys.readouterr().out.split())
