"""text/tokenizer.py: any text comes back, and the same texts give the same tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkmem.text import END_OF_TEXT, train_tokenizer
from texts import HOSTILE, STORY

pytest_plugins = "texts"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text() | st.lists(st.sampled_from(["<|", "endoftext", "|>", " ", "\n", "é", " the", ","])).map("".join))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_depends_on_the_texts_alone(tokenizer):
    assert train_tokenizer([STORY], 400).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer([STORY[::-1]], 400).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


def test_one_special_token_ends_begins_and_pads(tokenizer):
    assert len(tokenizer) == 400
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    assert tokenizer.eos_token_id not in tokenizer.encode("The quick brown fox")
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2


def test_a_tokenizer_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert all(loaded.decode(loaded.encode(text)) == text for text in HOSTILE)
    assert loaded.encode(STORY) == tokenizer.encode(STORY)


def test_every_byte_needs_a_token():
    assert len(train_tokenizer([], 257)) == 257
    with pytest.raises(ValueError, match="vocab_size is 256; every byte and one special token need 257"):
        train_tokenizer([], 256)
