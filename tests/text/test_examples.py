"""text/examples.py: what a line of JSON holds."""

import pytest

from pkmem.text.examples import Completion, Conversation, example_of, text_of


def test_the_first_form_that_is_there_is_read():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    pair = {"prompt": "1 + 1 =", "completion": "2"}
    chat = Conversation((("user", "Hi"), ("assistant", "Ho")))
    assert example_of({"messages": messages, **pair, "text": "t"}) == chat
    assert example_of({**pair, "text": "t", "id": 3}) == Completion("1 + 1 =", " 2")
    assert example_of({"prompt": "alone", "text": "t"}) == "t"
    assert [text_of(example) for example in (chat, Completion("a", "b"), "t")] == ["Hi\nHo", "ab", "t"]


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a", "\nb", "a\nb"), ("", "b", "b")],
)
def test_a_space_is_put_in_where_neither_has_one(prompt, completion, text):
    assert text_of(example_of({"prompt": prompt, "completion": completion})) == text


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], 'no string "text"'),
        ({"text": 3}, 'no string "text"'),
        ({"prompt": None, "completion": "x"}, 'no string "prompt"'),
        ({"prompt": "x", "completion": " "}, 'an empty "completion"'),
        ({"messages": "hi"}, '"messages" is no list'),
        ({"messages": ["hi"]}, 'no string "role"'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'no string "content"'),
        ({"messages": [{"role": "user", "content": "x"}]}, 'no message of role "assistant"'),
        ({"prompt": "\ud800", "completion": "x"}, "surrogates not allowed"),
    ],
)
def test_what_is_no_example_says_why(record, reason):
    with pytest.raises(ValueError, match=reason):
        example_of(record)
