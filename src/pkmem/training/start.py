"""The model that a run starts from, fresh or pretrained, and which of its parameters move."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pkmem.layer.config import require
from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.query import MaskedBatchNorm
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.huggingface import context_tokens
from pkmem.training.recipe import Recipe
from pkmem.training.saved import find_pretrained, find_saved, load_saved


def starting_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the recipe names, by itself or by its pretrained model; None where it names none.

    Raises:
        ValueError: it cannot be loaded.
    """
    pretrained = recipe.model.pretrained
    place = recipe.tokenizer if pretrained is None else find_saved(find_pretrained(pretrained))
    return None if place is None else load_tokenizer(place)


def load_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """A saved tokenizer, from its directory or by its name on the Hugging Face Hub.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fix = "name a directory of a saved tokenizer, or one on the Hugging Face Hub"
        raise ValueError(f"cannot load the tokenizer {place}: {fix} ({str(error).splitlines()[0]})") from error


def starting_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None) -> PreTrainedModel:
    """The model of a recipe before its first update; what `training.train` leaves out is frozen.

    Args:
        recipe: the run.
        tokenizer: the run's.
        checkpoint: one of the run to resume, whose weights the trainer loads; a pretrained model is then built from it,
            so that what it came from may be gone or changed.

    Raises:
        ValueError: the model cannot be built or loaded, or does not go with the recipe.
    """
    if recipe.model.pretrained is None:
        model = build_model(recipe.model, recipe.memory, len(tokenizer), tokenizer.eos_token_id)
    else:
        model, _ = load_saved(checkpoint or find_pretrained(recipe.model.pretrained))
        _require_fits(recipe, model, tokenizer)
        decoder = getattr(model, "base", model)
        decoder.loss_type = decoder.loss_type or "ForCausalLM"  # as in build_model
    freeze(model, recipe.training.train)
    if recipe.training.gradient_checkpointing:
        compute_again_in_backward(model)
    return model


def _require_fits(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    longest, context = context_tokens(model), recipe.model.context_tokens
    require(context <= longest, "model.context_tokens", context, f"in [2, {longest}], the model's")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{recipe.model.pretrained} has embeddings of {rows} tokens but its tokenizer has {len(tokenizer)}: "
            "call model.resize_token_embeddings(len(tokenizer)) and save it again"
        )
    if any(isinstance(part, QuantisedValues) for part in model.modules()):
        raise ValueError(
            f"the values of {recipe.model.pretrained} are quantised and do not train: train the model as it was before "
            "`pkmem convert`"
        )
    if recipe.training.train != "all" and not tables_in(model):
        raise ValueError(
            f"training.train is {recipe.training.train!r} but {recipe.model.pretrained} has no memory: put some in with "
            "`pkmem retrofit`, or train 'all'"
        )


def compute_again_in_backward(model: PreTrainedModel) -> None:
    """Keeps the hidden states between blocks alone for the backward pass (gradient checkpointing)."""
    older = model.gradient_checkpointing_enable  # what older versions of transformers call it
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    model.disable_input_require_grads()  # gradients go no further down than what is trained


def freeze(model: nn.Module, train: str) -> None:
    """Leaves a gradient to what is trained alone.

    Args:
        model: with memories, unless all of it is trained.
        train: "values", "memory" or "all", see `TrainingConfig`.
    """
    if train == "all":
        return
    model.requires_grad_(False)
    parts: Iterable[nn.Module] = memories_in(model).values() if train == "memory" else tables_in(model)
    for part in parts:
        part.requires_grad_(True)
    if train == "values":
        for part in model.modules():
            if isinstance(part, MaskedBatchNorm):  # queries that stand still are normalised as they will be read
                part.register_forward_pre_hook(_stay_in_eval)


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    module.eval()
