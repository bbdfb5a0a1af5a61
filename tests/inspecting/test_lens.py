"""What a value says: the product with the output embedding, sorted in full."""

import numpy as np
import pytest
import torch

from inspected import VOCABULARY, build, only_memory
from pkmem.inspecting.lens import output_embedding, project_values, values_of, why_not_projected
from pkmem.lm.huggingface import PkmemForCausalLM


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_tokens_for_and_against_are_the_largest_and_smallest_logits(family: str, chunk: int, monkeypatch) -> None:
    monkeypatch.setattr("pkmem.inspecting.lens._LOGITS_AT_ONCE", chunk)
    model = build(family=family)
    memory, slots = only_memory(model), torch.tensor([63, 0, 17])
    embedding = output_embedding(model, VOCABULARY)
    found = project_values(memory, slots, embedding, 4)
    head = model.get_output_embeddings().weight.detach().double().numpy()
    for row, slot in enumerate(slots.tolist()):
        logits = head @ memory.values.weight[slot].detach().double().numpy()
        order = np.argsort(-logits)
        assert found.tokens_for[row].tolist() == order[:4].tolist()
        assert found.tokens_against[row].tolist() == order[::-1][:4].tolist()
        assert found.deviations[row].item() == pytest.approx((logits.max() - logits.mean()) / logits.std(), rel=1e-4)


def test_quantised_and_mapped_values_are_those_that_are_read(tmp_path) -> None:
    model = build()
    slots, whole = torch.tensor([5, 60]), only_memory(model).values.weight.detach()[[5, 60]]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(values_of(only_memory(model), slots), whole)
    mapped = PkmemForCausalLM.from_pretrained(tmp_path, values="mmap")
    torch.testing.assert_close(values_of(only_memory(mapped), slots), whole)
    model.quantise_values("int8")
    torch.testing.assert_close(values_of(only_memory(model), slots), whole, atol=0.01, rtol=0.01)


def test_values_of_zero_say_nothing() -> None:
    model = build()
    only_memory(model).values.start_at_zero()
    found = project_values(only_memory(model), torch.arange(3), output_embedding(model, VOCABULARY), 2)
    assert found.deviations.tolist() == [0, 0, 0]


def test_where_values_cannot_be_projected_the_reason_is_said() -> None:
    model = build()
    embedding = output_embedding(model, VOCABULARY)
    assert why_not_projected(only_memory(model), embedding) == ""
    assert "output gate" in why_not_projected(only_memory(build({"gate": True})), embedding)
    assert (
        why_not_projected(only_memory(model), embedding[:, :30]) == "A value has 32 numbers, the output embedding 30."
    )
    assert "no output embedding" in why_not_projected(only_memory(model), None)
    model.base.lm_head = torch.nn.Identity()
    assert output_embedding(model, VOCABULARY) is None
