"""`pkmem inspect`: a look inside a saved model's memories, in a few lines and on a page."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.inspecting.content import Reading, content_of
from pkmem.inspecting.page import require_own_page, write_page
from pkmem.inspecting.reads import watching_reads
from pkmem.layer.config import require
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.lm.huggingface import context_tokens
from pkmem.lm.inspection import describe_memories, describe_reads, one_after_another, read_texts, texts_to_read
from pkmem.text import TokenBlocks, tokenize
from pkmem.training.saved import describe_saved, load_saved

_SHAPE = ("num_sub_keys", "heads", "knn", "keys", "experts")


def inspect_saved(
    path: Path, data: str | None, max_tokens: int, hottest: int, page: Path | None = None, compare: Path | None = None
) -> str:
    """Describes a saved model's memories and, where a page is asked for, writes that.

    Args:
        path, data, max_tokens, hottest: as in `pkmem.training.saved.describe_saved`.
        page: the HTML file to write; None writes none.
        compare: another checkpoint of the model, for the page to show beside it.

    Raises:
        ValueError: as in `describe_saved`; a page is asked for without data, of a model without memories, or over a file
            that is no such page; `compare` is given without a page, or of other memories, tokenizer or context.
    """
    if page is None:
        require(compare is None, "compare", str(compare), "left out without --page, which shows the comparison")
        return describe_saved(path, data, max_tokens, hottest)
    if data is None:
        raise ValueError("--page shows what the memories read on a text: name one with --data, such as --data python")
    require(hottest >= 0, "hottest", hottest, ">= 0")
    require_own_page(page)
    model, tokenizer = load_saved(path)
    if not memories_in(model):
        raise ValueError(f"no memories in {path}: a page needs a model with some")
    blocks = TokenBlocks(tokenize(data, "validation", tokenizer), context_tokens(model))
    texts = texts_to_read(blocks, max_tokens)
    compared = None
    if compare is not None:
        other, other_tokenizer = load_saved(compare)
        require_comparable((path, model, tokenizer), (compare, other, other_tokenizer))
        with watching_reads(other, one_after_another(texts)) as reads:
            read_texts(other, texts, progress=True)
        compared = Reading(str(compare), other, reads)
    with watching_reads(model, one_after_another(texts)) as reads:
        text = describe_reads(model, tokenizer, blocks, max_tokens, hottest, progress=True)
    write_page(page, content_of(Reading(str(path), model, reads), tokenizer, data, texts, compared, progress=True))
    return f"{describe_memories(model)}\n{text}"


def require_comparable(
    one: tuple[Path, PreTrainedModel, PreTrainedTokenizerBase],
    other: tuple[Path, PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """Refuses to compare models slot by slot whose memories, tokenizers or contexts differ.

    Args:
        one, other: where each was saved, the model and its tokenizer.

    Raises:
        ValueError: they differ; the message names what does.
    """
    (path, model, tokenizer), (other_path, other_model, other_tokenizer) = one, other
    memories, others = (list(memories_in(m).values()) for m in (model, other_model))
    differences = [("memories", len(memories), len(others))]
    differences += [
        (f"memory_{i}'s {name}", mine, theirs)
        for i, pair in enumerate(zip(memories, others, strict=False))
        for name, mine, theirs in zip(_SHAPE, *map(_shape_of, pair), strict=True)
    ]
    words, other_words = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    differences.append(("tokens of the tokenizer", len(words), len(other_words)))
    differences += [
        (f"number of the token {word!r}", words.get(word, "none"), other_words.get(word, "none"))
        for word in sorted({word for word, _ in words.items() ^ other_words.items()})
    ]
    differences.append(("context", context_tokens(model), context_tokens(other_model)))
    for name, mine, theirs in differences:
        if mine != theirs:
            raise ValueError(
                f"{name}: {mine} in {path} but {theirs} in {other_path}: --compare takes another checkpoint of the same "
                "model"
            )


def _shape_of(memory: ProductKeyMemory) -> list[object]:
    return [getattr(memory.config, name) for name in _SHAPE]
