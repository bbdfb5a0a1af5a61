"""Batches of prompts and completions give what one at a time gives, and the definitions give what they say."""

import pytest
import torch

from pkmem.experiments.learning.asking import (
    answers,
    batches,
    divergence,
    encode,
    is_recalled,
    log_likelihoods,
    logits_of,
    losses_of,
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
def test_a_batch_is_as_one_at_a_time(model, tokenizer) -> None:  # noqa: F811
    batch = encode(tokenizer, PAIRS)
    logits = logits_of(model, batch)
    assert logits.shape == (*batch.targets.shape, VOCAB)
    losses = losses_of(logits, batch)
    for i, (prompt, completion) in enumerate(PAIRS):
        whole, num = ids(tokenizer, prompt + completion), len(completion)
        alone = model(whole).logits[0, -num - 1 : -1]
        torch.testing.assert_close(logits[i, -num:], alone, rtol=1e-4, atol=1e-5)
        targets = whole[0, -num:]
        torch.testing.assert_close(losses[i], torch.nn.functional.cross_entropy(alone, targets), rtol=1e-4, atol=1e-5)
        assert log_likelihoods(model, tokenizer, PAIRS)[i] == pytest.approx(-num * losses[i].item(), rel=1e-4)


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


def test_a_completion_is_recalled_when_all_of_its_tokens_are() -> None:
    batch = encode_targets([[-100, 1], [2, 3]])
    logits = torch.zeros(2, 2, 5)
    logits[0, 1, 1] = logits[1, 0, 2] = logits[1, 1, 4] = 1.0
    assert is_recalled(logits, batch).tolist() == [True, False]


def encode_targets(targets):
    from pkmem.experiments.learning.asking import Batch

    return Batch(torch.zeros(0), torch.zeros(0), torch.tensor(targets))


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


def test_batches_take_all_in_order(tokenizer) -> None:  # noqa: F811
    sizes = [len(batch.tokens) for batch in batches(tokenizer, PAIRS, 3)]
    assert sizes == [3, 1]
