"""The texts of the trial, and a loop that trains for as many updates or seconds as it is told."""

import math
from collections import Counter

import pytest
import torch

from pkmem.experiments.learning import trial
from pkmem.experiments.learning.trial import bits_per_byte, blocks_of, documentation, train_on, written_by
from taught import VOCAB, llama, tokenizer  # noqa: F401

SOURCE = f'"""{"module " * 20}"""\n\ndef f():\n    """short"""\n\nclass C:\n    def g(self):\n        """{"method " * 20}"""\n'


@pytest.fixture
def library(monkeypatch) -> None:
    """One file a split, and one that cannot be parsed."""
    monkeypatch.setattr(trial, "read_documents", lambda data, split: [SOURCE.replace("module", split), "def"])


def test_documentation_is_docstrings_and_topics_and_none_is_in_both_splits(library) -> None:
    train, held_out = (documentation(split, 0) for split in ("train", "validation"))
    assert any(text.startswith("train train") for text in train)
    assert any(text.startswith("method method") for text in train)
    assert not any(text == "short" for text in train)
    shared = {text for text, count in Counter([*train, *held_out]).items() if count > 1}
    assert not {text for text in shared if not text.startswith("method")}
    assert len(held_out) < len(train) / 5
    assert documentation("train", 1) != train == documentation("train", 0)


def test_blocks_are_cut_from_texts_closed_by_the_end_of_text(tokenizer) -> None:  # noqa: F811
    blocks, bytes_per_token = blocks_of(["abc", "de", "never read"], tokenizer, 2, 3)
    eos = tokenizer.eos_token_id
    assert blocks.shape == (2, 3)
    assert (blocks == eos).nonzero().tolist() == [[1, 0]]
    assert bytes_per_token == 5 / 6
    with pytest.raises(ValueError, match="7 tokens but 9 are wanted"):
        blocks_of(["abc", "de"], tokenizer, 3, 3)


def test_bits_per_byte_of_a_model_that_guesses(tokenizer) -> None:  # noqa: F811
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert bits_per_byte(model, torch.randint(VOCAB, (3, 8)), 2.0) == pytest.approx(math.log2(VOCAB) / 2, rel=1e-5)


def test_a_model_writes_unrelated_text_by_seed(tokenizer) -> None:  # noqa: F811
    model = llama()
    blocks, bytes_per_token = written_by(model, tokenizer, 6, seed=0)
    assert blocks.shape == (16, 6)
    assert bytes_per_token > 0
    assert torch.equal(written_by(model, tokenizer, 6, seed=0)[0], blocks)


@pytest.mark.parametrize(("updates", "seconds"), [(5, None), (None, 0.2), (2, 100)])
def test_training_ends_with_its_updates_or_its_seconds(updates, seconds) -> None:
    torch.manual_seed(0)
    model, blocks = llama(), torch.randint(VOCAB, (3, 8))
    before = bits_per_byte(model, blocks, 1.0)
    made, took = train_on(model, torch.optim.AdamW(model.parameters(), lr=1e-2), blocks, updates, seconds)
    assert bits_per_byte(model, blocks, 1.0) < before
    if updates is None:
        assert took >= 0.2
        assert made > 1
    else:
        assert made == updates
