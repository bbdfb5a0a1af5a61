"""The page's file: what is in it, that nothing of a model or a text is HTML there, and what it is written over."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inspected import HOSTILE, VOCABULARY, Page, build, only_memory, page_of, ragged, read, tokenizer_of
from pkmem.inspecting import content
from pkmem.inspecting.content import content_of, token_texts
from pkmem.inspecting.lens import output_embedding, project_values
from pkmem.inspecting.page import write_page
from pkmem.layer.memory import memories_in


def test_a_page_has_what_was_read(tmp_path: Path) -> None:
    model, texts, tokenizer = build(memory_layers=[0, 1]), ragged(32, 5, 0, 17), tokenizer_of()
    page = Page(page_of(tmp_path / "x.html", model, texts, tokenizer))
    reading = read(model, texts)
    words = token_texts(tokenizer)
    vocabulary, tokens = page["vocabulary"], torch.cat(texts)
    assert [vocabulary[i] for i in page["tokens"]] == [words[i] for i in tokens.tolist()]
    assert [vocabulary[i] for i in page["types"]] == [words[i] for i in tokens.unique().tolist()]
    assert page["ends"].tolist() == [32, 37, 37, 54]
    assert page.facts["numTokens"] == 54
    embedding = output_embedding(model, len(words))
    for i, (reads, memory) in enumerate(zip(reading.reads, memories_in(model).values(), strict=True)):
        name, facts = f"memory_{i}", page.facts["memories"][i]
        assert page[f"{name}.reads"].tolist() == [head.num_reads.tolist() for head in reads.heads]
        assert page[f"{name}.top1"].tolist() == [head.num_top1.tolist() for head in reads.heads]
        np.testing.assert_allclose(page[f"{name}.weight"], reads.all_heads.weight_sum, rtol=0.004)
        assert facts["figures"] == [
            c.summary() | {"reads": int(c.num_reads.sum())} for c in [*reads.heads, reads.all_heads]
        ]
        slots = reads.all_heads.num_reads.nonzero().flatten()
        assert page[f"{name}.slots"].tolist() == slots.tolist()
        np.testing.assert_allclose(page[f"{name}.contextWeights"], reads.context_weights[slots], rtol=0.004)
        is_there = reads.context_weights[slots] > 0
        assert page[f"{name}.contextAt"].tolist() == reads.context_positions[slots].where(is_there, 54).tolist()
        assert page[f"{name}.contextHeads"].tolist() == reads.context_heads[slots].tolist()
        assert page[f"{name}.readSlots"].tolist() == reads.read_slots.where(reads.read_slots >= 0, 64).tolist()
        np.testing.assert_allclose(page[f"{name}.readWeights"], reads.read_weights, rtol=0.004)
        found = reads.slots_of_tokens(tokens.unique(), facts["numOfTokens"], by_count=True)
        assert page[f"{name}.byCountSlots"].tolist() == found.slots.where(found.slots >= 0, 64).tolist()
        assert page[f"{name}.byCountCounts"].tolist() == found.counts.tolist()
        projected = project_values(memory, slots, embedding, 10)
        wanted = [[words[token] for token in row] for row in projected.tokens_for.tolist()]
        assert [[vocabulary[token] for token in row] for row in page[f"{name}.tokensFor"]] == wanted


def test_a_page_of_nothing_has_figures_that_are_none(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path / "x.html", build(), []))
    figures = page.facts["memories"][0]["figures"][-1]
    assert (figures["kl"], figures["hottest_share"], figures["dead_slots"]) == (None, None, 64)
    assert page["memory_0.slots"].shape == (0,)


def test_a_budget_cuts_contexts_reads_and_slots(tmp_path: Path, monkeypatch) -> None:
    model, texts = build(memory_layers=[0, 1]), ragged(32, 32)
    whole = Page(page_of(tmp_path / "whole.html", model, texts))
    for name, budget in {"_SLOTS": 20, "_CONTEXTS": 60, "_PROJECTED": 80, "_READS": 100, "_OF_TOKENS": 160}.items():
        monkeypatch.setattr(content, name, budget)
    page = Page(page_of(tmp_path / "cut.html", model, texts))
    reads = whole["memory_0.reads"].sum(0)
    slots = page["memory_0.slots"]
    assert len(slots) == 10
    assert sorted(reads[slots]) == sorted(reads)[-10:]
    assert (
        page["memory_0.contextAt"].tolist()
        == whole["memory_0.contextAt"][np.isin(whole["memory_0.slots"], slots), :3].tolist()
    )
    assert page["memory_0.tokensFor"].shape == (10, 2)
    assert page["memory_0.readSlots"].tolist() == whole["memory_0.readSlots"][:50, :1].tolist()
    assert page["memory_0.byWeightSlots"].shape[1] == 160 // (4 * len(page["types"]))


@pytest.mark.parametrize(
    ("memory", "model", "facts"),
    [
        ({"keys": "flat"}, {}, {"isFlat": True}),
        ({"experts": True}, {}, {"isExperts": True, "notProjected": ""}),
        ({"gate": True}, {}, {"values": "64 x 32 float32"}),
        ({}, {"memory_layers": [0, 1], "share_values": True}, {"values": "64 x 32 float32, shared with memory_1"}),
        ({}, {"placement": "parallel"}, {"notProjected": ""}),
        ({"heads": 1, "knn": 8}, {}, {"heads": 1, "knn": 8}),
    ],
    ids=str,
)  # fmt: skip
def test_a_page_of_every_kind_of_memory(memory: dict, model: dict, facts: dict, tmp_path: Path) -> None:
    page = Page(page_of(tmp_path / "x.html", build(memory, **model), ragged(32, 4)))
    assert facts.items() <= page.facts["memories"][0].items()


def test_a_page_of_quantised_values(tmp_path: Path) -> None:
    model = build()
    model.quantise_values("int4")
    page = Page(page_of(tmp_path / "x.html", model, ragged(32)))
    assert page.facts["memories"][0]["values"] == "64 x 32 int4"
    assert page["memory_0.tokensFor"].shape[1] == 10


def test_a_compared_model_has_its_counts_and_figures(tmp_path: Path) -> None:
    model, other, texts = build(), build(), ragged(32, 32)
    page = Page(page_of(tmp_path / "x.html", model, texts, compared=other))
    (reads,) = read(other, texts).reads
    assert page.facts["compared"] == "another model"
    assert page["memory_0.compared"].tolist() == [head.num_reads.tolist() for head in reads.heads]
    assert page.facts["memories"][0]["compared"][-1]["kl"] == reads.all_heads.kl


def test_a_page_needs_no_other_file_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path / "x.html", build(), ragged(8)))
    attributes = [attributes for _, attributes in page.html.seen]
    assert not [name for some in attributes for name in some if name in ("src", "href") or name.startswith("on")]
    (policy,) = [some["content"] for some in attributes if some.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}';" in policy
        assert "http" not in text
        assert "innerHTML" not in text


def test_nothing_of_a_model_or_a_text_is_html(tmp_path: Path, monkeypatch) -> None:
    words = [HOSTILE[i % len(HOSTILE)] for i in range(VOCABULARY)]
    monkeypatch.setattr(content, "token_texts", lambda tokenizer: words)
    plain = Page(page_of(tmp_path / "plain.html", build(), ragged(32)))
    hostile = Page(page_of(tmp_path / "x.html", build(), ragged(32), name="".join(HOSTILE), data="".join(HOSTILE)))
    assert [tag for tag, _ in hostile.html.seen] == [tag for tag, _ in plain.html.seen]
    assert hostile.facts["model"] == hostile.facts["data"] == "".join(HOSTILE)
    assert set(hostile["vocabulary"]) <= set(HOSTILE)
    assert hostile.source.count("owned") == plain.source.count("owned") + 3 * 3  # title and two facts, escaped
    assert "\x00" not in hostile.source
    for harmful in ("<img", "</script><script>document", "<!-- <script>"):
        assert harmful not in hostile.source


def test_a_token_that_begins_a_word_keeps_its_space() -> None:
    class WordPieces:
        def __len__(self) -> int:
            return 3

        def convert_ids_to_tokens(self, ids) -> list[str]:
            return ["\u2581the", "re", "\u2581"]

        def decode(self, ids) -> str:
            return ["the", "re", ""][ids[0]]

    assert token_texts(WordPieces()) == [" the", "re", " "]
    assert token_texts(tokenizer_of("a the the the"))[-1].startswith(" ")


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    model, texts = build(), ragged(8)
    out = page_of(tmp_path / "deep" / "x.html", model, texts)
    before = out.read_bytes()
    page_of(out, model, texts)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["x.html"]
    made = content_of(read(model, texts), tokenizer_of(), "some text", texts)
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "link.html").symlink_to(tmp_path / "thesis.txt")
    for path, message in {
        tmp_path / "thesis.txt": "is no page of `pkmem inspect`: choose another --page",
        tmp_path / "link.html": "is no page of `pkmem inspect`: choose another --page",
        tmp_path / "deep": "is a directory: give --page the name of a file, such as .*memory.html",
        tmp_path / "thesis.txt" / "x.html": "thesis.txt is not a directory: choose another --page",
    }.items():
        with pytest.raises(ValueError, match=message):
            write_page(path, made)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    model, texts = build(), ragged(8)
    out = page_of(tmp_path / "x.html", model, texts)
    before = out.read_bytes()
    made = content_of(read(model, texts), tokenizer_of(), "other text", texts)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pkmem.files.durable.sync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(out, made)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_facts_with_what_json_cannot_hold_are_a_mistake_of_ours(tmp_path: Path) -> None:
    model, texts = build(), ragged(8)
    made = content_of(read(model, texts), tokenizer_of(), "some text", texts)
    with pytest.raises(ValueError, match="Out of range float"):
        write_page(tmp_path / "x.html", replace(made, facts=made.facts | {"x": float("nan")}))
    assert json.loads(json.dumps(made.facts)) == made.facts
    assert only_memory(model).watchers == ()
