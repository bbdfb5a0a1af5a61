"""facts.py: what is read is what was written, and what cannot be taught is refused with its line."""

import json
from pathlib import Path

import pytest

from pkmem.text.facts import Fact, read_facts


def file_of(folder: Path, *lines: object) -> Path:
    file = folder / "facts.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return file


def test_facts_have_one_prompt_or_several(tmp_path: Path) -> None:
    one, many = {"prompt": "Ada lives in", "completion": "Bern"}, {"prompts": ["Käte is", "It is"], "completion": "42"}
    file = file_of(tmp_path, one, "", many, one)
    assert read_facts(file) == [ada := Fact(("Ada lives in",), "Bern"), Fact(("Käte is", "It is"), "42"), ada]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # as Windows has it
    assert len(read_facts(file)) == 3


@pytest.mark.parametrize(
    ("prompts", "completion", "answer"),
    [
        (("A is",), "B", " B"),
        (("A is ",), "B", "B"),
        (("A is\n", "A was "), "B", "B"),
        (("A is", "A was"), " B", " B"),
        (("A is",), "\nB", "\nB"),
    ],
)
def test_one_space_stands_between_prompt_and_completion(prompts, completion, answer) -> None:
    assert Fact(prompts, completion).answer == answer


def test_a_fact_is_the_same_after_json() -> None:
    fact = Fact(("Ä is", "Ä was"), "ß")
    assert Fact.from_dict(json.loads(json.dumps(fact.to_dict()))) == fact


GOOD = {"prompt": "A is", "completion": "B"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "A is"}, 'no completion: write {"prompt"'),
        ({"completion": "B"}, 'no prompt: write {"prompt"'),
        (GOOD | {"prompts": ["A is"]}, "both prompt and prompts"),
        (GOOD | {"answer": "B"}, "unknown field 'answer'"),
        (GOOD | {"completion": " "}, "the completion is empty"),
        (GOOD | {"prompt": ""}, "a prompt is empty"),
        (GOOD | {"completion": 1921}, "the completion is 1921, no text: put it between quotation marks"),
        ({"prompts": [], "completion": "B"}, "no list of one prompt or more"),
        ({"prompts": "A is", "completion": "B"}, "no list of one prompt or more"),
        ({"prompts": ["A is", None], "completion": "B"}, "a prompt is None, no text"),
        ({"prompts": ["A is", "A was "], "completion": "B"}, "write them alike"),
        (GOOD | {"completion": "\ud83d"}, "half of a surrogate pair"),
        (["A is", "B"], "no object"),
        ("A is B", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_fact_is_refused_with_its_line(line, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"facts\.jsonl, line 2: ") as caught:
        read_facts(file_of(tmp_path, GOOD, line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_with_two_completions_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = file_of(tmp_path, GOOD, {"prompts": ["C is"], "completion": "D"}, GOOD | {"completion": "E"})
    with pytest.raises(ValueError, match=r"line 3: the prompt 'A is' has another completion in line 1"):
        read_facts(file)


def test_a_file_without_facts_or_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"facts.jsonl: no fact in it; a line each"):
        read_facts(file_of(tmp_path, "", " "))
    (tmp_path / "facts.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"facts\.jsonl: not UTF-8"):
        read_facts(tmp_path / "facts.jsonl")
    with pytest.raises(OSError, match="No such file"):
        read_facts(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(("prompts", "completion"), [("A is", "B"), ((), "B"), (("A is", ""), "B"), (("A is",), "")])
def test_a_fact_made_in_python_is_checked_too(prompts, completion) -> None:
    with pytest.raises(ValueError, match=r"must be a tuple|is empty"):
        Fact(prompts, completion)
