"""Fine-tuning and adapters learn what they are taught, on a clock that stops while they are asked."""

import time
from dataclasses import replace

import pytest
import torch

from pkmem.editing.kept_answers import KeptAnswers
from pkmem.experiments.learning.asking import as_questions, recalled
from pkmem.experiments.learning.teaching import Clock, Lesson, adapt, fine_tune, with_adapters
from taught import llama, tokenizer  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is:DeprecationWarning"),  # of a library PEFT looks for
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
PAIRS = [("one is", " a"), ("two is", " b"), ("three is", " c")]


def lesson(rate: float = 5e-3, most_epochs: int = 120) -> Lesson:
    return Lesson(PAIRS, rate, 2, most_epochs, seed=0)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_and_stops_when_it_knows_enough(method, tokenizer) -> None:  # noqa: F811
    torch.manual_seed(0)
    model = llama()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    clock = Clock(lambda model: {"recall": 0.0})
    if method == "full":
        taught, num_bytes = model, fine_tune(model, tokenizer, lesson(), clock)
        assert num_bytes == 4 * sum(weight.numel() for weight in before.values())
    else:
        taught, num_bytes = adapt(model, tokenizer, lesson(), clock)
        weights = dict(taught.base_model.model.named_parameters())
        assert all(
            torch.equal(weights[name.replace("_proj.", "_proj.base_layer.")], old) for name, old in before.items()
        )
        assert 0 < num_bytes < 4 * sum(weight.numel() for weight in before.values())
    taught.eval()
    with torch.no_grad():
        assert recalled(taught, tokenizer, PAIRS) == [True] * 3
    assert len(clock.epochs) > 1
    assert len(clock.epochs) < 120
    assert clock.epochs[-1]["seconds"] == pytest.approx(clock.seconds, abs=0.1)


def test_answers_that_are_kept_change_less(tokenizer) -> None:  # noqa: F811
    asked = as_questions(tokenizer, [("four is", " d"), ("five is", " e")])
    moved = {}
    for keep in (False, True):
        torch.manual_seed(0)
        model = llama()
        near = KeptAnswers(model, asked)
        fine_tune(model, tokenizer, replace(lesson(), near=near if keep else None), Clock(lambda model: {}))
        with torch.no_grad():
            assert recalled(model, tokenizer, PAIRS) == [True] * 3
            moved[keep] = near.divergence(model, [0, 1]).item()
    assert 0 < moved[True] < 0.1 * moved[False]


def test_it_ends_after_so_many_epochs_at_most(tokenizer) -> None:  # noqa: F811
    clock = Clock(lambda model: {})
    fine_tune(llama(), tokenizer, lesson(rate=1e-9, most_epochs=3), clock)
    assert len(clock.epochs) == 3


def test_a_rate_that_breaks_the_model_ends_the_lesson(tokenizer) -> None:  # noqa: F811
    clock = Clock(lambda model: {})
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    fine_tune(model, tokenizer, lesson(), clock)
    assert clock.epochs == []


def test_the_clock_stops_while_it_asks() -> None:
    clock = Clock(lambda model: time.sleep(0.2) or {"recall": 0.5})
    clock.epoch(torch.nn.Identity())
    clock.epoch(torch.nn.Identity())
    clock.stop()
    assert [epoch["recall"] for epoch in clock.epochs] == [0.5, 0.5]
    assert clock.seconds < 0.2


def test_without_peft_the_command_that_installs_it_is_said(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install \"pkmem\[lora\]\""):
        with_adapters(llama(), 0)
