"""Tables that a `device_map` leaves in the computer's memory: what is read of them travels, not they.

accelerate copies every weight that it keeps there to the device at each call, and that of a table is most of the model.
"""

from __future__ import annotations

from torch import nn

from pkmem.lm.stored import stored_tables


def keep_tables_where_they_are(model: nn.Module) -> None:
    """Lets the tables that accelerate keeps on the CPU for a model on other devices be read there.

    Args:
        model: as accelerate has dispatched it by its `hf_device_map`, or not.
    """
    places = getattr(model, "hf_device_map", {})
    if len(set(map(str, places.values()))) < 2:
        return
    from accelerate.hooks import remove_hook_from_module

    for name, table in stored_tables(model).items():
        nearest = max((place for place in places if f"{name}.".startswith(f"{place}." if place else "")), key=len)
        hook = getattr(table, "_hf_hook", None)
        if str(places[nearest]) != "cpu" or hook is None:
            continue
        kept = [one.weights_map["weight"] for one in getattr(hook, "hooks", (hook,)) if one.weights_map is not None]
        remove_hook_from_module(table)
        if table.weight.is_meta and kept:  # of a table that several memories share, accelerate leaves nothing
            table.weight = nn.Parameter(kept[0], table.weight.requires_grad)
