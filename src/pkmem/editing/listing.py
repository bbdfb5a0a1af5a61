"""Which edits are in a saved model, in words."""

from __future__ import annotations

from pkmem.editing.directory import SavedModel
from pkmem.editing.edit import Edit

_SHOWN = 3  # facts of an edit


def describe_edits(model: SavedModel) -> str:
    """Which model this is and which edits are in it: their facts, rows, sizes and figures."""
    inside = [edit for edit in model.copies() if model.holds(edit)]
    outside = [edit for edit in model.copies() if not model.holds(edit)]
    changed = sum(edit.num_rows for edit in inside)
    lines = [
        f"model {model.fingerprint} in {model.folder}",
        f"{len(inside)} edit{'s' * (len(inside) != 1)} in, {changed:,} rows changed"
        if inside
        else "no edit is in" + ("" if model.is_zero() else ", but its values are not zero: they were trained"),
    ]
    for edit in inside:
        lines += _described(edit, model)
    for edit in outside:
        lines.append(
            f"{edit.name}: not in, though a copy is here (an apply or a forget was interrupted): "
            f"apply it again, or delete {model.copy_of(edit)}"
        )
    return "\n".join(lines)


def _described(edit: Edit, model: SavedModel) -> list[str]:
    size = model.copy_of(edit).stat().st_size
    figures = ", ".join(f"{name} {_plain(figure)}" for name, figure in edit.figures.items())
    lines = [f"{edit.name}: {len(edit.facts):,} facts, {edit.num_rows:,} rows, {size / 1e6:,.1f} MB", f"  {figures}"]
    lines += [f"  {fact.prompts[0]!r} -> {fact.completion!r}" for fact in edit.facts[:_SHOWN]]
    if len(edit.facts) > _SHOWN:
        lines.append(f"  and {len(edit.facts) - _SHOWN:,} more")
    return lines


def _plain(figure: str | int | float) -> str:
    """A figure of somebody's file, without what a terminal would obey."""
    return f"{figure:,.4g}" if isinstance(figure, int | float) else repr(figure)
