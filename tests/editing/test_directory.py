import hashlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from decoders import decoder
from lessons import edit_of, is_as, pupil, tokenizer
from pkmem.editing import directory
from pkmem.editing.directory import SavedModel, apply_edits, forget_edit, save_with_tables_apart
from pkmem.editing.edit import Edit
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.listing import describe_edits


@pytest.fixture(params=["apart", "whole"])
def saved(request, tmp_path):
    model, folder = pupil(share_values=request.param == "whole"), tmp_path / "model"
    if request.param == "apart":
        save_with_tables_apart(model, tokenizer(), folder)
    else:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return model, folder


def files_of(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_a_saved_model_is_known_without_loading_it(saved):
    model, folder = saved
    found = SavedModel(folder)
    assert found.fingerprint == fingerprint(model)
    assert found.edits_in() == []
    assert found.is_zero()
    assert is_as(AutoModelForCausalLM.from_pretrained(folder), model.state_dict())


def test_edits_go_in_and_come_out_in_any_order(saved):
    model, folder = saved
    before, edits = files_of(folder), [edit_of(model, 10 * place) for place in range(3)]
    apply_edits(folder, edits[:2])
    assert {edit.name for edit in apply_edits(folder, edits[2:]).edits_in()} == {edit.name for edit in edits}
    for edit in edits:
        edit.apply(model)
    assert is_as(AutoModelForCausalLM.from_pretrained(folder), model.state_dict())
    forget_edit(folder, edits[1].name)
    edits[1].undo(model)
    assert is_as(AutoModelForCausalLM.from_pretrained(folder), model.state_dict())
    text = describe_edits(SavedModel(folder))
    assert "2 edits in, " in text
    assert edits[0].name in text
    assert edits[1].name not in text
    edits[2].save(folder.parent / "a file")
    forget_edit(folder, str(folder.parent / "a file"))
    _, last = forget_edit(folder, edits[0].name)
    assert last.name == edits[0].name
    assert files_of(folder) == before


@pytest.mark.parametrize("fails_at", ["save", "_copy", "_write_rows", "replace"])
def test_a_failure_at_any_stage_leaves_an_edit_in_or_out(saved, fails_at, monkeypatch):
    model, folder = saved
    edit, second = edit_of(model, 0), edit_of(model, 10)
    apply_edits(folder, [edit])
    held = files_of(folder)

    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if fails_at == "save":
            broken.setattr(Edit, "save", fail)
        elif fails_at == "replace":
            broken.setattr("pkmem.text.durable.move", fail)
        else:
            broken.setattr(directory, fails_at, fail)
        with pytest.raises(OSError, match="No space left"):
            apply_edits(folder, [second])
        if fails_at != "save":
            with pytest.raises(OSError, match="No space left"):
                forget_edit(folder, edit.name)
    assert files_of(folder) == held
    assert [held.name for held in SavedModel(folder).edits_in()] == [edit.name]


def test_a_kill_between_copy_and_tables_is_told_and_mended(saved):
    model, folder = saved
    edit = edit_of(model, 0)
    (folder / "edits").mkdir()
    edit.save(folder / "edits" / f"{edit.name}.safetensors")  # killed before the tables were replaced
    assert "not in, though its copy is here" in describe_edits(SavedModel(folder))
    apply_edits(folder, [edit])
    copy = (folder / "edits" / f"{edit.name}.safetensors").read_bytes()
    forget_edit(folder, edit.name)
    (folder / "edits").mkdir()
    (folder / "edits" / f"{edit.name}.safetensors").write_bytes(copy)  # killed before the copy was removed
    assert SavedModel(folder).edits_in() == []


def test_what_does_not_fit_is_refused_and_nothing_is_changed(saved):
    model, folder = saved
    edit, overlapping = edit_of(model, 0), edit_of(model, 2)
    other = edit_of(pupil("gpt2"), 20)
    apply_edits(folder, [edit])
    held = files_of(folder)
    for edits, words in (
        ([edit], "is in already"),
        ([overlapping], f"rows of it belong to {edit.name}"),
        ([edit_of(model, 20), other], "belongs to model"),
        ([edit_of(model, 20), edit_of(model, 20)], "is given twice"),
        ([edit_of(model, 20), edit_of(model, 22)], "could not be taken out alone"),
    ):
        with pytest.raises(ValueError, match=words):
            apply_edits(folder, edits)
    with pytest.raises(ValueError, match=f"neither a file nor an edit in .*: its edits are {edit.name}"):
        forget_edit(folder, "nothing")
    assert files_of(folder) == held


def test_a_directory_without_memories_is_refused(tmp_path):
    model = decoder("llama")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no memories: put some in with `pkmem retrofit"):
        SavedModel(tmp_path / "plain")
    with pytest.raises(ValueError, match="is not a directory"):
        SavedModel(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no memories"):
        save_with_tables_apart(model, tokenizer(), tmp_path / "more")


@pytest.mark.linux
def test_zeros_take_no_room(tmp_path):
    save_with_tables_apart(pupil(), tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / "model-tables.safetensors"
    assert all(not tensor.any() for tensor in load_file(file).values())
    large = tmp_path / "large"
    with large.open("wb") as target:
        target.write(b"x" * 5000)
        target.truncate(8 << 20)
    with (tmp_path / "copy").open("wb") as target:
        directory._copy(large, target)
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 4 << 20


def test_tables_keep_the_other_files_as_they_are(tmp_path):
    model = pupil()
    save_with_tables_apart(model, tokenizer(), tmp_path / "model")
    before = files_of(tmp_path / "model")
    apply_edits(tmp_path / "model", [edit_of(model, 0)])
    after = files_of(tmp_path / "model")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"model-tables.safetensors"}
    assert len(after) == len(before) + 1
    with pytest.raises(ValueError, match="already exists"):
        save_with_tables_apart(model, tokenizer(), tmp_path / "model")
    assert torch.equal(next(iter(SavedModel(tmp_path / "model").tables.values()))[9], torch.zeros(32))
