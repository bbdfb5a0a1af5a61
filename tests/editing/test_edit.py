import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decoders import FAMILIES, decoder
from lessons import OF_LESSONS, bits, edit_of, is_as, pupil
from pkmem import Edit
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.reads import tables_of


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_edits_are_taken_out_in_any_order_and_the_rest_stays(order):
    model = pupil(share_values=order[0] == 0)
    before = bits(model)
    edits = [edit_of(model, 10 * place) for place in range(3)]
    for edit in edits:
        edit.apply(model)
    left = list(range(3))
    for place in order:
        edits[place].undo(model)
        left.remove(place)
        assert [edit.is_in(model) for edit in edits] == [other in left for other in range(3)]
    assert is_as(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tables_of_any_dtype_come_back_bit_for_bit(dtype, tmp_path):
    model = pupil().to(dtype)
    with torch.no_grad():
        for table in tables_of(model).values():
            table.weight.normal_()
            table.weight[4, 0] = -0.0
    before, edit = bits(model), edit_of(model, 3)
    edit.save(tmp_path / "an.edit")
    edit = Edit.load(tmp_path / "an.edit")
    edit.apply(model)
    assert not is_as(model, before)
    edit.undo(model)
    assert is_as(model, before)
    assert all(torch.signbit(table.weight[4, 0]) for table in tables_of(model).values())


def test_a_file_holds_all_of_an_edit_and_no_zeros_from_before(tmp_path):
    edit = edit_of(pupil(), 5)
    edit.save(tmp_path / "an.edit")
    loaded = Edit.load(tmp_path / "an.edit")
    assert loaded.name == edit.name
    assert (loaded.facts, loaded.figures, loaded.fingerprint) == (edit.facts, edit.figures, edit.fingerprint)
    for part in ("rows", "old", "new"):
        for name, tensor in getattr(edit, part).items():
            assert torch.equal(getattr(loaded, part)[name], tensor)
    stored = load_file(tmp_path / "an.edit")
    assert {name.rpartition(".")[2] for name in stored} == {"rows", "new"}


def test_rows_without_a_change_are_not_the_edits():
    model = pupil()
    edit = edit_of(model, 0)
    name = next(iter(edit.rows))
    new = {key: values.clone() for key, values in edit.new.items()}
    new[name][1] = 0.0
    less = Edit(edit.rows, edit.old, new, [], {}, edit.fingerprint)
    assert less.rows[name].tolist() == [0, 2]
    with pytest.raises(ValueError, match="the edit changes no row"):
        Edit(edit.rows, edit.old, edit.old, [], {}, edit.fingerprint)


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    model = pupil()
    one, overlapping = edit_of(model, 0), edit_of(model, 2)
    with pytest.raises(ValueError, match=f"the edit {one.name} is not in: nothing to do"):
        one.undo(model)
    one.apply(model)
    held = bits(model)
    with pytest.raises(ValueError, match=f"the edit {one.name} is in already"):
        one.apply(model)
    with pytest.raises(ValueError, match=f"the edit {overlapping.name} is neither in nor out"):
        overlapping.apply(model)
    other = pupil("gpt2")
    with pytest.raises(ValueError, match=f"belongs to model {fingerprint(model)}, this is model {fingerprint(other)}"):
        one.apply(other)
    assert is_as(model, held)
    with torch.no_grad():
        next(iter(tables_of(model).values())).weight[0, 0] = 9.0
    with pytest.raises(ValueError, match="something else has changed rows of it"):
        one.undo(model)


def broken(folder):
    """Files that are no edit, by what is wrong with them."""
    edit = edit_of(pupil(), 0)
    edit.save(folder / "good")
    data = (folder / "good").read_bytes()
    tensors, rows = load_file(folder / "good"), next(name for name in load_file(folder / "good") if "rows" in name)
    notes = {"pkmem_edit": "1", "facts": "[]", "figures": "{}", "fingerprint": "x"}
    made = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "text": b"not an edit at all, but some text that is long enough",
        "header": (1 << 60).to_bytes(8, "little") + b"{}",
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    save_file(tensors, folder / "other safetensors")
    save_file(tensors, folder / "facts", notes | {"facts": json.dumps([{"prompt": 3}])})
    save_file(tensors, folder / "figures", notes | {"figures": "[1]"})
    save_file(tensors | {rows: tensors[rows].flip(0)}, folder / "order", notes)
    save_file(tensors | {rows: -tensors[rows]}, folder / "negative", notes)
    save_file({rows: tensors[rows]}, folder / "no values", notes)
    return [*made, "other safetensors", "facts", "figures", "order", "negative", "no values"]


def test_a_broken_file_is_named_in_one_line(tmp_path):
    for name in [*broken(tmp_path), "missing"]:
        with pytest.raises(ValueError, match="no edit") as caught:
            Edit.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value), name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_is_the_same_model_and_a_trained_one_another(family, tmp_path):
    model = pupil(family)
    known = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == known
    edit_of(model, 0).apply(model)
    assert fingerprint(model) == known
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    assert fingerprint(model) != known
    assert fingerprint(pupil(family, memory=OF_LESSONS).bfloat16()) != known
    assert fingerprint(decoder(family)) != known
