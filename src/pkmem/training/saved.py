"""A trained model from where it was saved: a run, a checkpoint or any saved model directory."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pkmem.training.checkpoint import CheckpointError, latest_checkpoint, refuse_pickles, verify_checkpoint


def find_saved(path: Path) -> Path:
    """The folder with a model's config.json: RUN/model, else the newest checkpoint of RUN, else the path itself.

    Raises:
        CheckpointError: nothing there, or what is there is incomplete, damaged or a pickle.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give a run or a saved model directory")
    checkpoint = latest_checkpoint(path)
    folder = next(
        (f for f in (path / "model", checkpoint, path) if f is not None and (f / "config.json").exists()), None
    )
    if folder is None:
        refuse_pickles(path)
        raise CheckpointError(f"{path} holds no model (no config.json): give a run or a saved model directory")
    if (folder / "manifest.json").exists():
        verify_checkpoint(folder)
    refuse_pickles(folder)
    return folder


def load_saved(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode, and its tokenizer.

    Raises:
        CheckpointError: nothing there, or what is there is incomplete, damaged or a pickle.
    """
    folder = find_saved(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"weights are missing, {min(info['missing_keys'])} among them")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot load the model in {folder}: {reason}; save it again, or use another checkpoint"
        ) from error
    return model.eval(), tokenizer
