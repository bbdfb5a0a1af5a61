"""directory.py: edits in a saved model's files, all of it or nothing, whatever happens meanwhile."""

import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoders import decoder
from lessons import pupil, tokenizer
from made_edits import bits_of, made_edit, same_bits
from pkmem import Edit
from pkmem.editing import directory
from pkmem.editing.directory import SavedModel, apply_edits, forget_edit, save_with_tables_apart
from pkmem.editing.fingerprint import fingerprint, table_names
from pkmem.files import durable
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.training.saved import load_saved

pytest_plugins = "tiny"
MODEL = pupil()  # not to be changed


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model saved with its tables apart; not to be changed."""
    out = tmp_path_factory.mktemp("models") / "apart"
    save_with_tables_apart(pupil(), tokenizer(), out)
    return out


@pytest.fixture
def saved(apart: Path, tmp_path: Path) -> Path:
    return shutil.copytree(apart, tmp_path / "model")


def loaded(path: Path) -> PkmemForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(do: Callable[[], object], folder: Path, message: str) -> None:
    """Runs what must be refused, in a line, with nothing changed."""
    before = files_in(folder)
    with pytest.raises(ValueError, match=message) as caught:
        do()
    assert "\n" not in str(caught.value)
    assert files_in(folder) == before


# Saving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "shared"), [("llama", False), ("gemma2", True)])
def test_tables_apart_load_as_before(family: str, shared: bool, tmp_path: Path) -> None:
    model, whole, apart = pupil(family, share_values=shared), tmp_path / "whole", tmp_path / "apart"
    made_edit(model, [2]).apply(model)
    model.save_pretrained(whole)
    tokenizer().save_pretrained(whole)
    save_with_tables_apart(model, tokenizer(), apart)
    tables, others = (load_file(apart / f"model-{part}.safetensors") for part in ("tables", "others"))
    assert list(tables) == sorted(table_names(model))
    assert (tables | others).keys() == load_file(whole / "model.safetensors").keys()
    weights = {
        "model.safetensors",
        "model.safetensors.index.json",
        "model-tables.safetensors",
        "model-others.safetensors",
    }
    described, ours = files_in(whole), files_in(apart)
    assert {name: ours[name] for name in ours.keys() - weights} == {
        name: described[name] for name in described.keys() - weights
    }
    again = loaded(apart)
    assert same_bits(bits_of(again), bits_of(model))
    assert same_bits(bits_of(load_saved(apart)[0]), bits_of(model))
    assert AutoTokenizer.from_pretrained(apart)("Rome") == tokenizer()("Rome")
    assert SavedModel(apart).fingerprint == SavedModel(whole).fingerprint == fingerprint(model)


def test_nothing_is_saved_over_something(saved: Path) -> None:
    refused(lambda: save_with_tables_apart(pupil(), tokenizer(), saved), saved, "already exists: choose another")
    refused(lambda: save_with_tables_apart(decoder(), tokenizer(), saved / "x"), saved, "has no memories: put some in")


# Apply and forget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["apart", "whole"])
def test_edits_go_in_and_out_of_files_as_of_the_loaded_model(form: str, saved: Path) -> None:
    model = pupil()
    if form == "whole":
        shutil.rmtree(saved)
        model.save_pretrained(saved)
    before = files_in(saved)
    edits = [made_edit(model, [place, 100 + place], seed=place) for place in range(3)]
    apply_edits(saved, edits[:1])
    changed = "model-tables.safetensors" if form == "apart" else "model.safetensors"
    assert {name for name, content in files_in(saved).items() if before.get(name) != content} == {
        changed,
        str(Path("edits", f"{edits[0].name}.safetensors")),
    }
    inside = apply_edits(saved, edits[1:])
    for edit in edits:
        edit.apply(model)
    assert same_bits(bits_of(loaded(saved)), bits_of(model))
    assert {edit.name for edit in inside.edits_in()} == {edit.name for edit in edits}
    for place, which in ((1, edits[1].name), (0, str(saved / "edits" / f"{edits[0].name}.safetensors"))):
        after, edit = forget_edit(saved, which)
        edits[place].undo(model)
        assert edit.name == edits[place].name
        assert edit.name not in {other.name for other in after.edits_in()}
        assert same_bits(bits_of(loaded(saved)), bits_of(model))
    forget_edit(saved, edits[2].name)
    assert files_in(saved) == before
    assert not (saved / "edits").exists()


def test_bf16_and_values_that_were_trained(tmp_path: Path) -> None:
    model = pupil().bfloat16()
    made_edit(model, list(range(400)), seed=9).apply(model)
    save_with_tables_apart(model, tokenizer(), tmp_path / "model")
    before = files_in(tmp_path / "model")
    edit = made_edit(model, [3, 399])
    apply_edits(tmp_path / "model", [edit])
    edit.apply(model)
    assert same_bits(bits_of(loaded(tmp_path / "model")), bits_of(model))
    forget_edit(tmp_path / "model", edit.name)
    assert files_in(tmp_path / "model") == before


def test_a_run_has_its_model_edited(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    model, _ = load_saved(run)
    edit = made_edit(model, [1, 5])
    apply_edits(run, [edit])
    assert (run / "model" / "edits" / f"{edit.name}.safetensors").exists()
    assert edit.is_in(load_saved(run)[0])
    forget_edit(run, edit.name)
    shutil.rmtree(run / "model")
    refused(lambda: apply_edits(run, [edit]), run, f"`pkmem export {run}` makes one")


def test_permissions_stay(saved: Path) -> None:
    (saved / "model-tables.safetensors").chmod(0o640)
    apply_edits(saved, [made_edit(pupil(), [1])])
    assert (saved / "model-tables.safetensors").stat().st_mode & 0o777 == 0o640


# What is refused --------------------------------------------------------------------------------------------


def test_what_cannot_go_in_is_refused_and_nothing_of_it_goes_in(saved: Path, plain_gpt2: Path) -> None:
    model = pupil()
    edit, overlapping, free = made_edit(model, [1, 2]), made_edit(model, [2, 3], seed=1), made_edit(model, [7], seed=2)
    foreign = made_edit(pupil("gpt2"), [1])
    refused(
        lambda: apply_edits(saved, [free, foreign]), saved, rf"belongs to model {foreign.fingerprint}, this is model"
    )
    refused(
        lambda: apply_edits(saved, [edit, overlapping]),
        saved,
        f"rows of the edit {overlapping.name} belong to {edit.name}",
    )
    refused(lambda: apply_edits(saved, [free, free]), saved, f"the edit {free.name} is given twice")
    refused(lambda: forget_edit(saved, "x.edit"), saved, "x.edit is neither a file nor an edit in .*: no edit is in")
    apply_edits(saved, [edit])
    refused(lambda: apply_edits(saved, [free, edit]), saved, f"the edit {edit.name} is in already")
    refused(
        lambda: apply_edits(saved, [free, overlapping]),
        saved,
        f"neither in nor out, rows of it belong to {edit.name}: take",
    )
    edit.apply(model)
    stacked = made_edit(model, [1], seed=3)  # learned with the other in, so its rows do hold the old values
    refused(lambda: apply_edits(saved, [stacked]), saved, f"rows of the edit {stacked.name} belong to {edit.name}")
    free.save(saved.parent / "free.edit")
    refused(lambda: forget_edit(saved, str(saved.parent / "free.edit")), saved, f"the edit {free.name} is not in")
    refused(
        lambda: forget_edit(saved, free.name), saved, f"neither a file nor an edit in .*: its edits are {edit.name}"
    )
    refused(lambda: apply_edits(plain_gpt2, [edit]), plain_gpt2, "has no memories: put some in with `pkmem retrofit")
    refused(lambda: apply_edits(saved / "edits", [edit]), saved, "holds no model")


def test_rows_changed_by_something_else_are_left_alone(saved: Path) -> None:
    edit = made_edit(pupil(), [1, 2])
    apply_edits(saved, [edit])
    file = saved / "model-tables.safetensors"
    content = bytearray(file.read_bytes())
    place = content.find(edit.new[next(iter(edit.rows))][1].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    path = saved / "edits" / f"{edit.name}.safetensors"
    for do in (lambda: forget_edit(saved, str(path)), lambda: apply_edits(saved, [edit])):
        refused(do, saved, "neither in nor out, something else has changed rows of it")
    assert SavedModel(saved).edits_in() == []


def test_a_broken_copy_is_named(saved: Path) -> None:
    edit = made_edit(pupil(), [1])
    apply_edits(saved, [edit])
    copy = saved / "edits" / f"{edit.name}.safetensors"
    copy.write_bytes(copy.read_bytes()[:100])
    refused(lambda: apply_edits(saved, [made_edit(pupil(), [2])]), saved, rf"{copy.name}: no edit \(")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_not_followed(saved: Path, tmp_path: Path) -> None:
    (saved / "edits").symlink_to(tmp_path)
    refused(lambda: apply_edits(saved, [made_edit(pupil(), [1])]), saved, "a link; put the file itself there")


def test_tables_in_several_files_cannot_be_replaced_at_once(tmp_path: Path) -> None:
    model, folder = pupil(), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(SavedModel(folder).files_of(table_names(model))) > 1
    refused(
        lambda: apply_edits(folder, [made_edit(model, [1])]), folder, "the tables are in . files.*save the model in one"
    )


# Kills and failures -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process, as far as the code under test can tell: nothing of it runs after."""


STAGES = ("save", "_patch", "shutil.copymode", "_change", "_write", "sync", "move", "after move", "done")


def fail_at(stage: str, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Has the next work on a directory fail at a stage of it."""

    def fail(*_: object, **__: object) -> None:
        raise error

    if stage in ("sync", "move"):  # of the weights, not of the copy before
        real = getattr(durable, stage)

        def of_weights(path: Path, *rest: Path) -> None:
            if path.name.startswith("model"):
                raise error
            real(path, *rest)

        monkeypatch.setattr(f"pkmem.files.durable.{stage}", of_weights)
    elif stage == "after move":
        real_sync = durable.sync

        def of_folder(path: Path) -> None:
            real_sync(path)
            if path.name == "model":
                raise error

        monkeypatch.setattr("pkmem.files.durable.sync", of_folder)
    elif stage == "save":
        monkeypatch.setattr(Edit, "save", fail)
    elif stage == "done":
        monkeypatch.setattr(directory, "_keep_copies_of_what_is_in", fail)
    else:
        monkeypatch.setattr(f"pkmem.editing.directory.{stage}", fail)


@pytest.mark.parametrize("verb", ["apply", "forget"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("killed", [False, True])
def test_wherever_it_fails_the_edit_is_in_or_out(
    killed: bool, stage: str, verb: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "forget" and stage == "save":
        pytest.skip("forget saves no copy")
    kept, edit, file = made_edit(MODEL, [8], seed=1), made_edit(MODEL, [1, 2]), saved / "model-tables.safetensors"
    apply_edits(saved, [kept])
    content = {"out": file.read_bytes()}
    apply_edits(saved, [edit])
    content["in"] = file.read_bytes()
    if verb == "apply":
        forget_edit(saved, edit.name)
    with monkeypatch.context() as patch:
        if killed:  # what would run after the failure does not
            patch.setattr(directory, "_keep_copies_of_what_is_in", lambda *_: None)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
        fail_at(stage, patch, Killed() if killed else OSError(28, "No space left on device"))
        with pytest.raises(Killed if killed else OSError):
            apply_edits(saved, [edit]) if verb == "apply" else forget_edit(saved, edit.name)
    state = "in" if SavedModel(saved).holds(edit) else "out"
    was, becomes = ("out", "in") if verb == "apply" else ("in", "out")
    assert state == (becomes if stage in ("after move", "done") else was)
    assert file.read_bytes() == content[state]
    copy = saved / "edits" / f"{edit.name}.safetensors"
    if state == "in":
        assert copy.exists()
    elif not killed and stage != "done":
        assert not copy.exists()
    if not killed:
        assert not list(saved.rglob("*.tmp"))
    if state == "out":  # it goes on from there
        apply_edits(saved, [edit])
    forget_edit(saved, edit.name)
    assert file.read_bytes() == content["out"]
    assert sorted(path.name for path in (saved / "edits").glob("*.safetensors")) == [f"{kept.name}.safetensors"]
    assert not list(saved.glob("*.tmp"))


def test_a_change_by_another_program_is_not_lost(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, other = made_edit(pupil(), [1]), made_edit(pupil(), [2], seed=1)
    real = directory._write

    def meanwhile(*arguments) -> None:
        real(*arguments)
        monkeypatch.setattr(directory, "_write", real)
        apply_edits(saved, [other])

    monkeypatch.setattr(directory, "_write", meanwhile)
    with pytest.raises(ValueError, match="was changed by another program meanwhile: try again"):
        apply_edits(saved, [edit])
    assert [inside.name for inside in SavedModel(saved).copies()] == [other.name]
    assert SavedModel(saved).holds(other)


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="the system does not tell of holes")
def test_holes_between_numbers_are_copied_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for start in (0, 8192, 3 << 20, (3 << 20) + 12288, 9 << 20):  # holes of a page, and of many
            file.seek(start)
            file.write(os.urandom(5000) if start < 9 << 20 else b"")
        file.truncate(9 << 20)
    with source.open("rb") as old, target.open("wb") as new:
        mapped = mmap.mmap(old.fileno(), 0, access=mmap.ACCESS_READ)
        directory._write(new, mapped, directory._written(old, 9 << 20))
    assert target.read_bytes() == source.read_bytes()
