"""Trial 7: every file of a checkpoint is damaged in every way."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.reliability.outcome import Outcome
from pkmem.training.checkpoint import newest_valid_checkpoint, save_checkpoint
from pkmem.training.shards import Part, Shard, plan_shard
from pkmem.training.state import rng_state, save_state
from pkmem.training.together import Together

Damage = Callable[[Path, list[Path], random.Random], None]


def flip(file: Path, others: list[Path], draw: random.Random) -> None:
    """One bit."""
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, others: list[Path], draw: random.Random) -> None:
    """To any length, down to nothing; more than a last newline, which nobody needs."""
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size - 1)])


def delete(file: Path, others: list[Path], draw: random.Random) -> None:
    """It is gone."""
    file.unlink()


def swap(file: Path, others: list[Path], draw: random.Random) -> None:
    """With another file of the checkpoint, or the same one of the checkpoint before, of other content."""
    other = draw.choice([one for one in others if one.read_bytes() != file.read_bytes()])
    content = other.read_bytes()
    if other.parent == file.parent:
        other.write_bytes(file.read_bytes())
    file.write_bytes(content)


def damaged_checkpoints(short: bool) -> Iterator[Outcome]:
    """Damages one file at a time of the newer of two checkpoints, and asks for the newest that is valid."""
    draw, mutations = random.Random(0), 60 if short else 500
    kinds: dict[str, Damage] = {"bits flipped": flip, "ends cut off": cut, "deleted": delete, "swapped": swap}
    done: Counter[str] = Counter()
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        for step in (1, 2):
            newest = _saved(run, step)
        files = sorted(path for path in newest.iterdir())
        kept = shutil.copytree(newest, Path(place) / "kept")
        for i in range(mutations):
            kind, file = list(kinds)[i % len(kinds)], files[i // len(kinds) % len(files)]
            others = [other for other in files if other != file] + [newest.with_name("step-1") / file.name]
            kinds[kind](file, others, draw)
            said: list[str] = []
            found = newest_valid_checkpoint(run, said.append)
            changed = {f.name for f in files if not f.exists() or f.read_bytes() != (kept / f.name).read_bytes()}
            named = len(said) == 1 and any(f"step-2/{name}: " in said[0] for name in changed)
            if found is None or found.name != "step-1" or not named:
                missed.append(f"{kind}: {file.name} gave {found and found.name}, {said}")
            done[kind] += 1
            for name in changed:
                shutil.copyfile(kept / name, newest / name)
        assert newest_valid_checkpoint(run, missed.append) == newest
    counts = ", ".join(f"{number} {kind}" for kind, number in done.items())
    yield Outcome(
        7,
        f"{mutations} damages to the {len(files)} files of a checkpoint of 2 processes: {counts}",
        "all detected, the file named, the checkpoint before taken",
        f"{mutations - len(missed)} detected" + "".join(f"; missed: {line}" for line in missed[:3]),
        not missed,
    )


def _saved(run: Path, step: int) -> Path:
    """A checkpoint of two processes, with the kinds of files that a run's has."""
    table, bias = torch.randn(256, 32), torch.randn(32)
    whole = plan_shard(
        {"model.table": table, "model.bias": bias, "optimizer.bias.step": torch.tensor(float(step))}, Together()
    )
    first, second = dict(whole.parts), {"model.table": Part((0, 16), table[:, 16:])}
    first["model.table"] = Part((0, 0), table[:, :16])

    def write(folder: Path) -> None:
        Shard("shard-00002-of-00002.safetensors", second, whole.tensors).write(folder)
        for rank in range(2):
            save_state(folder / f"random-{rank}.json", rng_state() | {"rank": [step, rank]})
        for name in ("optimizer", "schedule", "journal"):
            save_state(folder / f"{name}.json", {"step": step, name: [0.5] * 20})
        (folder / "config.json").write_text(f'{{"model_type": "pkmem", "step": {step}}}')

    return save_checkpoint(run, step, write, Shard("shard-00001-of-00002.safetensors", first, whole.tensors))
