"""The verb `pkmem plan`: its arguments, and its work, which is imported when it runs."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ActionYesNo, Namespace

from pkmem.training.reading import Parser, given_recipe


def plan_arguments(parser: Parser) -> None:
    """Adds what the verb takes to a parser."""
    parser.add_recipe()
    parser.add_argument("--processes", type=int, default=1, help="of the run in all, one per device")
    parser.add_argument("--per_host", type=int | None, default=None, help="processes of a host; at most 8 if left out")
    parser.add_argument("--device", type=str, default="this", help="H100, H200, ...: configs/devices.yaml; or this one")
    parser.add_argument("--devices", type=str | None, default=None, help="a YAML file of further devices")
    parser.add_argument("--json", action=ActionYesNo, default=False, help="print a JSON object")


def plan(options: Namespace) -> None:
    """Say what training needs of each device and how fast it can be, before it is launched.

    Example: pkmem plan --config configs/paper.yaml memory.num_sub_keys=2048 --processes 64 --device H200
    """
    from pkmem.planning.page import as_json, as_text, planned

    devices = None if options.devices is None else Path(options.devices)
    made, advice = planned(given_recipe(options), options.processes, options.per_host, options.device, devices)
    print(as_json(made, advice) if options.json else as_text(made, advice))
