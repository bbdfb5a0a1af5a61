"""Training checkpoints that are either complete and verified, or not there.

A checkpoint is a folder `RUN/checkpoints/step-N`. It is written as `step-N.tmp`, sealed with a manifest of
sizes and hashes, synced to the disk and only then renamed, so a reader never meets half of one:

    write -> manifest.json -> fsync -> rename -> prune

`step-N.old` exists for a moment while a step is saved again. Tensors go to safetensors and everything else to
JSON: nothing here writes or reads a pickle. One process writes to a run at a time; any number may read.
"""

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pkmem.text.durable import move, sync
from pkmem.training.files import CheckpointError, load_json, save_json


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Writes `RUN/checkpoints/step-N` so that it is there whole or not at all, then drops the older ones.

    Whatever happens before the final rename (an exception, Ctrl-C, a full disk, kill -9), the checkpoints
    that were there stay valid; what a killed run left behind is cleaned up by the next save.

    Args:
        run: folder of the training run; created if missing.
        step: N, at least 0. A step saved before is replaced.
        write: fills the empty folder it is given, subfolders allowed; done with every file when it returns.
        keep: how many checkpoints up to step N stay, this one included. Those of later steps are not touched.

    Returns:
        the folder of the new checkpoint.

    Raises:
        ValueError: `step` is negative or `keep` is below 1.
        CheckpointError: no space is left, or `write` made a `manifest.json` or a link.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint needs step >= 0 and keep >= 1, got step={step} and keep={keep}")
    folder = run / "checkpoints"
    final, tmp, old = (folder / f"step-{step}{suffix}" for suffix in ("", ".tmp", ".old"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync(run)
        _tidy(folder)
        tmp.mkdir()
        write(tmp)
        _seal(tmp)
        if final.exists():
            move(final, old)
        move(tmp, final)
        sync(folder)
    except BaseException as error:
        _tidy(folder)
        if not _disk_is_full(error):
            raise
        previous = latest_checkpoint(run)
        intact = f"the previous checkpoint {previous.name} is intact" if previous else "no checkpoint exists"
        raise CheckpointError(f"{final}: no space left ({error}); free some, save again; {intact}") from error
    earlier = {n: path for n, path in _complete(folder).items() if n < step}
    for n in sorted(earlier, reverse=True)[keep - 1 :]:
        with contextlib.suppress(OSError):  # someone reads it on Windows: it goes with a later save
            earlier[n].rename(folder / f"step-{n}.tmp")  # so that a kill leaves no half-deleted step-n
    _tidy(folder)
    return final


def verify_checkpoint(path: Path) -> None:
    """Reads a whole checkpoint and compares it with its manifest.

    Args:
        path: the folder `step-N`.

    Raises:
        CheckpointError: the manifest is absent or broken, a file is missing, has another size or hash, is a
            link, or is not in the manifest.
    """
    manifest, files = load_json(path / "manifest.json"), _files(path)
    fix = f"delete {path} and resume from an earlier checkpoint, or copy it again"
    if not isinstance(manifest, dict) or not all(isinstance(entry, dict) for entry in manifest.values()):
        raise CheckpointError(f"{path / 'manifest.json'}: not a manifest; {fix}")
    for name in sorted(manifest.keys() | files.keys()):
        if name not in files:
            raise CheckpointError(f"{path / name}: missing; {fix}")
        if name not in manifest:
            raise CheckpointError(f"{path / name}: not in the manifest, someone added it; move it away")
        size, expected = files[name].stat().st_size, manifest[name].get("size")
        if size != expected:
            raise CheckpointError(f"{path / name}: {size} bytes instead of {expected}; {fix}")
        if _sha256(files[name]) != manifest[name].get("sha256"):
            raise CheckpointError(f"{path / name}: its content changed (another sha256); {fix}")


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. Hashes nothing: see `verify_checkpoint`.

    Args:
        run: folder of the training run.

    Returns:
        `RUN/checkpoints/step-N`; `step-N.old` if a run was killed in the instant between two renames.
    """
    complete = _complete(run / "checkpoints")
    return complete[max(complete)] if complete else None


def _complete(folder: Path) -> dict[int, Path]:
    """Step -> folder of every sealed checkpoint; `step-N.old` counts while there is no `step-N`."""
    found = {}
    for path in sorted(folder.glob("step-*"), reverse=True):  # `step-N.old` before `step-N`
        name = re.fullmatch(r"step-([0-9]+)(\.old)?", path.name)
        if name and (path / "manifest.json").is_file():
            found[int(name[1])] = path
    return found


def _tidy(folder: Path) -> None:
    """Removes every `step-N.tmp`; a `step-N.old` becomes `step-N` again, or goes where there is a new one."""
    for tmp in folder.glob("step-*.tmp"):
        shutil.rmtree(tmp, ignore_errors=True)  # what a network disk holds back goes with the next save
    for old in folder.glob("step-*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            move(old, old.with_suffix(""))


def _seal(folder: Path) -> None:
    """Writes the manifest and syncs every file and folder to the disk."""
    files = _files(folder)
    if (folder / "manifest.json").exists():
        raise CheckpointError(f"{folder / 'manifest.json'}: the checkpoint needs this name; choose another")
    manifest = {name: {"size": file.stat().st_size, "sha256": _sha256(file)} for name, file in files.items()}
    for path in [*files.values(), *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)
    save_json(folder / "manifest.json", manifest)


def _files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of every file but the manifest."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for path in found.values():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: a link or device; put a plain file there")
    return {name: path for name, path in found.items() if path.is_file() and name != "manifest.json"}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # in chunks


def _disk_is_full(error: BaseException) -> bool:
    """Also over a quota or a limit on file size; safetensors has the number of the OSError in its text."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)
