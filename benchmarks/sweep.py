"""A sweep: many small trainings, each in a process of its own, whose figures one file keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from pkmem.experiments.environment import environment
from pkmem.training.files import save_json


def run_missing(script: str, path: Path, document: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Runs the cells that `document` does not hold yet, two at a time with one thread each; saves it after each.

    Args:
        script: run as `python script --cell JSON`; the last line it prints is the cell's figures.
        path: where the document is kept.
        document: has the finished `cells`, each with its `figures`.
        cells: all that are wanted.
    """
    done = [{key: cell[key] for key in cell if key != "figures"} for cell in document["cells"]]
    lock = Lock()

    def run(cell: dict[str, Any]) -> None:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, "--cell", json.dumps(cell)]
        out = subprocess.run(command, env=one_thread, check=True, stdout=subprocess.PIPE, text=True).stdout
        with lock:
            document["cells"].append({**cell, "figures": json.loads(out.splitlines()[-1])})
            document["environment"] = environment()
            save_json(path, document)
            print(json.dumps(document["cells"][-1]), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [cell for cell in cells if cell not in done]))
