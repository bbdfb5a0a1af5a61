"""Recipes: what cannot be trained is refused, with the option, what it may be and a value that works."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkmem.lm.config import ModelConfig
from pkmem.training.recipe import Recipe, TrainingConfig
from tiny import MODEL, TRAINING, tiny


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("num_layers", 0, 1),
        ("width", 0, 4),
        ("num_heads", 0, 1),
        ("ffn_width", 0, 1),
        ("context_tokens", 1, 2),
        ("vocab_size", 256, 257),
        ("dropout", 1.0, 0.0),
        ("dropout", -0.1, 0.9),
        ("num_layers", "2", 2),
        ("width", 8.0, 8),
    ],
)
def test_model_options_have_a_range(name: str, refused: Any, accepted: Any) -> None:
    assert getattr(ModelConfig(**{name: accepted}), name) == accepted
    with pytest.raises(ValueError, match=rf"^model\.{name} is {refused!r} but must be (an integer >=|in) "):
        ModelConfig(**{name: refused})


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("num_tokens", 0, 1),
        ("batch_tokens", 0, 1),
        ("micro_batches", 0, 1),
        ("log_every_steps", 0, 1),
        ("eval_every_steps", 0, 1),
        ("checkpoint_every_steps", 0, 1),
        ("eval_tokens", 0, 1),
        ("lr", 0.0, 1e-9),
        ("value_lr", -1.0, 1e-9),
        ("max_norm", 0.0, 1e-9),
        ("warmup_share", 1.0, 0.0),
        ("beta2", 1.0, 0.0),
        ("weight_decay", -0.1, 0.0),
        ("seed", -1, 0),
    ],
)
def test_training_options_have_a_range(name: str, refused: Any, accepted: Any) -> None:
    assert getattr(TrainingConfig(**{name: accepted}), name) == accepted
    with pytest.raises(ValueError, match=rf"^training\.{name} is {refused} but must be (>|>=|in) "):
        TrainingConfig(**{name: refused})


@pytest.mark.parametrize("width", [3, 33, 127])
def test_a_width_that_is_no_multiple_of_the_heads_comes_with_one_that_is(width: int) -> None:
    with pytest.raises(ValueError, match=r"multiple of model\.num_heads = 4: try width \d+$") as caught:
        ModelConfig(width=width, num_heads=4)
    ModelConfig(width=suggested(caught.value), num_heads=4)


@pytest.mark.parametrize("batch_tokens", [1, 32, 100, 191, 1000])
def test_batch_tokens_that_do_not_divide_come_with_a_number_that_does(batch_tokens: int) -> None:
    training = replace(TRAINING, batch_tokens=batch_tokens, micro_batches=3)
    with pytest.raises(ValueError, match=r"context_tokens \* micro_batches = 96: try \d+$") as caught:
        Recipe(model=MODEL, training=training)
    Recipe(model=MODEL, training=replace(training, batch_tokens=suggested(caught.value)))


def suggested(error: Exception) -> int:
    found = re.search(r"try (?:width )?(\d+)$", str(error))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"layer 2 in model.memory_layers is outside \[0, 2\): layers are counted from 0"),
        ([0, -1], r"layer -1 in model.memory_layers is outside \[0, 2\)"),
        ([0, 1, 0], "layer 0 is named twice in model.memory_layers"),
    ],
)
def test_memory_layers_exist_and_are_named_once(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(model=replace(MODEL, memory_layers=layers), training=TRAINING)


def test_steps_and_sequences_follow_from_the_tokens() -> None:
    recipe = tiny(Path("d"), Path("o"), training={"num_tokens": 1279})
    assert recipe.training.num_steps == 9  # the tokens left over, less than an update, are not trained on
    assert recipe.micro_batch_sequences == 2
    assert replace(TRAINING, num_tokens=1).num_steps == 1


def test_to_dict_is_plain_and_complete() -> None:
    recipe = tiny(Path("d"), Path("o"))
    document = yaml.safe_load(yaml.safe_dump(recipe.to_dict()))
    assert document == recipe.to_dict()
    assert document["out"] == "o"
    assert document["model"] == vars(recipe.model)
    assert document["memory"] == recipe.memory.to_dict()
    assert document["training"] == vars(recipe.training)
