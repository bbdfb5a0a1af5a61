"""The tables of a saved model read once, so that they are in memory when they are mapped."""

from __future__ import annotations

import math
import time
from pathlib import Path

from tqdm import tqdm

from pkmem.files.tensor_file import TensorFile
from pkmem.layer.config import require
from pkmem.lm.stored import file_of, stored_tables
from pkmem.training.saved import is_checkpoint, locate_saved
from pkmem.training.screening import screen_model

_CHUNK_BYTES = 8 << 20


def read_tables_ahead(path: Path, share: float) -> str:
    """Reads the tables of a saved model once, so that the system has them in memory when they are mapped.

    Args:
        path: a run or a saved model's directory.
        share: of the rows of each table, from its first, in (0, 1].

    Returns:
        how much was read in what time.

    Raises:
        ValueError: no model with tables is there, or the share is out of range.
    """
    require(0 < share <= 1, "share", share, "in (0, 1]")
    folder = locate_saved(path)
    if is_checkpoint(folder):
        raise ValueError(f"{folder} is a training checkpoint, which is not mapped: `pkmem export {path}` first")
    model = screen_model(folder)
    places = []
    for name in stored_tables(model):
        file = TensorFile(file_of(f"{name}.weight", folder))
        if f"{name}.weight" not in file.stored:
            raise ValueError(f"{file.path} lacks the table {name}.weight: save the model again")
        stored = file.stored[f"{name}.weight"]
        places.append((file.path, stored.start, stored.start + math.ceil(share * (stored.stop - stored.start))))
    if not places:
        raise ValueError(f"{path} has no memories: there are no tables to read")
    start = time.perf_counter()
    num_bytes = sum(stop - first for _, first, stop in places)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="reading tables") as bar:
        for file_path, first, stop in places:
            with file_path.open("rb", buffering=0) as stream:
                stream.seek(first)
                for at in range(first, stop, _CHUNK_BYTES):
                    bar.update(len(stream.read(min(_CHUNK_BYTES, stop - at))))
    return f"read {num_bytes / 1e6:,.1f} MB of {len(places)} tables in {time.perf_counter() - start:.1f} s"
