import copy
import dataclasses
import itertools
import statistics

import pytest
import torch

from lessons import FACTS, OF_LESSONS, pupil, tokenizer
from made_edits import bits_of, same_bits
from pkmem import learn
from pkmem.editing import elsewhere, holding
from pkmem.editing.elsewhere import near_questions
from pkmem.editing.kept_answers import KeptAnswers
from pkmem.editing.progress import Progress
from pkmem.editing.questions import questions_of
from pkmem.editing.rehearsal import Rehearsal
from pkmem.editing.rounding import rounded
from pkmem.layer.memory import memories_in
from pkmem.text.facts import Fact

TEXT = ["the cat sat on a mat and saw two dogs", "Rome is far from Oslo"]
# A tiny random decoder's MLPs give next to nothing, so next to nothing is held down.
SETTINGS = {"background": TEXT, "lr": 0.1, "keep_background": 1e-3, "keep_near": 1e-3, "most_epochs": 60, "seed": 1}
BESIDE = SETTINGS | {"most_epochs": 20}  # answers are right by then; so small a model never gives them by a margin


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_facts_are_learned_in_a_few_rows_and_taken_back_bit_for_bit(family):
    model = pupil(family).train()
    model.base.get_input_embeddings().weight.requires_grad_(False)
    before, trained = bits_of(model), [parameter.requires_grad for parameter in model.parameters()]
    asked = questions_of(FACTS, tokenizer(), model)
    assert Progress(asked, 9, 0).check(model) == 0
    edit = learn(model, tokenizer(), FACTS, slots=300, **SETTINGS)
    assert same_bits(bits_of(model), before)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert edit.figures["recall"] == 1.0
    assert edit.num_rows <= 300
    assert all(torch.equal(new, rounded(new)) for new in edit.new.values())  # so that it is a small file
    edit.apply(model)
    assert Progress(asked, 9, 0).check(model) == 1.0
    changed = {name for name, bits in bits_of(model).items() if not torch.equal(bits, before[name])}
    assert changed == set(edit.rows)
    edit.undo(model)
    assert same_bits(bits_of(model), before)


def test_the_same_seed_teaches_the_same():
    first, again = (learn(pupil(), tokenizer(), FACTS[:2], slots=50, **SETTINGS | {"most_epochs": 3}) for _ in range(2))
    assert first.name == again.name


def test_edits_have_rows_of_their_own_and_go_in_any_order():
    model = pupil(share_values=True)
    before, edits = bits_of(model), []
    for lesson in (FACTS[:2], FACTS[2:4], FACTS[4:]):
        edits.append(learn(model, tokenizer(), lesson, slots=100, others=edits, **BESIDE))
        edits[-1].apply(model)
    for edit in edits:
        assert not any(edit.overlaps(other) for other in edits if other is not edit)
    after_two = bits_of(model)
    for place in (1, 0, 2):
        edits[place].undo(model)
    assert same_bits(bits_of(model), before)
    for place in (2, 0, 1):
        edits[place].apply(model)
    assert same_bits(bits_of(model), after_two)


def added_to(model, texts):
    """Sum of squares of what the memories give for texts."""
    given = []
    hooks = [m.register_forward_hook(lambda _, __, out: given.append(out)) for m in memories_in(model).values()]
    with torch.no_grad():
        for text in texts:
            model(tokenizer()(text, return_tensors="pt")["input_ids"])
    for hook in hooks:
        hook.remove()
    return sum(out.square().sum().item() for out in given)


def test_what_is_held_down_adds_less_to_the_background():
    added = {}
    for keep in (0.0, 0.1):
        model = pupil()
        edit = learn(model, tokenizer(), FACTS, **SETTINGS | {"keep_background": keep, "keep_near": 0.0})
        edit.apply(model)
        added[keep] = added_to(model, TEXT)
    assert 0 < added[0.1] < 0.25 * added[0.0]


def test_a_model_writes_its_own_background_where_none_is_given():
    model, state = pupil(), torch.get_rng_state()
    edit = learn(model, tokenizer(), FACTS[:2], **SETTINGS | {"background": None, "most_epochs": 1})
    assert edit.num_rows > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_taught_so_far_is_shown_after_each_epoch():
    model, seen = pupil(), []
    asked = questions_of(FACTS, tokenizer(), model)
    edit = learn(
        model,
        tokenizer(),
        FACTS,
        after_epoch=lambda taught: seen.append(Progress(asked, 9, 0).check(taught)),
        **SETTINGS,
    )
    assert len(seen) == edit.figures["epochs"]
    assert seen[-1] == 1.0


def test_learning_stops_at_the_recall_wanted():
    few = learn(pupil(), tokenizer(), FACTS, **SETTINGS | {"recall": 0.1})
    assert few.figures["epochs"] < SETTINGS["most_epochs"]
    assert few.figures["recall"] >= 0.1


def test_bf16_models_learn():
    model = pupil().bfloat16()
    edit = learn(model, tokenizer(), FACTS, **SETTINGS)
    assert {tensor.dtype for tensor in edit.new.values()} == {torch.bfloat16}
    edit.apply(model)
    assert Progress(questions_of(FACTS, tokenizer(), model), 9, 0).check(model) == 1.0


def test_a_gate_and_experts_are_taught_through():
    model = pupil(memory=dataclasses.replace(OF_LESSONS, gate=True, experts=True))
    before = copy.deepcopy(model.state_dict())
    learn(model, tokenizer(), FACTS[:2], **SETTINGS | {"most_epochs": 5}).apply(model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith(".values.weight") for name in moved)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"slots": 0}, "slots is 0 but must be >= 1"),
        ({"lr": 0.0}, "lr is 0.0 but must be > 0"),
        ({"recall": 1.5}, r"recall is 1.5 but must be in \(0, 1\]"),
        ({"keep_near": -1.0}, "keep_near is -1.0 but must be >= 0"),
        ({"background": []}, "the background has no text"),
    ],
)
def test_what_cannot_be_is_refused(option, words):
    with pytest.raises(ValueError, match=words):
        learn(pupil(), tokenizer(), FACTS, **SETTINGS | option)


def test_what_is_said_to_near_misses_is_kept(monkeypatch):
    changed = {}
    for nats in (0.0, 1e6):  # a tiny random decoder says nearly the same to everything
        monkeypatch.setattr(holding, "_NATS", nats)
        model = pupil()
        near = KeptAnswers(model, near_questions(model, tokenizer(), FACTS, SETTINGS["seed"]))
        edit = learn(model, tokenizer(), FACTS, **SETTINGS | {"lr": 0.02})
        assert edit.figures["recall"] == 1
        edit.apply(model)
        with torch.no_grad():
            changed[nats] = near.divergence(model, range(len(near))).item()
    assert 0 < changed[1e6] < 0.6 * changed[0.0]


def test_near_misses_longer_than_the_context_are_left_out():
    """A name of many tokens in a prompt that just fits."""
    facts = [Fact((f"Home of {name}",), "Rome") for name in ("Alda Kirosa", "Boris " + "xq" * 27)]
    model = pupil()
    questions_of(facts, tokenizer(), model)
    asked = near_questions(model, tokenizer(), facts, 0)
    assert all(len(question.prompt) + len(question.answer) <= 64 for question in asked)
    learn(model, tokenizer(), facts, **SETTINGS | {"most_epochs": 1})


def test_what_other_edits_taught_is_rehearsed(monkeypatch):
    """But for what is taught anew."""
    rehearsed = []

    class Watched(Rehearsal):
        def __init__(self, model, tokenizer, lessons, seed):
            rehearsed.append(lessons)
            super().__init__(model, tokenizer, lessons, seed)

    monkeypatch.setattr(elsewhere, "Rehearsal", Watched)
    model = pupil()
    first = learn(model, tokenizer(), FACTS[:3], slots=100, **SETTINGS)
    assert not rehearsed
    assert "recall_of_others" not in first.figures
    anew = Fact(FACTS[0].prompts, "Quito")
    second = learn(model, tokenizer(), [anew, *FACTS[3:]], slots=100, others=iter([first]), **BESIDE)
    assert rehearsed == [[FACTS[1:3]]]
    assert second.figures["recall_of_others"] == 1.0


def recalled(model, facts):
    return Progress(questions_of(facts, tokenizer(), model), 9, 0).check(model)


def test_what_is_learned_holds_with_and_without_the_other_edits():
    model = pupil()
    before, lessons, edits = bits_of(model), (FACTS[:2], FACTS[2:4], FACTS[4:]), []
    for lesson in lessons:
        edits.append(learn(model, tokenizer(), lesson, slots=150, others=edits, **BESIDE))
        edits[-1].apply(model)
    found = {}
    for which in itertools.product([False, True], repeat=3):
        for edit, wanted in zip(edits, which, strict=True):
            if edit.is_in(model) != wanted:
                (edit.apply if wanted else edit.undo)(model)
        found[which] = [recalled(model, lesson) for lesson, is_in in zip(lessons, which, strict=True) if is_in]
    assert found[True, True, True] == [1.0, 1.0, 1.0]
    assert [found[tuple(one == place for one in range(3))] for place in range(3)] == [[1.0]] * 3
    assert statistics.mean(share for shares in found.values() for share in shares) > 0.9
    for edit in edits:
        edit.undo(model)
    assert same_bits(bits_of(model), before)


def test_edits_that_are_not_in_yet_are_learned_beside():
    """And stay out, even if learning ends in an error."""
    model = pupil()
    before = bits_of(model)
    first = learn(model, tokenizer(), FACTS[:3], slots=150, **SETTINGS)

    def broken(taught):
        assert taught is model
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, tokenizer(), FACTS[3:], slots=150, others=[first], **BESIDE, after_epoch=broken)
    assert same_bits(bits_of(model), before)
    second = learn(model, tokenizer(), FACTS[3:], slots=150, others=[first], **BESIDE)
    assert same_bits(bits_of(model), before)
    second.apply(model)
    assert recalled(model, FACTS[3:]) == 1.0
    first.apply(model)
    assert recalled(model, FACTS) == 1.0


def test_other_edits_must_be_of_the_model_and_whole():
    model = pupil()
    first = learn(model, tokenizer(), FACTS[:3], slots=50, **SETTINGS | {"most_epochs": 1})
    second = learn(model, tokenizer(), FACTS[:3], slots=50, **SETTINGS | {"most_epochs": 1, "lr": 0.01})
    before = bits_of(model)
    with pytest.raises(ValueError, match="neither in nor out"):
        learn(model, tokenizer(), FACTS[3:], others=[first, second], **BESIDE)
    assert same_bits(bits_of(model), before)
    with pytest.raises(ValueError, match="belongs to model"):
        learn(pupil("gpt2"), tokenizer(), FACTS[3:], others=[first], **BESIDE)
