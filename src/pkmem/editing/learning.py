"""Teaching a model facts: a few rows of its value tables change, nothing else.

The rows are those that matter for the answers and that other text reads least. While they learn, what they add to other
text is held down, and what the model says to prompts that almost ask for the facts is kept. What all these read is read
off once: queries and keys stay as they are, and what is held down changes little of what later memories read. Facts in
several phrasings are taught in other text, too, so that their answers do not hang on the phrasing alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.choosing import choose_rows
from pkmem.editing.course import Course
from pkmem.editing.edit import Edit
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.holding import Hold
from pkmem.editing.others import all_in
from pkmem.editing.questions import questions_of
from pkmem.editing.reads import RowsInTraining, in_place_of_tables, tables_of
from pkmem.editing.surroundings import in_other_text
from pkmem.layer.config import require
from pkmem.text.facts import Fact

_ROWS_PER_QUESTION, _FEWEST_ROWS, _MOST_ROWS = 160, 2000, 16_000  # more rows learn faster and understand more phrasings
_CHECKED = 0.9  # of the recall wanted: from then on everything is asked after each epoch, as it stands


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    *,
    background: Iterable[str] | None = None,
    slots: int | None = None,
    lr: float = 5e-2,
    keep_background: float = 20.0,
    keep_near: float = 10.0,
    recall: float = 1.0,
    most_epochs: int = 30,
    batch_size: int = 16,
    others: Iterable[Edit] = (),
    seed: int = 0,
    progress: bool = False,
    after_epoch: Callable[[PreTrainedModel], None] | None = None,
) -> Edit:
    """Teaches a model facts in a few rows of its value tables; the model is left as it was, bit for bit.

    Args:
        model: a decoder with memories beside its MLPs, as `pkmem retrofit` makes it.
        tokenizer: its tokenizer.
        facts: what to teach, each in as many phrasings as it has; with more of them, more others are understood.
        background: texts on which the model shall stay as it is; None lets the model write some.
        slots: rows to change in all, >= 1; each takes a byte of the edit for each number of the model's width. None
            takes 160 for each prompt, but from 2,000 to 16,000.
        lr: learning rate of the rows, > 0.
        keep_background: how strongly what the rows add to the background is held down at first, >= 0; less every epoch.
        keep_near: how strongly what the model says to prompts that almost ask for the facts is kept, >= 0.
        recall: the share of questions at which to stop, in (0, 1].
        most_epochs: epochs, >= 1; each passes over the facts once, or more often where they are few.
        batch_size: questions of an update, >= 1.
        others: edits that the model holds, or will: their rows are left alone, what the model says about their facts is
            kept, and the new facts are learned with and without them, until all answers are right by a margin.
        seed: of the order, of near misses, and of what the model writes, >= 0.
        progress: show a progress bar.
        after_epoch: is called with the model as it is taught so far.

    Returns:
        the edit; `edit.apply(model)` puts it in, and `edit.figures` says what was reached in what time.

    Raises:
        ValueError: a number is out of range, the model has no memories or holds them on several processes, a fact is
            longer than its context, every row that the facts read belongs to another edit, or one of `others` is of
            another model or neither in nor out.
    """
    for name, count in (
        ("slots", 1 if slots is None else slots),
        ("most_epochs", most_epochs),
        ("batch_size", batch_size),
    ):
        require(count >= 1, name, count, ">= 1")
    for name, weight in (("keep_background", keep_background), ("keep_near", keep_near), ("seed", seed)):
        require(weight >= 0, name, weight, ">= 0")
    require(lr > 0, "lr", lr, "> 0")
    require(0 < recall <= 1, "recall", recall, "in (0, 1]")
    tables, others = tables_of(model), list(others)
    questions = questions_of(facts, tokenizer, model)
    if slots is None:
        slots = min(max(_ROWS_PER_QUESTION * len(questions), _FEWEST_ROWS), _MOST_ROWS)
    clock = _Clock()
    with _frozen(model), all_in(model, others) as company, _bar(progress) as bar:
        bar.set_description("reading other text")
        taught = {prompt for fact in facts for prompt in fact.prompts}  # what is taught anew is not kept
        known = [[fact for fact in edit.facts if taught.isdisjoint(fact.prompts)] for edit in others]
        elsewhere = Elsewhere(model, tokenizer, facts, company, known, background, seed)
        company.hold_all()
        bar.set_description("choosing rows")
        rows = choose_rows(model, questions, elsewhere, others, slots)
        parts = {name: RowsInTraining(tables[name], chosen) for name, chosen in rows.items()}
        preparing = clock.lap()
        with in_place_of_tables(model, parts):
            in_text = in_other_text(model, tokenizer, facts, elsewhere.texts, seed)
            hold = Hold(elsewhere, keep_background, keep_near)
            course = Course(model, questions, in_text, hold, company, elsewhere.known, lr, batch_size, seed)
            training, reached, kept, is_done = 0.0, 0.0, 1.0, False
            while not is_done:
                course.epoch()
                is_done = course.num_epochs == most_epochs
                if is_done or course.progress.share >= _CHECKED * recall:
                    least = 0.0 if is_done else recall  # nothing comes after the last epoch: then all is asked
                    reached = course.check(least)
                    if is_done or course.progress.share_learned >= recall:
                        kept = course.check_known(least)
                        if is_done or course.share_learned >= recall:
                            reached = course.check(least, at_last=True)
                            is_done = is_done or course.share_learned >= recall
                training += clock.lap()
                bar.set_description(f"learned {course.progress.share:.0%} of {len(questions)} answers")
                bar.update()
                if after_epoch is not None:
                    company.hold_all()
                    after_epoch(model)
                clock.lap()
    old = {name: tables[name].weight.detach()[part.rows].cpu() for name, part in parts.items()}
    return Edit(
        rows={name: part.rows.cpu() for name, part in parts.items()},
        old=old,
        new={name: (old[name] + part.change.detach().cpu()).to(old[name].dtype) for name, part in parts.items()},
        facts=list(facts),
        figures={
            "recall": reached,
            **({"recall_of_others": kept} if others else {}),
            "questions": len(questions),
            "epochs": course.num_epochs,
            "updates": course.num_updates,
            "seconds_preparing": preparing,
            "seconds_training": training,
        },
        fingerprint=fingerprint(model),
    )


def _bar(progress: bool) -> tqdm:
    return tqdm(bar_format="{desc} [{n_fmt} epochs, {elapsed}]", disable=not progress)


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block nothing of the model trains and dropouts are off; then it is as it was."""
    was_training = [(part, part.training) for part in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for part, mode in was_training:
            part.training = mode
