"""Language models whose value tables are in few bits: loaded so, saved, loaded again, read as they are."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoders import MEMORY, decoder, ids, with_memories
from pkmem import add_memory, learn
from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import tables_in
from pkmem.lm.huggingface import VALUE_BITS, PkmemForCausalLM
from pkmem.lm.inspection import describe_memories
from pkmem.ops.packing import pack_rows, unpack_rows

by_form = pytest.mark.parametrize("stored", ["int8", "int4"])


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@by_form
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("share_values", [False, True])
@torch.no_grad()
def test_a_model_is_loaded_so_and_saved_and_loaded_to_the_bit(family, share_values, stored, tmp_path):
    model = with_memories(family, share_values=share_values)
    model.save_pretrained(tmp_path / "floats")
    quantised = load(tmp_path / "floats", values=stored)
    assert isinstance(quantised, PkmemForCausalLM)
    for table in tables_in(model):  # the same numbers as floats
        rows = pack_rows(table.weight, VALUE_BITS[stored])
        table.weight.copy_(unpack_rows(rows, table.weight.shape[1], VALUE_BITS[stored]))
    tokens = ids()
    assert torch.allclose(quantised(tokens).logits, model(tokens).logits, atol=1e-5)
    quantised.save_pretrained(tmp_path / "few")
    again = load(tmp_path / "few")
    assert again.config.value_bits == VALUE_BITS[stored]
    assert len({part for part in again.modules() if isinstance(part, QuantisedValues)}) == (1 if share_values else 2)
    assert torch.equal(again(tokens).logits, quantised(tokens).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens, **options), quantised.generate(tokens, **options))
    again.save_pretrained(tmp_path / "again")
    few, anew = (tmp_path / name / "model.safetensors" for name in ("few", "again"))
    assert few.read_bytes() == anew.read_bytes()
    assert few.stat().st_size < (tmp_path / "floats" / "model.safetensors").stat().st_size


@by_form
def test_other_dtypes_leave_the_rows_alone(stored, tmp_path):
    with_memories("llama").save_pretrained(tmp_path / "floats")
    load(tmp_path / "floats", values=stored).save_pretrained(tmp_path / "few")
    full, half = load(tmp_path / "few"), load(tmp_path / "few", dtype=torch.bfloat16)
    for ours, theirs in zip(memories_in(half).values(), memories_in(full).values(), strict=True):
        assert torch.equal(ours.values.weight, theirs.values.weight)
        assert ours.keys.sub_keys.dtype == torch.bfloat16
    assert half(ids()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("experts", [False, True])
@torch.no_grad()
def test_tables_in_bf16_beside_a_model_in_fp32_are_those_numbers_rounded(experts, tmp_path):
    model = add_memory(decoder("llama"), [0, 2], replace(MEMORY, experts=experts, query_norm="layer")).eval()
    model.save_pretrained(tmp_path / "floats")
    halved = load(tmp_path / "floats", values="bf16")
    for table in tables_in(model):
        table.weight.copy_(table.weight.bfloat16())
    assert all(table.weight.dtype == torch.bfloat16 for table in tables_in(halved))
    assert {weight.dtype for weight in halved.parameters()} == {torch.float32, torch.bfloat16}
    whole = ids()
    for tokens in (whole, whole[:1, :1]):
        assert torch.allclose(halved(tokens).logits, model(tokens).logits, atol=0.02)  # sums are rounded to bf16, too
    halved.save_pretrained(tmp_path / "few")
    again = load(tmp_path / "few")
    assert again.config.value_bits == 16
    assert torch.equal(again(whole).logits, halved(whole).logits)
    again.save_pretrained(tmp_path / "again")
    few, anew = (tmp_path / name / "model.safetensors" for name in ("few", "again"))
    assert few.read_bytes() == anew.read_bytes()
    with torch.enable_grad():
        halved(whole, labels=whole).loss.backward()
    assert all(table.weight.grad is not None for table in tables_in(halved))


def test_the_same_form_again_is_no_mistake_and_another_one_is(tmp_path):
    with_memories().save_pretrained(tmp_path / "floats")
    load(tmp_path / "floats", values="int8").save_pretrained(tmp_path / "few")
    assert load(tmp_path / "few", values="int8").config.value_bits == 8
    with pytest.raises(ValueError, match="stored in 8 bits already: start from the model as it was trained"):
        load(tmp_path / "few", values="int4")
    for wrong in ("int2", "zero"):
        with pytest.raises(ValueError, match=f"values is '{wrong}' but must be one of 'bf16', 'int8', 'int4'"):
            load(tmp_path / "floats", values=wrong)
    with pytest.raises(ValueError, match="values is 'fp8' but must be one of"):
        with_memories().quantise_values("fp8")


def test_a_config_that_disagrees_with_its_tensors_is_no_model(tmp_path):
    with_memories().save_pretrained(tmp_path / "floats")
    load(tmp_path / "floats", values="int8").save_pretrained(tmp_path / "few")
    for folder, before, after in (("few", '"value_bits": 8', '"value_bits": 4'), ("floats", "null", "8")):
        config = tmp_path / folder / "config.json"
        text = config.read_text()
        before = before if folder == "few" else '"value_bits": null'
        assert before in text
        config.write_text(text.replace(before, after if folder == "few" else '"value_bits": 8'))
        with pytest.raises(ValueError, match=r"model.safetensors: .*values\.weight is .* but the config asks for"):
            load(tmp_path / folder)


def test_what_is_inside_is_described(tmp_path):
    model = with_memories()
    model.quantise_values("int4")
    shown = describe_memories(model)
    assert "values 36 x 32 int4, 0.0 MB" in shown
    assert "norm of a value: median" in shown


def test_it_cannot_be_taught(tmp_path):
    model = with_memories("llama", placement="parallel")
    model.quantise_values("int8")
    with pytest.raises(ValueError, match="the model's values are quantised: teach the model as it was before"):
        learn(model, None, [])
