"""edit.py: put in and taken out to the last bit, in any order; refused where that cannot be, with the model untouched."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lessons import pupil
from made_edits import FACT, bits_of, made_edit, same_bits
from pkmem import Edit
from pkmem.editing.fingerprint import table_names
from pkmem.editing.rounding import rounded


@pytest.mark.parametrize(
    ("family", "shared", "dtype"),
    [
        ("llama", False, torch.float32),
        ("llama", True, torch.float32),
        ("gemma2", False, torch.bfloat16),  # its embeddings are tied
    ],
)
def test_edits_are_taken_back_in_any_order_to_the_last_bit(family: str, shared: bool, dtype: torch.dtype) -> None:
    model = pupil(family, share_values=shared).to(dtype)
    before = bits_of(model)
    edits = [made_edit(model, [place, place + 7, 200 + place], seed=place) for place in range(3)]
    assert all(len(edit.rows) == (1 if shared else 3) for edit in edits)
    for edit in edits:
        edit.apply(model)
    all_in = bits_of(model)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)):
        out = set()
        for place in order:
            edits[place].undo(model)
            out.add(place)
            assert [edit.is_in(model) for edit in edits] == [number not in out for number in range(3)]
        assert same_bits(bits_of(model), before)
        for place in reversed(order):
            edits[place].apply(model)
        assert same_bits(bits_of(model), all_in)


def test_only_the_rows_of_the_edit_change_and_autograd_sees_it() -> None:
    model = pupil()
    before, edit = bits_of(model), made_edit(model, [5])
    weight = model.get_parameter(table_names(model)[0])
    version, read = weight._version, weight.square().sum()
    edit.apply(model)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.backward()
    after = bits_of(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(table_names(model))
    assert weight.count_nonzero() == weight.shape[1]
    assert torch.equal(weight[5], edit.new[table_names(model)[0]][0])


def test_zero_and_minus_zero_differ() -> None:
    model = pupil()
    edit = made_edit(model, [1])
    edit = dataclasses.replace(edit, new={name: -torch.zeros_like(values) for name, values in edit.new.items()})
    assert not edit.is_in(model)
    edit.apply(model)
    assert edit.is_in(model)
    before = bits_of(model)
    with pytest.raises(ValueError, match="in already"):
        edit.apply(model)
    assert same_bits(bits_of(model), before)


def test_rows_that_stay_are_left_out() -> None:
    edit = made_edit(pupil(), [1, 2, 9])
    first, *others = edit.rows
    new = {name: values.clone() for name, values in edit.new.items()}
    new[first][1] = edit.old[first][1]
    new[others[0]] = edit.old[others[0]]
    less = dataclasses.replace(edit, new=new)
    assert {name: rows.tolist() for name, rows in less.rows.items()} == {first: [1, 9], others[1]: [1, 2, 9]}
    assert less.num_rows == 5
    with pytest.raises(ValueError, match="changes no row"):
        dataclasses.replace(edit, new=edit.old)


def test_an_edit_keeps_its_numbers_whatever_becomes_of_what_it_was_made_of() -> None:
    model = pupil()
    edit = made_edit(model, [1])
    values = {name: torch.ones_like(new) for name, new in edit.new.items()}
    made = dataclasses.replace(edit, new=values)
    for new in values.values():
        new.zero_()
    made.apply(model)
    assert model.get_parameter(table_names(model)[0])[1].eq(1).all()


def test_another_model_is_refused_and_untouched() -> None:
    edit, other = made_edit(pupil(), [1]), pupil()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    before = bits_of(other)
    assert not edit.is_in(other)
    for do in (edit.apply, edit.undo):
        with pytest.raises(
            ValueError, match=rf"belongs to model {edit.fingerprint}, this is model [0-9a-f]{{16}}: use"
        ):
            do(other)
    assert same_bits(bits_of(other), before)


def test_what_is_not_in_is_not_taken_out_and_changed_rows_are_left_alone() -> None:
    model = pupil()
    edit, later = made_edit(model, [1, 2]), made_edit(model, [2, 3], seed=1)
    assert edit.overlaps(later)
    assert not edit.overlaps(made_edit(model, [4]))
    with pytest.raises(ValueError, match=rf"the edit {edit.name} is not in: nothing to do"):
        edit.undo(model)
    edit.apply(model)
    applied = bits_of(model)
    with pytest.raises(ValueError, match="neither in nor out, something else has changed rows of it"):
        later.apply(model)
    assert same_bits(bits_of(model), applied)
    with torch.no_grad():
        model.get_parameter(table_names(model)[2])[2, 0] += 1
    changed = bits_of(model)
    assert not edit.is_in(model)
    for do in (edit.apply, edit.undo):
        with pytest.raises(ValueError, match="neither in nor out"):
            do(model)
    assert same_bits(bits_of(model), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_all_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pupil().to(dtype)
    edit = made_edit(model, [1, 8])
    edit.apply(model)
    second = made_edit(model, [1, 9], seed=1)  # old values that are not zero, and some that are
    for which in (edit, second):
        which.save(tmp_path / "my.edit")
        read = Edit.load(str(tmp_path / "my.edit"))
        assert (read.name, read.fingerprint, read.facts, read.figures) == (
            which.name,
            which.fingerprint,
            [FACT],
            which.figures,
        )
        for part in ("rows", "old", "new"):
            ours, theirs = getattr(which, part), getattr(read, part)
            assert ours.keys() == theirs.keys()
            assert all(
                torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
            )
    assert edit.name != second.name
    assert [path.name for path in tmp_path.iterdir()] == ["my.edit"]


def test_old_values_that_are_all_zero_take_no_room(tmp_path: Path) -> None:
    model = pupil()
    edit, names = made_edit(model, [1, 2]), table_names(model)
    edit.save(tmp_path / "zero.edit")
    assert set(load_file(tmp_path / "zero.edit")) == {f"{name}.{part}" for name in names for part in ("rows", "new")}
    with torch.no_grad():
        model.get_parameter(names[1])[1, 3] = -0.0
    made_edit(model, [1, 2]).save(tmp_path / "minus.edit")
    assert f"{names[1]}.old" in load_file(tmp_path / "minus.edit")
    assert f"{names[0]}.old" not in load_file(tmp_path / "minus.edit")
    Edit.load(tmp_path / "minus.edit").apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_that_fit_a_byte_take_one_and_come_back_as_they_were(dtype, tmp_path: Path) -> None:
    edit = made_edit(pupil().to(dtype), [1, 8])
    first_table = next(iter(edit.new))
    edit = dataclasses.replace(edit, new=edit.new | {first_table: rounded(edit.new[first_table])})
    edit.save(tmp_path / "my.edit")
    stored = load_file(tmp_path / "my.edit")
    for name, new in edit.new.items():
        assert stored[f"{name}.new"].dtype == (torch.int8 if name == first_table else dtype)
        read = Edit.load(tmp_path / "my.edit").new[name]
        assert read.dtype == dtype
        assert torch.equal(read, new)


def test_a_name_says_what_is_put_in() -> None:
    model = pupil()
    one, two = made_edit(model, [1]), made_edit(model, [1], seed=1)
    assert one.name == made_edit(model, [1]).name != two.name
    assert one.name != made_edit(model, [2]).name
    assert len(one.name) == 12


def test_facts_too_long_for_a_header_are_refused(tmp_path: Path) -> None:
    edit = made_edit(pupil(), [1])
    long = dataclasses.replace(edit, facts=[dataclasses.replace(FACT, completion="x" * (5 << 20))])
    with pytest.raises(ValueError, match=r"the edit's facts are 5,\d+,\d+ bytes, more than 4,194,304: split them"):
        long.save(tmp_path / "my.edit")
    assert not list(tmp_path.iterdir())


def parts_of(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    return load_file(path), notes


def first(tensors: dict, part: str) -> str:
    return next(name for name in tensors if name.endswith(f".{part}"))


def in_bytes(tensors: dict, notes: dict, whole=None, exponents=None, dtype="float32") -> None:
    name = first(tensors, "new").removesuffix(".new")
    tensors[f"{name}.new"] = torch.ones(2, 4, dtype=torch.int8) if whole is None else whole
    tensors[f"{name}.exponents"] = torch.zeros(2, dtype=torch.int8) if exponents is None else exponents
    notes["dtypes"] = json.dumps({name: dtype})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: n.pop("pkmem_edit"), "does not say that it is one of form 1"),
        (lambda t, n: n.update(pkmem_edit="9"), "does not say that it is one of form 1"),
        (lambda t, n: n.pop("facts"), "not JSON"),
        (lambda t, n: n.update(facts="{}"), "its facts are no list"),
        (lambda t, n: n.update(facts='[{"prompts": []}]'), "no completion"),
        (lambda t, n: n.update(facts="[" * 100_000), "not JSON"),
        (lambda t, n: n.update(figures="[]"), "its figures no object"),
        (lambda t, n: n.update(figures='{"a": [1]}'), "the figure 'a' is neither a number nor text"),
        (lambda t, n: n.update(dtypes="[]"), "its dtypes are no object"),
        (lambda t, n: n.update(dtypes='{"a": "float32"}'), "'a' has no bytes and exponents that stand for 'float32'"),
        (lambda t, n: in_bytes(t, n, exponents=torch.zeros(3, dtype=torch.int8)), "has no bytes and exponents"),
        (lambda t, n: in_bytes(t, n, whole=torch.zeros(2, 4)), "has no bytes and exponents"),
        (lambda t, n: in_bytes(t, n, whole=torch.ones(2, dtype=torch.int8)), "has no bytes and exponents"),
        (lambda t, n: in_bytes(t, n, dtype=[]), "has no bytes and exponents that stand for"),
        (lambda t, n: in_bytes(t, n, dtype="int64"), "has no bytes and exponents that stand for 'int64'"),
        (lambda t, n: (in_bytes(t, n), n.pop("dtypes")), "it has exponents of no values"),
        (lambda t, n: in_bytes(t, n, torch.full((2, 4), 127).char(), torch.full((2,), 127).char()), "not finite"),
        (lambda t, n: t.pop(first(t, "rows")), "must have the same tables"),
        (lambda t, n: t.pop(first(t, "new")), "must have the same tables"),
        (lambda t, n: t.clear(), "changes no row"),
        (lambda t, n: t.update({"weight": torch.zeros(1)}), "'weight' is neither rows nor values"),
        (lambda t, n: t.update({first(t, "rows"): torch.tensor([8, 1])}), "increasing int64"),
        (lambda t, n: t.update({first(t, "rows"): torch.tensor([1, 1])}), "increasing int64"),
        (lambda t, n: t.update({first(t, "rows"): torch.tensor([-1, 1])}), "increasing int64"),
        (lambda t, n: t.update({first(t, "rows"): torch.tensor([1.0, 8.0])}), "increasing int64"),
        (lambda t, n: t.update({first(t, "rows"): torch.tensor([1])}), "has 1 rows"),
        (lambda t, n: t.update({first(t, "new"): torch.ones(2)}), r"must be \(rows, width\)"),
        (lambda t, n: t.update({first(t, "new"): torch.ones(2, 0)}), r"must be \(rows, width\)"),
        (lambda t, n: t.update({first(t, "new"): torch.ones(2, 4).long()}), "one float dtype"),
        (lambda t, n: t.update({first(t, "new"): torch.full((2, 4), torch.nan)}), "not finite"),
    ],
)
def test_hostile_files_are_refused_in_a_line(change, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my.edit"
    made_edit(pupil(), [1, 8]).save(file)
    tensors, notes = parts_of(file)
    change(tensors, notes)
    save_file(tensors, file, notes)
    with pytest.raises(ValueError, match=message) as caught:
        Edit.load(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: no edit (")
    assert text.endswith("copy it again, or make it anew with `pkmem learn`")
    assert "\n" not in text


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}", b"\x80\x04."]
)
def test_files_of_other_kinds_are_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.edit").write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.edit: no edit \(.*\): copy it again, or make it anew"):
        Edit.load(tmp_path / "my.edit")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    made_edit(pupil(), [1, 8]).save(tmp_path / "my.edit")
    whole = (tmp_path / "my.edit").read_bytes()
    for size in range(0, len(whole), 97):
        (tmp_path / "cut.edit").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no edit"):
            Edit.load(tmp_path / "cut.edit")
    with pytest.raises(ValueError, match=r"absent: no edit \(No such file or directory\)"):
        Edit.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, width, dtype: (rows + 10**9, width, dtype), "rows up to 1,000,000,00"),
        (lambda rows, width, dtype: (rows, width + 1, dtype), "of width"),
        (lambda rows, width, dtype: (rows, width, torch.float64), "torch.float64, but"),
    ],
)
def test_an_edit_that_only_says_it_is_the_models_own_is_refused(change, message: str) -> None:
    model = pupil()
    name, before = table_names(model)[0], bits_of(model)
    true = made_edit(model, [1, 2])
    rows, width, dtype = change(true.rows[name], true.new[name].shape[1], true.new[name].dtype)
    old = {name: torch.zeros(2, width, dtype=dtype)}
    forged = Edit({name: rows}, old, {name: old[name] + 1}, [FACT], {}, true.fingerprint)
    with pytest.raises(ValueError, match=message):
        forged.apply(model)
    norm = next(name for name, tensor in model.named_parameters() if "norm" in name)
    forged = Edit({norm: rows}, {norm: old[name]}, {norm: old[name] + 1}, [FACT], {}, true.fingerprint)
    with pytest.raises(ValueError, match="which is no table of this model"):
        forged.apply(model)
    assert same_bits(bits_of(model), before)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = made_edit(pupil(), [1])
    edit.save(tmp_path / "my.edit")
    before = (tmp_path / "my.edit").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pkmem.editing.edit.write_tensor_file", full)
    with pytest.raises(OSError, match="No space left"):
        made_edit(pupil(), [2]).save(tmp_path / "my.edit")
    assert (tmp_path / "my.edit").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    assert json.loads(parts_of(tmp_path / "my.edit")[1]["facts"]) == [FACT.to_dict()]
