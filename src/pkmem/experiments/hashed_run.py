"""`pkmem train` for a model with hashed tables, which no recipe knows: a process of the family `hashed`.

python -m pkmem.experiments.hashed_run --hashed '{"0": "instead"}' --config FILE --out DIR [OPTION=SETTING ...]
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from pkmem.experiments.hashed_table import put_hashed_tables
from pkmem.training.freed_memory import keep_freed_memory
from pkmem.training.reading import Parser, as_flags, given_recipe, recorded_recipe
from pkmem.training.run import train


def main(arguments: list[str] | None = None) -> None:
    """Trains one model; its run directory cannot be loaded by anything else.

    Raises:
        ValueError: an option or the recipe cannot be used.
        KeyboardInterrupt: ended by Ctrl-C, with a checkpoint.
    """
    parser = Parser(prog="python -m pkmem.experiments.hashed_run", description=__doc__)
    parser.add_recipe()
    parser.add_argument("--hashed", type=dict[str, str], required=True, help='blocks, and "instead" or "beside"')
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of OUT")
    options = parser.parse_args(as_flags(sys.argv[1:] if arguments is None else arguments))
    recipe = recorded_recipe(Path(options.out), {}) if options.resume else given_recipe(options)
    keep_freed_memory()
    summary = train(recipe, options.resume, change=partial(put_hashed_tables, hashed=options.hashed))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
