"""What a run starts from: its directory, its tokenizer, its text as tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pkmem.files.documents import CheckpointError, empty, save_text
from pkmem.text import TokenFile, read_documents, tokenize, train_tokenizer
from pkmem.training.checkpoint import latest_checkpoint, newest_valid_checkpoint
from pkmem.training.processes import restarts_by_itself
from pkmem.training.recipe import Recipe
from pkmem.training.start import load_tokenizer, starting_tokenizer

_TOKENIZER_CHARS = 50_000_000  # text a tokenizer is trained on; more changes little and takes minutes


def prepare_run(
    recipe: Recipe, resume: bool, overwrite: bool, progress: bool
) -> tuple[PreTrainedTokenizerBase, TokenFile, TokenFile, Path | None]:
    """What a run starts from: tokenizer, tokens of both splits, and the checkpoint to resume."""
    if restarts_by_itself():
        if overwrite:
            raise ValueError(
                "torchrun --max-restarts would run --overwrite again after a failure and replace what the run had "
                "done: use --resume, which starts a run that has no checkpoint"
            )
        if latest_checkpoint(recipe.out) is None:
            resume, overwrite = False, resume  # an earlier start, if there was one, did not get far
    _check_run_directory(recipe.out, resume, overwrite)
    _check_pretrained_stays(recipe)
    checkpoint = newest_valid_checkpoint(recipe.out, lambda line: say(True, line)) if resume else None
    return *prepare_text(recipe, resume, progress), checkpoint


def prepare_text(recipe: Recipe, resume: bool, progress: bool) -> tuple[PreTrainedTokenizerBase, TokenFile, TokenFile]:
    """The run's tokenizer, trained if none is named or there to resume with, and the tokens of both splits.

    Raises:
        ValueError: no text, or too little of it, in `recipe.data`.
    """
    named = load_tokenizer(recipe.out / "tokenizer") if resume else starting_tokenizer(recipe)
    tokenizer: PreTrainedTokenizerBase
    if named is not None:
        tokenizer = named
    else:
        say(progress, f"training a byte-level BPE of {recipe.model.vocab_size} tokens on {recipe.data}")
        tokenizer = train_tokenizer(_first_chars(read_documents(recipe.data, "train")), recipe.model.vocab_size)
    train_file = tokenize(recipe.data, "train", tokenizer, progress=progress)
    held_out_file = tokenize(recipe.data, "validation", tokenizer, progress=progress)
    for split, file in (("training", train_file), ("held-out", held_out_file)):
        if file.num_skipped:
            say(True, f"skipped {file.num_skipped} files or lines of the {split} text that are not readable")
    return tokenizer, train_file, held_out_file


def _first_chars(documents: Iterable[str]) -> Iterator[str]:
    count = 0
    for text in documents:
        yield text
        count += len(text)
        if count > _TOKENIZER_CHARS:
            return


def _check_run_directory(out: Path, resume: bool, overwrite: bool) -> None:
    if resume:
        if latest_checkpoint(out) is None:
            raise CheckpointError(f"{out} has no checkpoint to resume from: start it without --resume")
    elif out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not overwrite:
            raise ValueError(f"{out} already exists: choose another --out, or --overwrite it, or --resume it")
        if not (out / "config.yaml").exists():
            raise ValueError(f"{out} is not a run directory (it has no config.yaml): choose another --out")


def _check_pretrained_stays(recipe: Recipe) -> None:
    pretrained, out = recipe.model.pretrained, recipe.out.resolve()
    if pretrained is not None and Path(pretrained).exists() and Path(pretrained).resolve().is_relative_to(out):
        raise ValueError(
            f"{recipe.out} holds model.pretrained, {pretrained}, which a run does not replace: choose another --out"
        )


def make_run_directory(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """In place of the one to overwrite; made when all else is ready, so that a bad recipe leaves nothing behind."""
    if (recipe.out / "config.yaml").exists():
        empty(recipe.out)
    recipe.out.resolve().mkdir(parents=True, exist_ok=True)  # also where a link leads that leads nowhere yet
    save_text(recipe.out / "config.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    tokenizer.save_pretrained(recipe.out / "tokenizer")


def say(loud: bool, text: str) -> None:
    if loud:
        tqdm.write(text, file=sys.stderr)
