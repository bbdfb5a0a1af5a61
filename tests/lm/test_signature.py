import copy
import inspect
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from decoders import FAMILIES, ids, with_memories
from pkmem.lm.huggingface import PkmemForCausalLM

KIND = "Hugging Face protocol"


@pytest.mark.case(
    KIND,
    "Ask a model for the arguments of its forward (`inspect.signature`), also after a copy, a pickle and accelerate's hooks",
    "works: they are its decoder's",
    "",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_shows_the_arguments_of_its_decoder(family) -> None:
    model, x = with_memories(family), ids()
    expected = model(x).logits
    for made in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        add_hook_to_module(model, ModelHook()),
    ):
        for name in ("forward", "prepare_inputs_for_generation"):
            theirs = inspect.signature(getattr(made.base, name))
            assert inspect.signature(getattr(made, name)) == theirs
        assert torch.equal(made(x).logits, expected)
    remove_hook_from_module(model)
    assert torch.equal(model(x).logits, expected)
    assert {"input_ids", "labels"} <= set(inspect.signature(PkmemForCausalLM.forward).parameters)


@pytest.mark.case(
    KIND, "Call a model with a mask by position, or return a tuple", "works: positions are its decoder's", ""
)
@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_by_position_are_the_decoders(family) -> None:
    model, x = with_memories(family, placement="parallel"), ids()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    names = list(inspect.signature(model.base.forward).parameters)
    positions = [
        x,
        *(mask if name == "attention_mask" else None for name in names[1 : names.index("attention_mask") + 1]),
    ]
    expected = model(x, attention_mask=mask)
    assert torch.equal(model(*positions).logits, expected.logits)
    assert not torch.equal(model(x).logits, expected.logits)
    assert torch.equal(model(x, attention_mask=mask, return_dict=False)[0], expected.logits)
    with pytest.raises(TypeError, match="multiple values"):
        model(x, None, **{names[1]: None})
    with pytest.raises(TypeError, match="too many positional"):
        model(*[x] * (len(names) + 1))


def test_a_compiled_model_takes_the_decoders_arguments_by_name() -> None:
    model, x = with_memories("llama"), ids()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask, positions = torch.ones_like(x), torch.arange(7)[None].flip(1)
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    assert torch.equal(compiled(x, **options).logits, model(x, **options).logits)
    assert not torch.equal(compiled(x, **options).logits, model(x).logits)
