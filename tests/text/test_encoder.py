"""text/encoder.py: the tokens of prompts and conversations, and which of them count for the loss."""

import json

import numpy as np
import pytest

from pkmem.text import TokenBlocks, tokenize, train_tokenizer
from pkmem.text.encoder import BEGINS, COUNTS, Encoder
from pkmem.text.examples import Completion, Conversation
from texts import STORY, json_lines, write

pytest_plugins = "texts"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ '<|im_start|>' if loop.last else '' }}{{ m['content'] }}{% endfor %}"
CHAT = Conversation(
    (
        ("system", "Be kind."),
        ("user", "2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "Sure?"),
        ("assistant", "Yes é 🙂."),
    )
)


def chat_tokenizer(template: str | None):
    made = train_tokenizer([STORY], 400)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def counted(tokenizer, example) -> tuple[str, str]:
    """All of an example, and what of it counts."""
    tokens, marks = Encoder(tokenizer)([example])
    assert (marks & BEGINS).tolist() == [BEGINS] + [0] * (len(marks) - 1)
    return tokenizer.decode(tokens), tokenizer.decode(tokens[marks & COUNTS > 0])


def test_of_text_everything_counts(tokenizer):
    assert counted(tokenizer, "a text") == ("a text<|endoftext|>",) * 2


def test_of_a_pair_the_completion_and_its_end_count(tokenizer):
    example = Completion("Line 3: the quick", " brown fox")
    assert counted(tokenizer, example) == ("Line 3: the quick brown fox<|endoftext|>", " brown fox<|endoftext|>")


def test_the_tokens_of_a_prompt_are_those_of_the_prompt_alone(tokenizer):
    tokens, marks = Encoder(tokenizer)([Completion("the qui", "ck brown")])  # "quick" would be one token
    prompt = tokenizer("the qui")["input_ids"]
    assert tokens[marks & COUNTS == 0].tolist() == prompt
    assert tokenizer("the quick brown")["input_ids"][: len(prompt)] != prompt


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tokenizer):
    from tokenizers.processors import TemplateProcessing

    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokens, marks = Encoder(tokenizer)([Completion("Line", " 3")])
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[marks & COUNTS == 0].tolist() == tokenizer("Line")["input_ids"]


def test_of_a_conversation_what_the_assistant_says_counts():
    made = chat_tokenizer(CHATML)
    whole, counts = counted(made, CHAT)
    messages = [{"role": role, "content": content} for role, content in CHAT.messages]
    assert whole == made.apply_chat_template(messages, tokenize=False)
    assert counts == "It is 4.<|im_end|>\nYes é 🙂.<|im_end|>\n"
    assert counted(chat_tokenizer(MARKED), CHAT) == (whole, counts.replace("\n", ""))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, CHAT.messages, "chat template"),
        (FORGETFUL, CHAT.messages, "message 3 is written in another way when others stand beside it"),
        ("{{ raise_exception('roles must alternate') }}", CHAT.messages, "roles must alternate"),
        (MARKED.replace("'assistant'", "'model'"), CHAT.messages, "marks nothing of .* as the assistant's"),
        (CHATML, (("assistant", "Who is there?"),), "empty conversation"),
        (CHATML, (("user", "<|im_end|>"), ("assistant", "x")), "spells the tokenizer's special token '<|im_end|>' out"),
    ],
)
def test_a_template_that_does_not_say_who_speaks_is_refused_in_a_line(template, messages, reason):
    with pytest.raises(ValueError, match=reason.replace("|", r"\|")) as caught:
        Encoder(chat_tokenizer(template))([Conversation(messages)])
    assert "\n" not in str(caught.value)
    assert repr(messages[0][1][:40]) in str(caught.value)


def test_marks_lie_beside_the_tokens_where_they_are_needed_alone(tmp_path):
    made, cache = chat_tokenizer(CHATML), tmp_path / "cache"
    texts = json_lines([STORY[n : n + 90] for n in range(60)])
    plain = tokenize(str(write(tmp_path / "plain.jsonl", texts)), "train", made, cache, progress=False)
    assert plain.marks() is None
    assert {path.suffix for path in cache.iterdir()} == {".json", ".uint16"}
    pairs = "".join(json.dumps({"prompt": f"{n} and", "completion": f"{n + 1}é"}) + "\n" for n in range(60))
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hé."}]
    chats = json.dumps({"messages": messages}) + "\n"
    mixed = write(tmp_path / "mixed.jsonl", texts + pairs + chats * 60)
    file = tokenize(str(mixed), "train", made, cache, progress=False)
    assert len(list(cache.glob("*.marks"))) == 1
    marks = file.marks()
    assert file.num_counted == np.count_nonzero(marks & COUNTS) < file.num_tokens
    assert file.num_documents == np.count_nonzero(marks & BEGINS) == 3 * 57
    answers = made.decode(file.tokens()[marks & COUNTS > 0])
    for special in ("<|endoftext|>", "<|im_end|>\n"):
        answers = answers.replace(special, "")
    assert len(answers.encode()) == file.num_bytes
    assert file.bytes_per_token == file.num_bytes / file.num_counted
    assert tokenize(str(mixed), "train", made, cache, progress=False) == file
    file.path.with_suffix(".marks").unlink()
    assert tokenize(str(mixed), "train", made, cache, progress=False).marks().tolist() == marks.tolist()
    made.chat_template = "{# another one #}" + CHATML
    assert tokenize(str(mixed), "train", made, cache, progress=False).path != file.path
    assert tokenize(str(tmp_path / "plain.jsonl"), "train", made, cache, progress=False) == plain
    assert len(TokenBlocks(file, 64)) < file.num_tokens // 32
