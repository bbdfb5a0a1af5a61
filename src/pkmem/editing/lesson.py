"""Teaching a saved model the facts of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pkmem.editing.directory import SavedModel
from pkmem.editing.learning import learn
from pkmem.text import read_documents
from pkmem.text.facts import read_facts
from pkmem.training.saved import load_saved


def learn_saved(path: Path, facts_file: Path, out: Path, background: str | None, settings: dict[str, Any]) -> str:
    """Writes the edit by which a saved model learns facts; the model stays as it is.

    Args:
        path: a model directory with memories; edits that are in keep their rows.
        facts_file: see `read_facts`.
        out: the file to make.
        background: as in `read_documents`; None lets the model write some.
        settings: of `pkmem.learn`.

    Returns:
        what was learned, in a few lines.

    Raises:
        ValueError: `out` is there, or something cannot be read or learned.
    """
    if out.exists():
        raise ValueError(f"{out} already exists: choose another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no directory: make it, or choose another --out")
    facts = read_facts(facts_file)
    inside = SavedModel(path).edits_in()
    model, tokenizer = load_saved(path)
    texts = None if background is None else read_documents(background, "train")
    edit = learn(model, tokenizer, facts, background=texts, others=inside, progress=True, **settings)
    edit.save(out)
    figures = edit.figures
    fix = ""
    if figures["recall"] < settings["recall"]:
        fix += "not all: give --slots or --most_epochs more, or --keep_near less\n"
    if (kept := figures.get("recall_of_others", 1.0)) < settings["recall"]:
        fix += f"with it {kept:.1%} of what the edits in {path} taught is still answered: give --most_epochs more\n"
    return (
        f"{figures['recall']:.1%} of {figures['questions']:,} answers learned in {figures['seconds_training']:.0f} s "
        f"(and {figures['seconds_preparing']:.0f} s before, to see what is read elsewhere)\n{fix}"
        f"{out}: edit {edit.name}, {len(facts):,} facts in {edit.num_rows:,} rows, {out.stat().st_size / 1e6:.1f} MB\n"
        f"next: pkmem apply {path} {out}"
    )
