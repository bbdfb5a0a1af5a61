"""What each run does: a model is loaded, taught, asked and thrown away."""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pkmem.editing.edit import Edit
from pkmem.editing.elsewhere import near_questions
from pkmem.editing.kept_answers import KeptAnswers
from pkmem.editing.learning import learn
from pkmem.editing.retrofit import retrofit
from pkmem.experiments.environment import environment
from pkmem.experiments.learning.asking import recalled
from pkmem.experiments.learning.examination import Examination, Size
from pkmem.experiments.learning.kinds import KINDS, NUM_TAUGHT, Asked, made_up, mixed
from pkmem.experiments.learning.quiz import quiz
from pkmem.experiments.learning.results import ENOUGH, METHODS, Run
from pkmem.experiments.learning.teaching import Clock, Lesson, adapt, fine_tune, with_adapters
from pkmem.experiments.learning.trial import bits_per_byte, blocks_of, documentation, train_on, written_by
from pkmem.experiments.learning.unfinished import Unfinished
from pkmem.layer.optim import RowAdam
from pkmem.layer.values import tables_in
from pkmem.lm.evaluation import in_eval_mode
from pkmem.lm.smollm2 import smollm2
from pkmem.text.facts import Fact


@dataclass(frozen=True)
class Scale:
    """How much is taught.

    Args:
        model: a Hugging Face directory; None for SmolLM2-135M-Instruct.
        facts_per_kind: in the comparison, each in four phrasings.
        hundred, thousand: facts in one phrasing, until the model recalls `ENOUGH` of them.
        few_rows, many_rows: rows of a smaller edit of a hundred facts, and of the edit of a thousand.
        edits, facts_per_edit: one after another, in one phrasing.
        batch_size: prompts an update, in the comparison; `pkmem.learn`'s own elsewhere.
        most_epochs: at most, each of all that is not learned yet.
        text_updates, text_sweep_updates, text_block_tokens: of the trial on text; an update has two blocks.
        size: of what is asked.
    """

    model: str | None = None
    facts_per_kind: int = 8
    hundred: int = 100
    thousand: int = 1000
    few_rows: int = 4000
    many_rows: int = 48_000
    edits: int = 20
    facts_per_edit: int = 10
    batch_size: int = 16
    most_epochs: int = 30
    text_updates: int = 200
    text_sweep_updates: int = 40
    text_block_tokens: int = 128
    size: Size = field(default_factory=Size)


@dataclass(frozen=True)
class Setting:
    """What a run may use.

    Args:
        seconds: that it may train on text; None where its updates are counted.
        unfinished: the folder of what it keeps until it is finished; None keeps nothing.
    """

    seconds: float | None = None
    unfinished: Path | None = None


@dataclass(frozen=True)
class Cell:
    """A question of the experiment.

    Args:
        about: what it answers, in a line.
        perform: teaches and asks; gets a run, the scale and its setting, returns what was found.
        methods: what is taught.
        sweep: the cell whose best learning rates it takes; None where it is a sweep itself, at seed 0.
        every_seed: whether each seed is run, or seed 0 alone.
        threads: that a run has; runs whose seconds are compared have one.
    """

    about: str
    perform: Callable[[Run, Scale, Setting], dict[str, Any]]
    methods: tuple[str, ...] = ("memory",)
    sweep: str | None = "compare"
    every_seed: bool = False
    threads: int = 1


def perform(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    """Does a run in this process.

    Returns:
        `seconds` of teaching, `peak_rss_bytes` up to its end, `epochs`, `figures`, `environment`, and more by cell.
    """
    logging.disable_progress_bar()
    torch.set_num_threads(CELLS[run.cell].threads)
    return CELLS[run.cell].perform(run, scale, setting) | {"environment": environment()}


def peak_rss_bytes() -> int:
    """The most memory that this process ever held."""
    import resource  # not there on Windows
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load(scale: Scale, run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to teach, with memories for the method "memory", of the run's seed; and its tokenizer."""
    folder = scale.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return (retrofit(model, seed=run.seed) if run.method == "memory" else model), tokenizer


def _as_facts(facts: list[Asked], phrasings: int) -> list[Fact]:
    return [Fact(fact.taught[:phrasings], fact.answer) for fact in facts]


def _compare(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    """Teaches facts by the run's method, asks after every epoch, and at the end everything."""
    facts = mixed(scale.facts_per_kind, run.seed)
    model, tokenizer = load(scale, run)
    examination = Examination(model, tokenizer, facts, NUM_TAUGHT, run.seed, scale.size, quiz())
    found: dict[str, Any] = {"facts": len(facts), "phrasings": NUM_TAUGHT, "rss_bytes_before": peak_rss_bytes()}
    clock = Clock(examination.briefly)
    taught: nn.Module = model
    if run.method == "memory":
        clock.start()
        edit = _learn(model, tokenizer, _as_facts(facts, NUM_TAUGHT), run, scale, clock, batch_size=scale.batch_size)
        clock.stop()
        found["edit_bytes"] = _edit_bytes(edit)
        found["edit_figures"] = edit.figures
    else:
        near = None
        if run.cell == "kept":
            asked = near_questions(model, tokenizer, _as_facts(facts, NUM_TAUGHT), run.seed)
            with in_eval_mode(model):
                near = KeptAnswers(model, asked)
        lesson = Lesson(examination.taught(), run.rate, scale.batch_size, scale.most_epochs, run.seed, near)
        if run.method == "full":
            found["edit_bytes"] = fine_tune(model, tokenizer, lesson, clock)
        else:
            taught, found["edit_bytes"] = adapt(model, tokenizer, lesson, clock)
    found |= {"seconds": clock.seconds, "peak_rss_bytes": peak_rss_bytes(), "epochs": clock.epochs}
    if run.method == "memory":
        edit.apply(model)
    return found | {"figures": examination.fully(taught)}


def _learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[Fact],
    run: Run,
    scale: Scale,
    clock: Clock | None = None,
    **settings: Any,
) -> Edit:
    """An edit, learned at a run's rate; the model is as it was."""
    return learn(
        model,
        tokenizer,
        facts,
        lr=run.rate,
        most_epochs=scale.most_epochs,
        seed=run.seed,
        after_epoch=clock.epoch if clock is not None else None,
        **settings,
    )


def _edit_bytes(edit: Edit) -> int:
    with tempfile.TemporaryDirectory() as folder:
        edit.save(Path(folder) / "edit.safetensors")
        return (Path(folder) / "edit.safetensors").stat().st_size


def _teach_many(run: Run, scale: Scale, facts: list[Asked], **settings: Any) -> dict[str, Any]:
    """Teaches a memory facts in one phrasing until it recalls enough of them, and asks at the end alone."""
    model, tokenizer = load(scale, run)
    examination = Examination(model, tokenizer, facts, 1, run.seed, scale.size)
    before, start = peak_rss_bytes(), time.perf_counter()
    edit = _learn(model, tokenizer, _as_facts(facts, 1), run, scale, recall=ENOUGH, **settings)
    found = {"seconds": time.perf_counter() - start, "rss_bytes_before": before, "peak_rss_bytes": peak_rss_bytes()}
    edit.apply(model)
    return found | {
        "facts": len(facts),
        "phrasings": 1,
        "edit_bytes": _edit_bytes(edit),
        "edit_figures": edit.figures,
        "figures": examination.fully(model),
    }


def _hundred(kind: str) -> Callable[[Run, Scale, Setting], dict[str, Any]]:
    return lambda run, scale, setting: _teach_many(run, scale, made_up(kind, scale.hundred, run.seed))


def _few_rows(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    return _teach_many(run, scale, made_up("code", scale.hundred, run.seed), slots=scale.few_rows)


def _thousand(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    facts = mixed(-(-scale.thousand // len(KINDS)), run.seed)
    return _teach_many(run, scale, facts, slots=scale.many_rows)


def _in_sequence(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    """Edits one after another on one model; then they are taken back in another order than they came."""
    model, tokenizer = load(scale, run)
    before = digest(model)
    facts = mixed(-(-scale.edits * scale.facts_per_edit // len(KINDS)), run.seed)
    random.Random(run.seed).shuffle(facts)
    facts = facts[: scale.edits * scale.facts_per_edit]
    num = scale.facts_per_edit
    lessons = [facts[i * num : (i + 1) * num] for i in range(scale.edits)]
    examination = Examination(model, tokenizer, facts, 1, run.seed, scale.size, quiz())
    written, _ = written_by(model, tokenizer, scale.size.block_tokens // 2, run.seed)
    background = tokenizer.batch_decode(written)
    clock = Clock(examination.briefly)
    kept = Unfinished(setting.unfinished)
    edits: list[Edit] = []
    recalls = []
    for number, lesson in enumerate(lessons):
        taught = _as_facts(lesson, 1)
        teach = partial(_learn, model, tokenizer, taught, run, scale, others=edits, background=background)
        edits.append(kept.edit(number, taught, model, teach))
        edits[-1].apply(model)
        clock.epoch(model)
        recalls.append(_recall(model, tokenizer, lesson))
    figures = examination.fully(model) | {"recall_when_learned": recalls}
    figures["recall_of_each"] = [_recall(model, tokenizer, lesson) for lesson in lessons]
    order = random.Random(run.seed).sample(range(scale.edits), scale.edits)
    gone, left = order[: scale.edits // 2], sorted(order[scale.edits // 2 :])
    for i in gone:
        edits[i].undo(model)
    figures["recall_of_the_others"] = {str(i): _recall(model, tokenizer, lessons[i]) for i in left}
    figures["recall_of_those_taken_back"] = {str(i): _recall(model, tokenizer, lessons[i]) for i in sorted(gone)}
    half = digest(model)
    for i in order[scale.edits // 2 :]:
        edits[i].undo(model)
    figures["bitwise_as_before"] = digest(model) == before
    for i in left:
        edits[i].apply(model)
    figures["half_bitwise_as_if_the_others_had_never_been_in"] = digest(model) == half
    took = {key: sum(edit.figures[key] for edit in edits) for key in ("seconds_preparing", "seconds_training")}
    return {
        "seconds": sum(took.values()),
        "edit_figures": took,
        "peak_rss_bytes": peak_rss_bytes(),
        "edit_bytes": [_edit_bytes(edit) for edit in edits],
        "epochs": clock.epochs,  # after each edit
        "figures": figures,
    }


def _recall(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: list[Asked]) -> float:
    with in_eval_mode(model):
        hits = recalled(model, tokenizer, [(fact.taught[0], f" {fact.answer}") for fact in facts])
    return sum(hits) / len(hits)


def digest(model: nn.Module) -> str:
    """Of every bit of a model's weights."""
    summed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        summed.update(name.encode())
        summed.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return summed.hexdigest()


def _text(run: Run, scale: Scale, setting: Setting) -> dict[str, Any]:
    """Trains on documentation, for so many updates or seconds."""
    model, tokenizer = load(scale, run)
    num_updates = scale.text_sweep_updates if run.cell == "text_sweep" else scale.text_updates
    texts = {split: documentation(split, run.seed) for split in ("train", "validation")}
    blocks, _ = blocks_of(texts["train"], tokenizer, 2 * num_updates, scale.text_block_tokens)
    asked = {
        "held_out": blocks_of(texts["validation"], tokenizer, scale.size.blocks, scale.size.block_tokens),
        "unrelated": written_by(model, tokenizer, scale.size.block_tokens // 2, run.seed),
    }
    before = {name: bits_per_byte(model, *text) for name, text in asked.items()}
    rss_bytes_before = peak_rss_bytes()
    trained: nn.Module = model
    if run.method == "memory":
        model.requires_grad_(False)
        for table in tables_in(model):
            table.weight.requires_grad_(True)
        optimizer: torch.optim.Optimizer = RowAdam(model, lr=run.rate)
    else:
        trained = with_adapters(model, run.seed)
        weights = [weight for weight in trained.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=run.rate, weight_decay=0.0)
    made, took = train_on(trained, optimizer, blocks, None if setting.seconds else num_updates, setting.seconds)
    found = {"updates": made, "seconds": took, "rss_bytes_before": rss_bytes_before, "peak_rss_bytes": peak_rss_bytes()}
    figures = {f"{name}_bits_per_byte": bits_per_byte(trained, *text) for name, text in asked.items()}
    return found | {"figures": figures | {f"{name}_bits_per_byte_before": bits for name, bits in before.items()}}


CELLS = {
    "compare": Cell(
        "24 facts of three kinds in four phrasings: memory, full fine-tuning, LoRA; at seed 0 several learning rates",
        _compare,
        METHODS,
        sweep=None,
        every_seed=True,
    ),
    "kept": Cell(
        "the comparison again, for full fine-tuning that is held to its answers to near misses, as a memory is",
        _compare,
        ("full",),
        every_seed=True,
    ),
    **{f"hundred_{kind}": Cell(f"100 facts of the kind {kind} in one phrasing", _hundred(kind)) for kind in KINDS},
    "few_rows": Cell("100 facts of the kind code in a quarter of the rows", _few_rows),
    "sequence": Cell(
        "20 edits of 10 facts, one after another, then taken back in another order", _in_sequence, threads=2
    ),
    "thousand": Cell("1,000 facts of three kinds in one edit", _thousand),
    "text_sweep": Cell(
        "40 updates on Python's documentation, to choose learning rates", _text, ("memory", "lora"), sweep=None
    ),
    "text": Cell(
        "200 updates on Python's documentation; LoRA for as many seconds", _text, ("memory", "lora"), sweep="text_sweep"
    ),
}
