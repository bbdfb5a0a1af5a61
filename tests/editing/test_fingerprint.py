"""fingerprint.py: edits leave it, everything else changes it, and a saved model has it like the loaded one."""

import dataclasses

import pytest
import torch

from decoders import FAMILIES, decoder, reloaded, with_memories
from lessons import OF_LESSONS, pupil
from made_edits import made_edit
from pkmem.editing.directory import SavedModel
from pkmem.editing.fingerprint import fingerprint, saved_tensors, table_names
from pkmem.files.tensor_file import TensorFile


@pytest.mark.parametrize(("family", "shared"), [*((family, False) for family in FAMILIES), ("gpt2", True)])
def test_files_have_the_fingerprint_of_the_loaded_model(family: str, shared: bool, tmp_path) -> None:
    model = with_memories(family, share_values=shared)
    loaded = reloaded(model, tmp_path)
    saved = SavedModel(tmp_path)
    assert fingerprint(model) == fingerprint(loaded) == saved.fingerprint
    assert saved_tensors(model).keys() == TensorFile(tmp_path / "model.safetensors").stored.keys()
    assert list(saved.tables) == table_names(model)
    assert len(saved.tables) == (1 if shared else 2)


def test_bf16_files_too(tmp_path) -> None:
    model = with_memories("llama").bfloat16()
    assert fingerprint(model) == fingerprint(reloaded(model, tmp_path)) == SavedModel(tmp_path).fingerprint
    assert fingerprint(model) != fingerprint(with_memories("llama"))


def test_edits_leave_it_and_every_other_tensor_changes_it() -> None:
    model = pupil()
    before = fingerprint(model)
    assert len(before) == 16
    made_edit(model, [0, 3]).apply(model)
    assert fingerprint(model) == before
    for name, tensor in saved_tensors(model).items():
        kept = tensor.clone()
        tensor.add_(1)
        assert (fingerprint(model) == before) == (name in table_names(model)), name
        tensor.copy_(kept)
    assert fingerprint(model) == before


def test_names_shapes_and_dtypes_count() -> None:
    prints = [fingerprint(model) for model in (pupil(), pupil("gpt2"), pupil().half(), decoder("llama"))]
    assert len(set(prints)) == len(prints)


def test_how_memories_read_counts_and_how_they_train_does_not() -> None:
    prints = {
        what: fingerprint(pupil(memory=dataclasses.replace(OF_LESSONS, **what_changes)))
        for what, what_changes in {
            "": {},
            "knn": {"knn": OF_LESSONS.knn - 1},
            "norm": {"query_norm": "rms"},
            "dropout": {"dropout": 0.5},
        }.items()
    }
    assert prints[""] == prints["dropout"]
    assert len({prints["knn"], prints["norm"], prints[""]}) == 3


def test_a_tensor_under_several_names_counts_once_under_the_first() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    apart = fingerprint(model)
    model[1].weight = model[0].weight
    assert list(saved_tensors(model)) == ["0.weight"]
    assert fingerprint(model) != apart
