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

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkmem.editing.edit import Edit
from pkmem.editing.elsewhere import Elsewhere
from pkmem.editing.fingerprint import fingerprint
from pkmem.editing.others import Others, all_in
from pkmem.editing.progress import Progress
from pkmem.editing.questions import Question, answer_losses, as_questions, batches, questions_of
from pkmem.editing.reads import (
    Reads,
    RowsInTraining,
    in_place_of_tables,
    reading,
    rows_to_teach,
    tables_of,
    weight_of_rows,
)
from pkmem.editing.rounding import rounded
from pkmem.editing.surroundings import surrounded
from pkmem.layer.config import require
from pkmem.layer.memory import memories_in
from pkmem.lm.huggingface import context_tokens
from pkmem.text.facts import Fact

_ROWS_PER_QUESTION, _FEWEST_ROWS, _MOST_ROWS = 160, 2000, 16_000  # more rows learn faster and understand more phrasings
_RELAXED = 0.85  # per epoch: facts that are hard to tell from near misses are learned later, with less of a hold
_FEWEST_UPDATES = 6  # of an epoch: a short lesson is gone through several times
_CALMED = 0.95  # per epoch, the learning rate: late steps shall not undo what was learned before
_SURROUNDINGS = 4  # pieces of other text behind which a prompt is taught, if it is not its fact's only one
_IN_TEXT = 0.5  # of the time
_CHECKED = 0.9  # of the recall wanted: from then on everything is asked after each epoch, as it stands
_HELD_DOWN = 1024  # tokens of the background, and of near misses, whose reads an update looks at
_NATS = 0.03  # a nat by which an answer to a near miss has changed, in units of what near misses read added


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
            kept, and the new facts are learned with and without them.
        seed: of the order, of near misses, and of what the model writes, >= 0.
        progress: show a progress bar.
        after_epoch: is called with the model as it is taught so far.

    Returns:
        the edit; `edit.apply(model)` puts it in, and `edit.figures` says what was reached in what time.

    Raises:
        ValueError: a number is out of range, the model has no memories or holds them on several processes, a fact is
            longer than its context, or every row that the facts read belongs to another edit.
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
        elsewhere = Elsewhere(model, tokenizer, facts, known, background, seed)
        bar.set_description("choosing rows")
        rows = _choose_rows(model, questions, elsewhere, others, slots)
        parts = {name: RowsInTraining(tables[name], chosen) for name, chosen in rows.items()}
        preparing = clock.lap()
        with in_place_of_tables(model, parts):
            in_text = _in_other_text(model, tokenizer, facts, elsewhere, seed)
            course = _Course(
                model, questions, in_text, elsewhere, company, lr, keep_background, keep_near, batch_size, seed
            )
            training, reached, kept = 0.0, 0.0, 1.0
            while course.num_epochs < most_epochs and min(reached, kept) < recall:
                course.epoch()
                if course.progress.share >= _CHECKED * recall or course.num_epochs == most_epochs:
                    course.round()
                    reached, kept = course.check()
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


def _in_other_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], elsewhere: Elsewhere, seed: int
) -> dict[int, list[Question]]:
    """By the place of a question the same in other text, where that fits the context.

    Facts in one phrasing have none: nobody asks for others, and it costs half of the time again.
    """
    longest = context_tokens(model)
    has_others = [len(fact.prompts) > 1 for fact in facts for _ in fact.prompts]
    made: dict[int, list[Question]] = {}
    for number in range(_SURROUNDINGS if any(has_others) else 0):
        of_facts = surrounded(facts, elsewhere.texts, tokenizer, seed * _SURROUNDINGS + number)
        for place, question in enumerate(as_questions(of_facts, tokenizer)):
            if has_others[place] and len(question.prompt) + len(question.answer) <= longest:
                made.setdefault(place, []).append(question)
    return made


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


def _choose_rows(
    model: PreTrainedModel, questions: Sequence[Question], elsewhere: Elsewhere, others: Iterable[Edit], most: int
) -> dict[str, Tensor]:
    """The rows to teach, by table: see `rows_to_teach`.

    A row matters as much as its weight times the gradient of the answers' losses in what the memory gives there.
    """
    tables = tables_of(model)
    memories = list(memories_in(model).values())
    matter = [torch.zeros(len(memory.values.weight), dtype=torch.float64, device=model.device) for memory in memories]
    for batch in batches(sorted(questions, key=lambda question: len(question.prompt)), 32):
        found: dict[int, Reads] = {}
        with reading(model, found.__setitem__), _probing(memories) as probes:
            answer_losses(model, batch)[0].sum().backward()
        for place, (probe, mask) in probes.items():
            assert probe.grad is not None
            strength = probe.grad.flatten(0, -2).float().norm(dim=-1)
            strength = strength if mask is None else strength[mask.flatten()]
            read = Reads(found[place].slots, found[place].weights * strength[:, None])
            matter[place] += weight_of_rows(read, len(matter[place]))
    names = [next(name for name, table in tables.items() if table is memory.values) for memory in memories]
    background = [elsewhere.weight_of_rows(place, len(matter[place])) for place in range(len(memories))]
    rows = rows_to_teach(matter, background, names, [edit.rows for edit in others], most)
    if not rows:
        raise ValueError(
            "every row that these facts read belongs to another edit: forget one, or retrofit with more sub-keys"
        )
    return rows


@contextlib.contextmanager
def _probing(memories: Sequence[nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor | None]]]:
    """Within the block each memory adds zeros to what it gives, whose gradient is that of its output; and its mask."""
    probes: dict[int, tuple[Tensor, Tensor | None]] = {}

    def probed(place: int, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        probes[place] = probe, args[1] if len(args) > 1 else None
        return out + probe

    hooks = [
        memory.register_forward_hook(lambda _, args, out, place=place: probed(place, args, out))
        for place, memory in enumerate(memories)
    ]
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()


class _Course:
    """Epochs of updates of the rows in training.

    Args:
        model: whose memories read through `RowsInTraining`.
        questions: n, to be answered.
        in_text: by the place of a question the same in other text, one or more.
        elsewhere: what shall stay.
        others: edits with and without which the questions shall be answered.
        lr, keep_background, keep_near, batch_size, seed: see `learn`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        questions: Sequence[Question],
        in_text: dict[int, list[Question]],
        elsewhere: Elsewhere,
        others: Others,
        lr: float,
        keep_background: float,
        keep_near: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.num_epochs = self.num_updates = 0
        self.progress = Progress(questions, batch_size, seed)
        self._model, self._lr = model, lr
        self._in_text = in_text
        self._times = -(-_FEWEST_UPDATES // -(-len(questions) // batch_size))
        self._draw = torch.Generator().manual_seed(seed)
        self._kept = [(keep_background, elsewhere.background)]
        if elsewhere.near is not None:
            self._kept.append((keep_near, elsewhere.near))
        self._keep_near, self._near = keep_near, elsewhere.near_answers
        self._others, self._known = others, elsewhere.known
        self._energy = elsewhere.energy
        self._parts: list[nn.Module] = [memory.values for memory in memories_in(model).values()]
        trained = dict.fromkeys(part for part in self._parts if isinstance(part, RowsInTraining))
        self._optimizer = torch.optim.Adam([part.change for part in trained], lr=lr, betas=(0.9, 0.98))

    def epoch(self) -> None:
        """An update for each batch of what is still to be learned."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * _CALMED**self.num_epochs
        for _ in range(self._times):
            for places in self.progress.epoch():
                inside = self._others.hold_some(self._draw)
                known = self._known.ask_some(self._model, inside) if self._known is not None else 0.0
                (self._ask(places).mean() + known + self._added_elsewhere() + self._near_misses()).backward()
                self._optimizer.step()
                self._optimizer.zero_grad()
                self.num_updates += 1
        self.num_epochs += 1

    def _ask(self, places: Sequence[int]) -> Tensor:
        """The losses of some questions: some as they stand, some in other text, which are longer."""
        alone: list[int] = []
        behind: list[int] = []
        for place, chance in zip(places, torch.rand(len(places), generator=self._draw).tolist(), strict=True):
            (behind if place in self._in_text and chance < _IN_TEXT else alone).append(place)
        losses = [self.progress.ask(self._model, alone)] if alone else []
        if behind:
            number = int(torch.randint(_SURROUNDINGS, (), generator=self._draw))
            asked = [self._in_text[place][number % len(self._in_text[place])] for place in behind]
            losses.append(self.progress.ask(self._model, behind, asked))
        return torch.cat(losses)

    def check(self) -> tuple[float, float]:
        """The share of questions that are answered whichever of the other edits are in, and that of what those taught."""
        reached = self.progress.check(self._model, self._others.in_turn(self._draw))
        return reached, self._known.check(self._model) if self._known is not None else 1.0

    def round(self) -> None:
        """Rounds the change as it will be kept, a byte for each number."""
        for group in self._optimizer.param_groups:
            for change in group["params"]:
                change.data = rounded(change.data)

    def _added_elsewhere(self) -> Tensor | float:
        """The energy of what the rows add to what shall stay, over that of what is there; weighed less every epoch."""
        added: Tensor | float = 0.0
        for first_weight, kept in self._kept:
            weight = first_weight * _RELAXED**self.num_epochs
            for part, reads, energy in zip(self._parts, kept, self._energy, strict=True):
                if weight and isinstance(part, RowsInTraining):
                    some = torch.randint(len(reads.slots), (_HELD_DOWN,), generator=self._draw).to(reads.slots.device)
                    there = part.changed(reads.slots[some], reads.weights[some])
                    added = added + weight * there.square().sum(-1).mean() / energy
        return added

    def _near_misses(self) -> Tensor | float:
        """How far what the model says to some near misses is from what it said."""
        if self._near is None or not self._keep_near:
            return 0.0
        return _NATS * self._keep_near * self._near.divergence_of_some(self._model, self._draw)
