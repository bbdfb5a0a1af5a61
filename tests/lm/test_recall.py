"""recall.py on models whose knowledge is known: all, nothing, half, or a stated probability."""

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pkmem.layer.config import MemoryConfig
from pkmem.layer.memory import ProductKeyMemory
from pkmem.lm import recall
from pkmem.lm.recall import measure_recall
from pkmem.text import read_documents, train_tokenizer
from pkmem.text.synthetic import VALUES, SyntheticFacts

FACTS = SyntheticFacts(40)


@pytest.fixture(scope="module")
def whole():
    """A tokenizer with a token per value."""
    return train_tokenizer(read_documents("synthetic:facts:2000", "train"), 1024)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that has learned but the commonest syllables."""
    return train_tokenizer(read_documents("synthetic:facts:2000", "train"), 400)


@pytest.fixture(scope="module", params=["whole", "pieces"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class Knows(nn.Module):
    """Writes the given continuations of the given prompts, each token with odds `exp(confidence)` to any other."""

    def __init__(self, tokenizer, answers: dict[str, str], confidence: float, context_tokens: int = 100) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10))
        self.confidence, self.vocab = confidence, len(tokenizer)
        text_config = SimpleNamespace(max_position_embeddings=context_tokens)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.following = {}
        for prompt, answer in answers.items():
            ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt + answer)]
            self.following |= {tuple(ids[:end]): ids[end] for end in range(1, len(ids))}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not self.training
        logits = torch.zeros(*input_ids.shape, self.vocab)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                following = self.following.get(tuple(ids[: place + 1]))
                if following is not None:
                    logits[row, place, following] = self.confidence
        return SimpleNamespace(logits=logits)


def answers(facts, shift: int = 0) -> dict[str, str]:
    """Each held-out prompt and its value, or the value `shift` places on."""
    return {
        fact.prompt(fact.held_out): " " + VALUES[(VALUES.index(fact.value) + shift) % len(VALUES)] for fact in facts
    }


def test_values_are_tokens_or_not(whole, pieces) -> None:
    """What the tests below stand on."""
    assert {len(whole.encode(f" {value}")) for value in VALUES} == {1}
    assert len({len(pieces.encode(f" {value}")) for value in VALUES}) > 2


def test_who_knows_every_fact_holds_all_bits(tokenizer) -> None:
    model = Knows(tokenizer, answers(FACTS.all), 60.0).train()
    figures = measure_recall(model, tokenizer, FACTS)
    assert model.training
    assert figures["recall"] == 1
    assert figures["bits_per_fact"] == pytest.approx(math.log2(64), abs=1e-9)
    assert figures["stored_bits"] == pytest.approx(40 * 6, abs=1e-6)
    for which in ("param", "dense_param", "active_param"):  # this one has ten parameters, none in a table
        assert figures[f"bits_per_{which}"] == pytest.approx(40 * 6 / 10, abs=1e-6)


@pytest.mark.parametrize("shift", [None, 1], ids=["knows nothing", "is wrong and sure of it"])
def test_who_knows_nothing_or_the_wrong_thing_holds_none(tokenizer, shift) -> None:
    known = {} if shift is None else answers(FACTS.all, shift)
    figures = measure_recall(Knows(tokenizer, known, 60.0), tokenizer, FACTS)
    assert figures["recall"] == 0
    assert 0 <= figures["bits_per_fact"] < 1e-9


def test_who_knows_half_recalls_half(whole) -> None:
    figures = measure_recall(Knows(whole, answers(FACTS.all[:20]), 60.0), whole, FACTS)
    assert figures["recall"] == 0.5
    assert figures["bits_per_fact"] == pytest.approx(3)


def test_a_value_begun_is_not_a_value_recalled(pieces) -> None:
    beginnings = {prompt: pieces.decode(pieces.encode(answer)[:-1]) for prompt, answer in answers(FACTS.all).items()}
    short = [fact for fact in FACTS.all if len(pieces.encode(f" {fact.value}")) == 1]
    figures = measure_recall(Knows(pieces, beginnings, 60.0), pieces, FACTS)
    assert figures["recall"] <= len(short) / 40 < 1


def test_only_the_held_out_phrasing_counts(whole) -> None:
    others = {fact.prompt((fact.held_out + 1) % 5): f" {fact.value}" for fact in FACTS.all}
    assert measure_recall(Knows(whole, others, 60.0), whole, FACTS)["recall"] == 0


def test_bits_are_those_of_the_right_value_among_the_values(whole) -> None:
    figures = measure_recall(Knows(whole, answers(FACTS.all), 3.0), whole, FACTS)
    assert figures["recall"] == 1
    assert figures["bits_per_fact"] == pytest.approx(6 + math.log2(math.exp(3) / (math.exp(3) + 63)))


def test_scores_are_those_of_each_sequence_alone(tokenizer) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    ).eval()
    prompts, _, candidates = recall._encode(tokenizer, FACTS)
    log_probs, is_greedy = recall._score(model, prompts[:7], candidates)
    for row, prompt in enumerate(prompts[:7]):
        for column in (0, 9, 63):
            logits = model(torch.tensor([prompt + candidates[column]])).logits[0, len(prompt) - 1 : -1]
            ids = torch.tensor(candidates[column])
            expected = logits.double().log_softmax(-1).gather(1, ids[:, None]).sum()
            assert log_probs[row, column].item() == pytest.approx(expected.item(), abs=1e-4)
            assert is_greedy[row, column] == torch.equal(logits.argmax(-1), ids)


def test_the_size_of_batches_does_not_matter(whole, monkeypatch) -> None:
    model = Knows(whole, answers(FACTS.all[:30]), 4.0)
    together = measure_recall(model, whole, FACTS)
    monkeypatch.setattr(recall, "BATCH_PROMPTS", 7)
    assert measure_recall(model, whole, FACTS) == pytest.approx(together)
    assert together["recall"] == 0.75


def test_a_value_cuts_off_from_its_prompt(tokenizer) -> None:
    for fact in FACTS.all:
        for phrasing in range(5):
            prompt = fact.prompt(phrasing)
            whole = tokenizer.encode(f"{prompt} {fact.value}")
            assert whole == tokenizer.encode(prompt) + tokenizer.encode(f" {fact.value}")


def test_a_tokenizer_that_joins_prompt_and_value_is_refused() -> None:
    merges = [(a, " ") for a in "sno"]  # the last letter of a prompt and the space after it
    characters = sorted({char for text in read_documents("synthetic:facts:40", "train") for char in text})
    vocab = {piece: place for place, piece in enumerate([*characters, "s ", "n ", "o ", "<eos>"])}
    joining = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges)), eos_token="<eos>")
    with pytest.raises(ValueError, match=r"other tokens for .* where .* follows: recall needs one that cuts before"):
        measure_recall(Knows(joining, {}, 0.0), joining, FACTS)


def test_a_context_that_is_too_short_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"take \d+ tokens but the model's context is 5"):
        measure_recall(Knows(tokenizer, {}, 0.0, context_tokens=5), tokenizer, FACTS)


def test_parameters_count_in_all_outside_the_table_and_at_work(whole) -> None:
    model = Knows(whole, answers(FACTS.all), 60.0)
    model.memory = ProductKeyMemory(MemoryConfig(dim=8, num_sub_keys=16, heads=2, knn=3, query_dim=4))
    figures = measure_recall(model, whole, FACTS)
    num_params, table = sum(p.numel() for p in model.parameters()), 16**2 * 8
    assert figures["bits_per_param"] == pytest.approx(240 / num_params)
    assert figures["bits_per_dense_param"] == pytest.approx(240 / (num_params - table))
    assert figures["bits_per_active_param"] == pytest.approx(240 / (num_params - table + 2 * 3 * 8))
