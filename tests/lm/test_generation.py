"""Every way of generating that transformers' guide shows, each against a reference that does not use it."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils

from decoders import FAMILIES, decoder, ids, with_memories, with_todays_transformers
from pkmem.lm.huggingface import PkmemForCausalLM

KIND = "Hugging Face protocol"
NEW = 6
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

every_family = pytest.mark.parametrize("family", FAMILIES)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which no token of its ends."""
    model.generation_config.eos_token_id = None
    return model.eval()


def writer(family: str) -> PkmemForCausalLM:
    return endless(with_memories(family))


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: Tensor, steps: int = NEW) -> Tensor:
    """The likeliest continuation, each token from a forward pass over all tokens before it."""
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.case(KIND, "Generate greedily with a key-value cache", "works", "")
@every_family
def test_a_cache_writes_what_no_cache_writes(family) -> None:
    model, prompt = writer(family), ids()
    assert torch.equal(model.generate(prompt, **SETTINGS), greedy(model, prompt))


@pytest.mark.case(KIND, "Sample, several sequences to a prompt", "works", "")
@every_family
def test_a_cache_samples_what_no_cache_samples(family) -> None:
    model, prompt = writer(family), ids()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = SETTINGS | {"do_sample": True, "top_k": 8, "top_p": 0.9, "temperature": 0.7}
        drawn.append(model.generate(prompt, use_cache=use_cache, num_return_sequences=3, **options))
    assert drawn[0].shape == (6, 7 + NEW)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], greedy(model, prompt).repeat_interleave(3, 0))


@pytest.mark.case(KIND, "Search with beams", "works", "")
@every_family
def test_beams_have_the_score_of_their_sequence(family) -> None:
    model, prompt = writer(family), ids()
    options = SETTINGS | {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
    found = model.generate(prompt, return_dict_in_generate=True, output_scores=True, **options)
    chances = model(found.sequences, use_cache=False).logits[:, 6:-1].log_softmax(-1)
    scores = chances.gather(-1, found.sequences[:, 7:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, scores, rtol=1e-4, atol=1e-5)
    of_greedy = model(greedy(model, prompt), use_cache=False).logits[:, 6:-1].log_softmax(-1).amax(-1).sum(1)
    assert (found.sequences_scores[::2] >= of_greedy - 1e-4).all()


@pytest.mark.case(KIND, "Decode with prompt lookup", "works", "")
@every_family
@with_todays_transformers
def test_prompt_lookup_writes_what_greedy_does(family) -> None:
    model = writer(family)
    prompt = ids(1, 4).repeat(1, 3)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **SETTINGS), greedy(model, prompt))


@pytest.mark.case(
    KIND,
    "Use a model with memories as the assistant model, or beside one",
    "works",
    "https://github.com/huggingface/transformers/pull/31644",
)
@pytest.mark.parametrize("assistant", ["itself", "with memories", "plain"])
@every_family
def test_an_assistant_changes_no_token(family, assistant) -> None:
    model, prompt = writer(family), ids(1)
    helper = {"itself": lambda: copy.deepcopy(model), "plain": lambda: endless(decoder(family))}
    helper = helper.get(assistant, lambda: writer(family))()
    assert torch.equal(model.generate(prompt, assistant_model=helper, **SETTINGS), greedy(model, prompt))
    main = endless(decoder(family))
    assert torch.equal(main.generate(prompt, assistant_model=model, **SETTINGS), greedy(main, prompt))


class EightBitLayer(cache_utils.HQQQuantizedLayer):
    """Stands for the libraries that quantise a cache: rounds to 8 bits by row."""

    def __init__(self, **options: object) -> None:
        cache_utils.QuantizedLayer.__init__(self, **options)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantised: tuple[Tensor, Tensor]) -> Tensor:
        return quantised[0] * quantised[1]


@pytest.mark.case(KIND, "Generate with a static cache", "works", "")
@every_family
def test_a_static_cache_writes_what_no_cache_writes(family) -> None:
    model, prompt = writer(family), ids()
    found = model.generate(prompt, cache_implementation="static", **SETTINGS)
    assert torch.equal(found, greedy(model, prompt))


@pytest.mark.case(
    KIND,
    "Generate with a quantised cache, here one of 8 bits made for the test",
    "works: where the decoder takes one, which those with a sliding window do not",
    "",
)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("mistral", "gemma2")])
@with_todays_transformers
def test_a_quantised_cache_writes_what_it_writes_in_the_decoder(family, monkeypatch) -> None:
    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", EightBitLayer)
    model, prompt = writer(family), ids()
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "residual_length": 2}}
    found = model.generate(prompt, **options, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, model.base.generate(prompt, **options, **SETTINGS, eos_token_id=None))
    exact = model(found.sequences, use_cache=False).logits[:, 6:-1]
    difference = (torch.stack(found.logits, 1) - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 0.05


@pytest.mark.case(KIND, "Generate for a batch of prompts padded on the left", "works", "")
@every_family
def test_padding_on_the_left_changes_no_token(family) -> None:
    model, short, long = writer(family), ids(1, 4), ids(1, 7)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        found = model.generate(batch, attention_mask=mask, **options, **SETTINGS)
        assert torch.equal(found[:1, 3:], greedy(model, short))
        assert torch.equal(found[1:], greedy(model, long))


@pytest.mark.case(
    KIND, "Generate from embeddings (inputs_embeds)", "works", "https://github.com/huggingface/transformers/pull/21405"
)
@every_family
def test_embeddings_write_what_their_tokens_write(family) -> None:
    model, prompt = writer(family), ids()
    embeddings = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **SETTINGS), greedy(model, prompt)[:, 7:])


@pytest.mark.case(
    KIND, "Go on with the cache of an earlier call", "works", "https://github.com/huggingface/transformers/issues/20347"
)
@every_family
def test_a_cache_given_is_gone_on_with(family) -> None:
    model, prompt = writer(family), ids(1)
    cache = DynamicCache(config=model.config.get_text_config())
    start = model.generate(prompt, past_key_values=cache, **SETTINGS)
    found = model.generate(start, attention_mask=torch.ones_like(start), past_key_values=cache, **SETTINGS)
    assert torch.equal(found, greedy(model, prompt, 2 * NEW))


@pytest.mark.case(KIND, "Stream tokens, in chunks of the prompt", "works", "")
@every_family
def test_a_streamer_gets_every_token(family) -> None:
    class Kept(list):
        def put(self, tokens: Tensor) -> None:
            self.extend(tokens.flatten().tolist())

        def end(self) -> None: ...

    model, prompt, kept = writer(family), ids(1), Kept()
    found = model.generate(prompt, streamer=kept, prefill_chunk_size=3, **SETTINGS)
    assert kept == found[0].tolist() == greedy(model, prompt)[0].tolist()


@pytest.mark.case(
    KIND, "Generate while the model is in training mode", "works: with batch norm the batch's own statistics count", ""
)
@every_family
def test_a_model_in_training_mode_generates(family) -> None:
    model, prompt = endless(with_memories(family, "layer")), ids()
    expected = greedy(model, prompt)
    assert torch.equal(model.train().generate(prompt, **SETTINGS), expected)
    assert model.training


@pytest.mark.case(KIND, "Misspell an option of generate", "refused: model_kwargs are not used, as by the decoder", "")
@every_family
def test_an_unknown_option_is_refused(family) -> None:
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['max_new_tokns'\]"):
        writer(family).generate(ids(), max_new_tokns=3)


@pytest.mark.case(
    KIND,
    "Contrastive search, DoLa, diverse or constrained beams",
    "refused: transformers moved them to the Hub; pass trust_remote_code=True",
    "",
)
@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 3, "force_words_ids": [[5]]},
    ],
)
def test_what_transformers_moved_to_the_hub_is_refused_as_by_the_decoder(options) -> None:
    for model in (writer("llama"), endless(decoder("llama"))):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
            model.generate(ids(), **options, **SETTINGS)


@pytest.mark.case(KIND, "Generate by a function of one's own (custom_generate)", "works", "")
def test_a_loop_of_ones_own_is_called_with_the_model() -> None:
    def own(model, input_ids, **_: object) -> Tensor:
        return greedy(model, input_ids)

    model, prompt = writer("llama"), ids()
    assert torch.equal(model.generate(prompt, custom_generate=own, **SETTINGS), greedy(model, prompt))
