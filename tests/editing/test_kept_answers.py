import copy

import pytest
import torch

from decoders import FAMILIES, decoder
from pkmem.editing import kept_answers
from pkmem.editing.kept_answers import KeptAnswers
from pkmem.editing.questions import Question

ASKED = [Question([5, 6, 7], [8]), Question([9], [10, 11, 12]), Question([1, 2, 3, 4, 5, 6], [7, 8])]


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return other


def log_probabilities(model, question):
    """(k, vocabulary) fp64 at each token of the answer, asked alone."""
    prompt, answer = question
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def expected_divergence(before, after, questions, num_alone):
    """Brute force: the likeliest tokens each alone, all others as one."""
    each = []
    for question in questions:
        old, new = log_probabilities(before, question), log_probabilities(after, question)
        for p, q in zip(old.exp(), new.exp(), strict=True):
            order = p.argsort(descending=True)
            classes = [order[i : i + 1] for i in range(num_alone)]
            if num_alone < len(p):
                classes.append(order[num_alone:])
            each.append(sum(p[tokens].sum() * (p[tokens].sum() / q[tokens].sum()).log() for tokens in classes))
    return torch.stack(each).sum() / len(questions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_alone", [3, 10_000])
def test_the_divergence_is_that_of_the_likeliest_tokens_and_the_rest(family, num_alone, monkeypatch):
    monkeypatch.setattr(kept_answers, "_MOST_TOKENS", num_alone)
    torch.manual_seed(0)
    before = decoder(family)
    after, kept = moved(before), KeptAnswers(before, ASKED)
    assert len(kept) == 3
    order = sorted(ASKED, key=lambda question: len(question.prompt))
    with torch.no_grad():
        num_alone = min(num_alone, log_probabilities(before, ASKED[0]).shape[-1])
        for places in ([0, 1, 2], [2, 0], [1, 1]):
            found = kept.divergence(after, places).item()
            expected = expected_divergence(before, after, [order[place] for place in places], num_alone).item()
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert found > 0.01
        assert kept.divergence(before, [0, 1, 2]).item() == pytest.approx(0, abs=1e-6)


def test_the_divergence_leads_back():
    torch.manual_seed(0)
    before = decoder("llama")
    after, kept = moved(before), KeptAnswers(before, ASKED)
    weights = list(after.parameters())
    first = kept.divergence(after, [0, 1, 2])
    gradients = torch.autograd.grad(first, weights, allow_unused=True)
    size = sum(g.square().sum() for g in gradients if g is not None)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.sub_(0.1 * first / size * gradient)
        then = kept.divergence(after, [0, 1, 2])
    assert then.item() == pytest.approx(0.9 * first.item(), rel=0.05)


def test_what_was_nearly_certain_stays_comparable():
    """No infinite divergence, no NaN."""
    before = decoder("llama")
    with torch.no_grad():
        before.get_output_embeddings().weight.mul_(1e4)
    after = moved(before)
    found = KeptAnswers(before, ASKED).divergence(after, [0, 1, 2])
    assert torch.isfinite(found)
    gradients = torch.autograd.grad(found, list(after.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in gradients if g is not None)
