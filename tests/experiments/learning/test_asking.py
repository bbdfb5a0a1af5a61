"""Batches of prompts and completions give what one at a time gives, and the definitions give what they say."""

import pytest
import torch

from pkmem.experiments.learning.asking import (
    answers,
    as_questions,
    divergence,
    log_likelihoods,
    next_token,
    recalled,
)
from taught import VOCAB, llama, tokenizer  # noqa: F401

PAIRS = [("ab", " c"), ("a longer prompt", " d"), ("x", " long answer"), ("yy", " e")]


@pytest.fixture(scope="module")
def model(tokenizer):  # noqa: F811
    """It writes printable letters: other bytes are no text."""
    torch.manual_seed(0)
    made = llama()
    printable = [token for letter, token in tokenizer.get_vocab().items() if letter.isascii() and letter.isprintable()]
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[printable] = False
    made.lm_head.weight.data[others] = 0
    return made


def ids(tokenizer, text):  # noqa: F811
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_likelihoods_are_those_of_each_pair_alone(model, tokenizer) -> None:  # noqa: F811
    found = log_likelihoods(model, tokenizer, PAIRS)
    for i, (prompt, completion) in enumerate(PAIRS):
        whole, num = ids(tokenizer, prompt + completion), len(completion)
        alone = model(whole).logits[0, -num - 1 : -1].log_softmax(-1)
        expected = alone.gather(-1, whole[0, -num:, None]).sum().item()
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


def test_prompts_and_completions_are_joined_as_they_stand(tokenizer) -> None:  # noqa: F811
    asked = as_questions(tokenizer, PAIRS)
    assert [tokenizer.decode(question.prompt + question.answer) for question in asked] == [a + b for a, b in PAIRS]


@torch.no_grad()
def test_recalled_is_what_greedy_decoding_writes(model, tokenizer) -> None:  # noqa: F811
    prompts = [prompt for prompt, _ in PAIRS]
    written = answers(model, tokenizer, prompts, 3)
    for prompt, text in zip(prompts, written, strict=True):
        alone = model.generate(ids(tokenizer, prompt), max_new_tokens=3, do_sample=False)
        assert tokenizer.decode(alone[0], skip_special_tokens=True) == prompt + text
    right = list(zip(prompts, written, strict=True))
    assert recalled(model, tokenizer, right) == [True] * len(right)
    assert recalled(model, tokenizer, PAIRS) == [False] * len(PAIRS)


@torch.no_grad()
def test_the_next_token_and_its_divergence(model, tokenizer) -> None:  # noqa: F811
    prompts = ["ab", "a longer prompt"]
    found = next_token(model, tokenizer, prompts)
    for i, prompt in enumerate(prompts):
        alone = model(ids(tokenizer, prompt)).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    assert divergence(p.log(), q.log()).item() == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert divergence(p.log(), p.log()).item() == 0
