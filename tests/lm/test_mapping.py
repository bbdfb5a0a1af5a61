"""mapping.py: models whose tables stay in their file answer as those that are loaded, and nothing is lost."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from decoders import MEMORY, decoder, ids, with_memories
from pkmem import add_memory
from pkmem.editing.directory import save_with_tables_apart
from pkmem.files.documents import CheckpointError
from pkmem.files.tensor_file import TensorFile
from pkmem.layer.memory import memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.huggingface import PkmemForCausalLM
from pkmem.ops import mapped_rows
from pkmem.ops.mapped_rows import MappedRows

FORMS = ("fp32", "half", "bf16", "int8", "int4")


def saved(folder, form="fp32", **options):
    model = with_memories(options.pop("family", "llama"), **options)
    if form == "half":
        model = model.bfloat16()
    elif form != "fp32":
        model.quantise_values(form)
    model.save_pretrained(folder)
    return folder


class NoTokenizer:
    def save_pretrained(self, folder) -> None:
        pass


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("share_values", [False, True])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_answers_as_the_model_in_memory_to_the_bit(form, share_values, family, tmp_path):
    folder = saved(tmp_path / "model", form, family=family, share_values=share_values)
    loaded, mapped = load(folder), load(folder, values="mmap")
    tokens = ids()
    assert torch.equal(mapped(tokens).logits, loaded(tokens).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(mapped.generate(tokens, **options), loaded.generate(tokens, **options))
    assert {name: tensor.shape for name, tensor in mapped.state_dict().items()} == {
        name: tensor.shape for name, tensor in loaded.state_dict().items()
    }
    assert not any(memory.values.weight.requires_grad for memory in memories_in(mapped).values())
    mapped.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@torch.no_grad()
def test_tables_in_a_file_of_their_own_and_experts_are_mapped_too(tmp_path):
    experts = add_memory(decoder("llama"), [0, 2], replace(MEMORY, experts=True, query_norm="layer"))
    tokens = ids()
    for name, model in (("apart", with_memories()), ("experts", experts)):
        save_with_tables_apart(model, NoTokenizer(), tmp_path / name)
        mapped = load(tmp_path / name, values="mmap")
        assert torch.equal(mapped(tokens).logits, load(tmp_path / name)(tokens).logits)
        assert all(table.mapped.file.path.name == "model-tables.safetensors" for table in tables_in(mapped))


def test_it_can_be_copied_moved_and_written_to_and_the_file_stays(tmp_path):
    folder = saved(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    model, tokens = load(folder, values="mmap"), ids()
    with torch.no_grad():
        expected = model(tokens).logits
        for held in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(held(tokens).logits, expected)
            assert all(table.mapped is None for table in tables_in(held))
        assert torch.isfinite(copy.deepcopy(model).bfloat16()(tokens).logits).all()
        for table in tables_in(model):
            table.weight.add_(1)
        assert not torch.equal(model(tokens).logits, expected)
    assert (folder / "model.safetensors").read_bytes() == before


def test_it_is_not_saved_over_the_file_that_it_is_mapped_from(tmp_path):
    folder = saved(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="which would be overwritten: save the model elsewhere"):
        load(folder, values="mmap").save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_a_directory_lacks_or_says_wrong_is_named(tmp_path):
    def broken(name, change, **options):
        folder = saved(tmp_path / name, **options)
        change(folder)
        return folder

    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def configured(before, after):
        def change(folder):
            text = (folder / "config.json").read_text()
            assert before in text
            (folder / "config.json").write_text(text.replace(before, after))

        return change

    def index(files):
        def change(folder):
            names = TensorFile(folder / "model.safetensors").stored
            (folder.parent / "weights.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
            (folder / "model.safetensors").rename(folder / "weights.safetensors")
            weight_map = dict.fromkeys(names, "weights.safetensors")
            document = {"metadata": {}, "weight_map": weight_map | {name: files for name in names if "values" in name}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(document))

        return change

    for name, change, why, options in (
        ("cut", cut, "model.safetensors: no safetensors file, it has .* truncated", {}),
        (
            "bits",
            configured('"value_bits": 8', '"value_bits": 4'),
            r"values.weight is \(36, 36\) torch.uint8 but",
            {"form": "int8"},
        ),
        ("floats", configured('"value_bits": null', '"value_bits": 8'), "but the config asks for", {}),
        ("packed", configured('"value_bits": 8', '"value_bits": null'), "but the config asks for", {"form": "int8"}),
        ("outside", index("../weights.safetensors"), "is no file of this directory", {}),
    ):
        with pytest.raises(Exception, match=why):
            load(broken(name, change, **options), values="mmap")
    with pytest.raises(ValueError, match="is no directory, and tables are mapped from one"):
        PkmemForCausalLM.from_pretrained("somebody/model", values="mmap")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_one_token_is_read_by_one_kernel_which_asks_for_its_rows(form, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from pkmem.ops.cpu import decoding

    read, asked = [], []
    decode, ask = decoding.decode, MappedRows.ask
    monkeypatch.setattr("pkmem.ops.cpu.decode", lambda x, layer: read.append(len(x)) or decode(x, layer))
    monkeypatch.setattr(
        MappedRows, "ask", lambda mapped, rows, slots: asked.append(slots.shape) or ask(mapped, rows, slots)
    )
    folder = saved(tmp_path / "model", form)
    loaded, mapped = (memories_in(load(folder, **options)).values() for options in ({}, {"values": "mmap"}))
    for held, in_file in zip(loaded, mapped, strict=True):
        for memory in (held, in_file):
            memory.keys.float(), memory.query.float()
        x = torch.randn(1, 32)
        assert torch.equal(in_file(x), held(x))
    assert read == [1] * 4
    assert asked == [(1, MEMORY.heads * MEMORY.knn)] * 2


@pytest.mark.parametrize("num_tokens", [1, 12])
@torch.no_grad()
def test_a_file_that_is_cut_or_written_to_is_named_before_it_is_read(num_tokens, tmp_path):
    for change in ("cut", "written to"):
        save_with_tables_apart(with_memories(), NoTokenizer(), tmp_path / change)
        file = tmp_path / change / "model-tables.safetensors"
        model, tokens = load(tmp_path / change, values="mmap"), torch.zeros(1, num_tokens, dtype=torch.int64)
        model(tokens)
        kept = file.read_bytes()
        if change == "cut":
            os.truncate(file, 4096)
        else:
            with file.open("r+b") as stream:
                stream.seek(len(kept) - 8)
                stream.write(b"12345678")
            os.utime(file, ns=(1, 1))  # clocks may be too coarse to see it
        with pytest.raises(CheckpointError, match=f"{file} was cut or written to since it was opened: load the model"):
            model(tokens)


READ_IN_ANOTHER_PROCESS = """
import hashlib, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import pkmem

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, values="mmap").eval()
try:
    (folder / "more").touch()
except OSError as error:
    print("read-only" if "Read-only" in str(error) else error)
else:
    print("written to")
with torch.no_grad():
    logits = model(torch.arange(12).view(1, -1)).logits
    rows = next(part.values.weight for part in model.modules() if isinstance(part, pkmem.ProductKeyMemory))
    rows.sum()
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
parts = [part for part in Path("/proc/self/smaps").read_text().split("VmFlags") if "model.safetensors" in part]
for kind in (("Shared_Clean", "Shared_Dirty"), ("Anonymous",)):  # what was just saved is dirty until it is on the disk
    lines = [line for part in parts for line in part.splitlines() if line.startswith(kind)]
    print(sum(int(line.split()[1]) for line in lines) * 1024)
"""
AS_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" -c "$3" "$1"'


@pytest.mark.linux
@torch.no_grad()
def test_processes_share_its_pages_on_a_read_only_file_system(tmp_path):
    in_own_tree = [shutil.which("unshare") or "unshare", "--mount", "--map-root-user"]
    if subprocess.run([*in_own_tree, "sh", "-c", "mount --bind /usr /usr"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount anything")
    folder = tmp_path / "model"
    add_memory(decoder(), [1], replace(MEMORY, num_sub_keys=64)).save_pretrained(folder)
    model = load(folder, values="mmap")
    table = next(iter(tables_in(model)))
    table.weight.sum()  # this process has all its pages
    read = subprocess.run(
        [*in_own_tree, "sh", "-c", AS_READ_ONLY, "sh", folder, sys.executable, READ_IN_ANOTHER_PROCESS],
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    mounted, logits, shared, copied = read.stdout.split()
    assert mounted == "read-only"
    assert logits == hashlib.sha256(model(torch.arange(12).view(1, -1)).logits.numpy().tobytes()).hexdigest()
    assert int(shared) >= table.weight.nbytes
    assert int(copied) == 0


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced there")
@torch.no_grad()
def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path):
    file = saved(tmp_path / "model") / "model.safetensors"
    model, tokens = load(tmp_path / "model", values="mmap"), ids()
    expected = model(tokens).logits
    (tmp_path / "other").write_bytes(b"x" * 99)
    (tmp_path / "other").replace(file)
    assert torch.equal(model(tokens).logits, expected)


def test_other_tensors_than_the_config_asks_for_are_named_however_they_are_loaded(tmp_path):
    folder = saved(tmp_path / "model", "int8")
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if name.endswith("values.weight"))
    for table in (whole[name].float(), whole[name][1:], whole[name].flatten(), whole[name].to(torch.int8)):
        save_file(whole | {name: table}, file, metadata={"format": "pt"})
        for options in ({}, {"values": "mmap"}, {"values": "int8"}):
            with pytest.raises(ValueError, match=rf"{file}: {name} is .* but the config asks for \(36, 36\)"):
                load(folder, **options)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_out_of_the_directory_is_not_followed(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="a link; put the file itself there"):
        load(folder, values="mmap")


@pytest.mark.skipif(not mapped_rows._can_ask(), reason="the system takes no advice")
def test_pages_are_asked_for_once_and_again_when_they_were_dropped(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    faults = [3]
    monkeypatch.setattr(mapped_rows, "_faults_that_waited", lambda: faults[0])
    save_file({"rows": torch.zeros(400, 2048)}, tmp_path / "rows.safetensors")  # two pages each
    file = TensorFile(tmp_path / "rows.safetensors")
    rows = file["rows"]
    ahead = MappedRows(rows, file)
    ahead.ask(rows, torch.tensor([[5, 5], [7, 399], [-1, 400]]))
    pages = ahead._asked.nonzero().flatten()
    first = rows.data_ptr() // ahead._page_bytes
    expected = {
        byte // ahead._page_bytes - first
        for row in (5, 7, 399)
        for byte in (
            rows.data_ptr() + row * 8192,
            rows.data_ptr() + row * 8192 + 4096,
            rows.data_ptr() + row * 8192 + 8191,
        )
    }
    assert set(pages.tolist()) == expected
    ahead.ask(rows, torch.tensor([0]))
    assert len(ahead._asked.nonzero()) > len(pages)
    faults[0] += 1
    ahead.ask(rows, torch.tensor([0]))
    assert len(ahead._asked.nonzero()) <= 3
    before = ahead._asked.clone()
    ahead.ask(rows.clone(), torch.tensor([300]))  # another table
    assert torch.equal(ahead._asked, before)


def test_torch_func_and_compilers_see_through_it(tmp_path):
    memory = next(iter(memories_in(load(saved(tmp_path / "model"), values="mmap")).values()))
    x = torch.randn(12, 32)
    weights = {name: tensor.detach() for name, tensor in memory.named_parameters()}
    expected = memory(x)
    assert torch.allclose(torch.func.functional_call(memory, weights, (x,)), expected, atol=1e-6)
    assert torch.func.grad(lambda x: memory(x).sum())(x).isfinite().all()
    assert torch.allclose(torch.compile(memory, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-6)
