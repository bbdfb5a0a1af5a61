"""Training checkpoints that are either complete and verified, or not there.

A checkpoint is a folder `RUN/checkpoints/step-N`. It is written as `step-N.tmp`, sealed with a manifest of
sizes, hashes and the shapes of whole tensors, synced to the disk and only then renamed, so a reader never meets half
of one:

    write -> manifest.json -> fsync -> rename -> prune

`step-N.old` exists for a moment while a step is saved again. Tensors go to safetensors, a file of each process, and
everything else to JSON: nothing here writes or reads a pickle. The processes of one training run write together;
any number may read.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkmem.files.documents import CheckpointError, load_json, save_json
from pkmem.files.durable import move, sync
from pkmem.files.tensor_file import Digest, digest_of
from pkmem.training.shards import Shard, Shards
from pkmem.training.together import Together

_FORMAT = 2  # 1, of pkmem before 0.2, was a list of files alone


def save_checkpoint(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    shard: Shard | None = None,
    *,
    keep: int = 2,
    together: Together | None = None,
) -> Path:
    """Writes `RUN/checkpoints/step-N` so that it is there whole or not at all, then drops the older ones.

    Whatever happens before the final rename (an exception, Ctrl-C, a full disk, kill -9, in any of the processes), the
    checkpoints that were there stay valid; what a killed run left behind is cleaned up by the next save.

    Args:
        run: folder of the training run, which all processes see; created if missing.
        step: N, at least 0. A step saved before is replaced.
        write: fills the empty folder it is given, subfolders allowed; done with every file when it returns. Of several
            processes the first one does this.
        shard: the tensors that this process writes, from `plan_shard`.
        keep: how many checkpoints up to step N stay, this one included. Those of later steps are not touched.
        together: the processes that save together; None for this one alone.

    Returns:
        the folder of the new checkpoint.

    Raises:
        ValueError: `step` is negative or `keep` is below 1.
        CheckpointError: in all processes: no space is left for one of them, or `write` made a `manifest.json` or a link.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint needs step >= 0 and keep >= 1, got step={step} and keep={keep}")
    together = together or Together()
    folder = run / "checkpoints"
    final, tmp, old = (folder / f"step-{step}{suffix}" for suffix in ("", ".tmp", ".old"))

    def open_folder() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        sync(run)
        _tidy(folder)
        tmp.mkdir()

    def commit(shards: dict[str, Digest]) -> None:
        write(tmp)
        _seal(tmp, step, shards, shard.tensors if shard else {})
        if final.exists():
            move(final, old)
        move(tmp, final)
        sync(folder)

    try:
        together.first(open_folder)
        written = together.each(lambda: shard.write(tmp) if shard else {})
        together.first(lambda: commit({name: digest for part in written for name, digest in part.items()}))
    except BaseException as error:
        if together.rank == 0:
            _tidy(folder)
        if not _disk_is_full(error):
            raise
        previous = latest_checkpoint(run)
        intact = f"the previous checkpoint {previous.name} is intact" if previous else "no checkpoint exists"
        where = "".join(f" {note}" for note in getattr(error, "__notes__", []))
        raise CheckpointError(f"{final}: no space left{where} ({error}); free some, save again; {intact}") from error
    together.first(lambda: _drop_older(folder, step, keep))
    return final


def verify_checkpoint(path: Path, together: Together | None = None) -> None:
    """Reads a whole checkpoint and compares it with its manifest; several processes share the reading.

    Args:
        path: the folder `step-N`.
        together: the processes that all call this; None for this one alone.

    Raises:
        CheckpointError: the manifest is absent, broken or of another step, a file is missing, has another size or hash,
            is a link, or is not in the manifest, or the tensors are not whole; in all processes.
    """
    together = together or Together()
    together.each(lambda: _verify(path, together))


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. Hashes nothing: see `newest_valid_checkpoint`.

    Args:
        run: folder of the training run.

    Returns:
        `RUN/checkpoints/step-N`; `step-N.old` if a run was killed in the instant between two renames.
    """
    sealed = {n: path for n, path in _found(run / "checkpoints").items() if (path / "manifest.json").is_file()}
    return sealed[max(sealed)] if sealed else None


def newest_valid_checkpoint(run: Path, skip: Callable[[str], None], together: Together | None = None) -> Path | None:
    """The newest checkpoint that is as it was written, or None where there is no checkpoint at all.

    Args:
        run: folder of the training run.
        skip: told of each newer one that is not valid, which and why.
        together: the processes that all call this; None for this one alone.

    Raises:
        CheckpointError: there are checkpoints and none is valid.
    """
    together = together or Together()
    found = together.first(lambda: _found(run / "checkpoints"))
    for step in sorted(found, reverse=True):
        try:
            verify_checkpoint(found[step], together)
        except CheckpointError as error:
            if step == min(found):
                raise
            skip(f"skipped {found[step].name}: {error}")
        else:
            return found[step]
    return None


def open_shards(path: Path) -> Shards:
    """The tensors of a checkpoint.

    Args:
        path: the folder `step-N`, verified.

    Raises:
        CheckpointError: as `verify_checkpoint`, without the hashes.
    """
    return Shards(path, _read_manifest(path)["tensors"])


def _found(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, sealed or damaged; `step-N.old` counts while there is no `step-N`."""
    found = {}
    for path in sorted(folder.glob("step-*"), reverse=True):  # `step-N.old` before `step-N`
        name = re.fullmatch(r"step-([0-9]+)(\.old)?", path.name)
        if name and path.is_dir():
            found[int(name[1])] = path
    return found


def _drop_older(folder: Path, step: int, keep: int) -> None:
    earlier = {n: path for n, path in _found(folder).items() if n < step and (path / "manifest.json").is_file()}
    for n in sorted(earlier, reverse=True)[keep - 1 :]:
        with contextlib.suppress(OSError):  # someone reads it on Windows: it goes with a later save
            earlier[n].rename(folder / f"step-{n}.tmp")  # so that a kill leaves no half-deleted step-n
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Removes every `step-N.tmp`; a `step-N.old` becomes `step-N` again, or goes where there is a new one."""
    for tmp in folder.glob("step-*.tmp"):
        shutil.rmtree(tmp, ignore_errors=True)  # what a network disk holds back goes with the next save
    for old in folder.glob("step-*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            move(old, old.with_suffix(""))


def _seal(folder: Path, step: int, shards: dict[str, Digest], tensors: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest and syncs every file and folder to the disk, but the shards, which are there already."""
    files = _files(folder)
    if (folder / "manifest.json").exists():
        raise CheckpointError(f"{folder / 'manifest.json'}: the checkpoint needs this name; choose another")
    digests = shards | {name: digest_of(file) for name, file in files.items() if name not in shards}
    others = [file for name, file in files.items() if name not in shards]
    for path in [*others, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)
    manifest = {
        "format": _FORMAT,
        "step": step,
        "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(digests.items())},
        "tensors": tensors,
    }
    save_json(folder / "manifest.json", manifest | {"sha256": _hash_of(manifest)})


def _hash_of(manifest: dict[str, Any]) -> str:
    """Of all of a manifest but this hash."""
    rest = {name: entry for name, entry in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, of the right form and whole."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: a link; put the folder itself there")
    file = path / "manifest.json"
    manifest = load_json(file)
    is_object = isinstance(manifest, dict)
    if is_object and "format" not in manifest and (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path} was made by an earlier version of pkmem and cannot be resumed: start the run anew; the model in it "
            "can still be loaded"
        )
    if is_object and isinstance(manifest.get("format"), int) and manifest["format"] > _FORMAT:
        raise CheckpointError(f"{file}: made by a later version of pkmem; update pkmem")
    entries = [manifest.get(name) for name in ("files", "tensors")] if is_object else []
    if (
        not is_object
        or manifest.get("format") != _FORMAT
        or not all(isinstance(entry, dict) and all(isinstance(e, dict) for e in entry.values()) for entry in entries)
        or manifest.get("sha256") != _hash_of(manifest)
    ):
        raise CheckpointError(f"{file}: not a manifest, or changed; {_fix(path)}")
    step = re.fullmatch(r"step-([0-9]+)(\.old)?", path.name)
    if step and int(step[1]) != manifest.get("step"):
        raise CheckpointError(f"{file}: of step {manifest.get('step')}, not of this one; {_fix(path)}")
    return manifest


def _fix(path: Path) -> str:
    return f"delete {path} and resume from an earlier checkpoint, or copy it again"


def _verify(path: Path, together: Together) -> None:
    manifest, files = _read_manifest(path)["files"], _files(path)
    for name in sorted(manifest.keys() | files.keys()):
        if name not in files:
            raise CheckpointError(f"{path / name}: missing; {_fix(path)}")
        if name not in manifest:
            raise CheckpointError(f"{path / name}: not in the manifest, someone added it; move it away")
        size, expected = files[name].stat().st_size, manifest[name].get("size")
        if size != expected:
            raise CheckpointError(f"{path / name}: {size} bytes instead of {expected}; {_fix(path)}")
    by_size = sorted(files, key=lambda name: (-manifest[name]["size"], name))
    for name in by_size[together.rank :: together.size]:
        if digest_of(files[name]).sha256 != manifest[name].get("sha256"):
            raise CheckpointError(f"{path / name}: its content changed (another sha256); {_fix(path)}")
    open_shards(path)


def _files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of every file but the manifest."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for path in found.values():
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: a link or device; put a plain file there")
    return {name: path for name, path in found.items() if path.is_file() and name != "manifest.json"}


def _disk_is_full(error: BaseException) -> bool:
    """Also over a quota or a limit on file size; safetensors has the number of the OSError in its text."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)
