"""`pkmem inspect --page`: what it says in the terminal stays as it is, and a mistake is one line that names the fix."""

import json
import shutil
from pathlib import Path

import pytest

from inspected import Page, build, tokenizer_of
from pkmem.cli import main
from pkmem.inspecting.saved import inspect_saved, require_comparable
from pkmem.training.saved import describe_saved

pytest_plugins = "tiny"


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    return shutil.copytree(run / "model", tmp_path / "other")


def test_the_page_comes_beside_what_the_terminal_says(run: Path, text: Path, tmp_path: Path, capsys) -> None:
    main(["inspect", str(run), "--data", str(text), "--max_tokens", "320", "--page", str(tmp_path / "x.html")])
    assert capsys.readouterr().out == f"{describe_saved(run, str(text), 320, 5)}\n"
    page = Page(tmp_path / "x.html")
    assert (page.facts["model"], page.facts["data"], page.facts["compared"]) == (str(run), str(text), None)
    assert page.facts["numTokens"] == 320
    assert page["ends"].tolist() == [*range(32, 321, 32)]
    assert "the" in {word.strip() for word in page["vocabulary"]}


def test_two_checkpoints_of_a_run_are_compared(run: Path, text: Path, tmp_path: Path) -> None:
    earlier = run / "checkpoints" / "step-9"
    inspect_saved(run, str(text), 320, 0, tmp_path / "x.html", earlier)
    inspect_saved(earlier, str(text), 320, 0, tmp_path / "earlier.html")
    page, alone = Page(tmp_path / "x.html"), Page(tmp_path / "earlier.html")
    assert page.facts["compared"] == str(earlier)
    assert page["memory_0.compared"].tolist() == alone["memory_0.reads"].tolist() != page["memory_0.reads"].tolist()
    assert page.facts["memories"][0]["compared"] == alone.facts["memories"][0]["figures"]


def test_what_is_missing_for_a_page_is_named(run: Path, plain_gpt2: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    with pytest.raises(ValueError, match="--page shows what the memories read on a text: name one with --data"):
        inspect_saved(run, None, 320, 5, out)
    with pytest.raises(ValueError, match="must be left out without --page"):
        inspect_saved(run, str(text), 320, 5, None, run)
    with pytest.raises(ValueError, match="hottest is -1 but must be >= 0"):
        inspect_saved(run, str(text), 320, -1, out)
    with pytest.raises(ValueError, match=r"no memories in .*: a page needs a model with some"):
        inspect_saved(plain_gpt2, str(text), 320, 5, out)
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"x\.html is there and is no page of `pkmem inspect`: choose another --page"):
        inspect_saved(tmp_path / "absent", str(text), 320, 5, out)  # said before the model is loaded
    assert out.read_text() == "mine"


def refused(run: Path, other: Path, text: Path, message: str) -> None:
    out = other.parent / "x.html"
    with pytest.raises(ValueError, match=message):
        inspect_saved(run, str(text), 320, 5, out, other)
    assert not out.exists()


def test_another_tokenizer_is_not_compared(run: Path, other: Path, text: Path) -> None:
    file = other / "tokenizer.json"
    document = json.loads(file.read_text())
    words = document["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(document))
    fix = "--compare takes another checkpoint of the same model"
    refused(run, other, text, rf"number of the token 'a': \d+ in .* but \d+ in .*other: {fix}")


def test_other_memories_or_none_are_not_compared(run: Path, other: Path, plain_gpt2: Path, text: Path) -> None:
    config = json.loads((other / "config.json").read_text())
    refused(run, plain_gpt2, text, "memories: 1 in .* but 0 in ")
    config["memory"]["knn"] = 3
    (other / "config.json").write_text(json.dumps(config))
    refused(run, other, text, "memory_0's knn: 4 in .* but 3 in ")


@pytest.mark.parametrize(
    ("memory", "model", "difference"),
    [
        ({"heads": 3}, {}, "memory_0's heads: 2 in one but 3 in other"),
        ({"num_sub_keys": 9}, {}, "memory_0's num_sub_keys: 8 in one but 9 in other"),
        ({"keys": "flat"}, {}, "memory_0's keys: product in one but flat in other"),
        ({"experts": True}, {}, "memory_0's experts: False in one but True in other"),
        ({}, {"memory_layers": [0, 1]}, "memories: 1 in one but 2 in other"),
        ({}, {"context_tokens": 16}, "context: 32 in one but 16 in other"),
    ],
    ids=str,
)
def test_a_difference_of_shape_is_named(memory: dict, model: dict, difference: str) -> None:
    tokenizer = tokenizer_of()
    one = (Path("one"), build(), tokenizer)
    require_comparable(
        one, (Path("other"), build({"query_norm": "layer"}, width=64), tokenizer)
    )  # of no matter to slots
    with pytest.raises(ValueError, match=f"{difference}: --compare takes another checkpoint of the same model"):
        require_comparable(one, (Path("other"), build(memory, **model), tokenizer))
    with pytest.raises(ValueError, match=r"tokens of the tokenizer: 259 in one but \d+ in other"):
        require_comparable(one, (Path("other"), build(), tokenizer_of("the the the they they they")))
