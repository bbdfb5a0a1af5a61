"""Trial 9: model directories and checkpoints made to do harm.

Run as a program it makes each of them and loads it in a process of its own, which tells what it opened and took.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.reliability.outcome import Outcome

SECONDS, MEGABYTES = 1.0, 200.0
SHARD = "shard-00001-of-00001.safetensors"
EVIL_CODE = "from pathlib import Path\nPath({ran!r}).touch()\nclass Evil: pass\n"


@dataclass(frozen=True)
class Place:
    """Where a case is made.

    Args:
        folder: the good directory that it spoils: a model, or a run with one checkpoint.
        outside: a folder with things that nobody may open.
        ran: a file that code of the case would make.
    """

    folder: Path
    outside: Path
    ran: Path

    @property
    def checkpoint(self) -> Path:
        """That of a run."""
        return self.folder / "checkpoints" / "step-1"


class Pickled:
    """Runs code where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = str(ran)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.ran,))


# Model directories: each case spoils one and says what the error has to name ----------------------------------


def pickle_alone(place: Place) -> str:
    (place.folder / "model.safetensors").unlink()
    (place.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(place.ran)))
    return "model has no safetensors"


def pickle_named_safetensors(place: Place) -> str:
    (place.folder / "model.safetensors").write_bytes(pickle.dumps(Pickled(place.ran)))
    return "model.safetensors"


def index_with(name: str) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        weights = place.folder / "model.safetensors"
        names = load_file(weights)
        weights.rename(place.folder / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name.format(outside=place.outside))}
        (place.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return "model.safetensors.index.json"

    return case


def link(name: str) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        (place.folder / name).unlink(missing_ok=True)
        (place.folder / name).symlink_to(place.outside / Path(name).name)
        return name

    return case


def header(text: bytes, length: int | None = None, data: bytes = b"") -> Callable[[Place], str]:
    def case(place: Place) -> str:
        start = struct.pack("<Q", len(text) if length is None else length)
        (place.folder / "model.safetensors").write_bytes(start + text + data)
        return "model.safetensors"

    return case


def tensors(entries: dict[str, Any], num_bytes: int) -> Callable[[Place], str]:
    return header(json.dumps(entries).encode(), data=bytes(num_bytes))


def config(change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Callable[[Place], str]:
    def case(place: Place) -> str:
        path = next(p for p in (place.folder / file, place.checkpoint / file) if p.exists())
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document).replace('"OUTSIDE', f'"{place.outside}'))
        if path.parent == place.checkpoint:
            seal(place)
        return file

    return case


def code(file: str, **document: Any) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        (place.folder / "evil.py").write_text(EVIL_CODE.format(ran=str(place.ran)))
        config(lambda found: found.update(document), file)(place)
        return "model"

    return case


def adapter(place: Place) -> str:
    described = {"peft_type": "LORA", "base_model_name_or_path": str(place.outside)}
    (place.folder / "adapter_config.json").write_text(json.dumps(described))
    return "adapter_config.json"


# Checkpoints, sealed again as a stranger can ------------------------------------------------------------------


def seal(place: Place, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    path = place.checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (place.checkpoint / name).is_file():
            content = (place.checkpoint / name).read_bytes()
            manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    del manifest["sha256"]
    hashed = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": hashed}))


def manifest_names(name: str) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        named = name.format(outside=place.outside)
        seal(place, lambda manifest: manifest["files"].update({named: {"size": 9, "sha256": "0"}}))
        return "step-1"

    return case


def shard_with(content: Callable[[Place], bytes]) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        (place.checkpoint / SHARD).write_bytes(content(place))
        seal(place)
        return SHARD

    return case


def shard_is_a_link(place: Place) -> str:
    shutil.copyfile(place.checkpoint / SHARD, place.outside / SHARD)
    (place.checkpoint / SHARD).unlink()
    (place.checkpoint / SHARD).symlink_to(place.outside / SHARD)
    return SHARD


def parts_overlap(place: Place) -> str:
    second = place.checkpoint / "shard-00002-of-00002.safetensors"
    name = "model.base.transformer.wte.weight"
    notes = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [1, 0]}})}
    save_file({name: load_file(place.checkpoint / SHARD)[name][1:].contiguous()}, second, notes)
    seal(place, lambda manifest: manifest["files"].update({second.name: _digest(second)}))
    return name


def a_tail_is_missing(place: Place) -> str:
    name = "model.base.transformer.wte.weight"
    seal(place, lambda manifest: manifest["tensors"][name]["shape"].__setitem__(0, 10**6))
    return name


def folder_is_a_link(place: Place) -> str:
    place.checkpoint.rename(place.outside / "step-1")
    place.checkpoint.symlink_to(place.outside / "step-1")
    return "step-1"


def manifest_of(text: bytes) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        (place.checkpoint / "manifest.json").write_bytes(text)
        return "manifest.json"

    return case


def optimizer(state: Any) -> Callable[[Place], str]:
    def case(place: Place) -> str:
        text = state if isinstance(state, str) else json.dumps(state)
        (place.checkpoint / "optimizer.json").write_text(text)
        seal(place)
        return "optimizer.json"

    return case


def _digest(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


TWO = {"dtype": "F32", "shape": [2]}
HUGE = 100 << 20
MODELS: dict[str, Callable[[Place], str]] = {
    "a pickle instead of safetensors": pickle_alone,
    "a pickle called model.safetensors": pickle_named_safetensors,
    "an index with ../": index_with("../outside/model.safetensors"),
    "an index with an absolute name": index_with("{outside}/model.safetensors"),
    "an index with a name that is not there": index_with("other.safetensors"),
    "weights that are a link": link("model.safetensors"),
    "a config that is a link": link("config.json"),
    "a tokenizer that is a link": link("tokenizer.json"),
    "a header of 100 MB": header(b'{"x":' + b" " * HUGE + b"}"),
    "a header of 100 MB of brackets": header(b"[" * HUGE),
    "a header of 2^63 bytes": header(b"{}", length=1 << 63),
    "tensors that overlap": tensors({"x": TWO | {"data_offsets": [0, 8]}, "y": TWO | {"data_offsets": [4, 12]}}, 12),
    "a tensor past the end": tensors({"x": TWO | {"data_offsets": [4, 12]}}, 8),
    "a shape of 2^124": tensors({"x": {"dtype": "F32", "shape": [1 << 62] * 2, "data_offsets": [0, 8]}}, 8),
    "a config of 1e12 slots": config(lambda c: c["memory"].update(num_sub_keys=10**6, knn=4)),
    "a config of 1e9 layers": config(lambda c: c["text_config"].update(n_layer=10**9, num_hidden_layers=10**9)),
    "a config with NaN": config(lambda c: c["memory"].update(dropout=float("nan"))),
    "a config with infinity": config(lambda c: c["text_config"].update(layer_norm_epsilon=float("inf"))),
    "a config of an unknown model with code": code(
        "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    ),
    "weights that config.json places elsewhere": config(
        lambda c: c.update(transformers_weights="../outside/model.safetensors")
    ),
    "an adapter of a model elsewhere": adapter,
    "a tokenizer that names files elsewhere": config(
        lambda c: c.update(fast_tokenizer_files=["../outside/tokenizer.1.json"]), "tokenizer_config.json"
    ),
}
CHECKPOINTS: dict[str, Callable[[Place], str]] = {
    "a manifest with ../": manifest_names("../../../outside/model.safetensors"),
    "a manifest with an absolute name": manifest_names("{outside}/model.safetensors"),
    "a manifest of 100 MB": manifest_of(b"[" * HUGE),
    "a manifest of 8 MB of lists": manifest_of(b"[" + b"[]," * ((8 << 20) // 3 - 2) + b"[]]"),
    "a manifest of 8 MB of words": manifest_of(b"[" + b'"a",' * ((8 << 20) // 4 - 2) + b'"a"]'),
    "a manifest that is deep": manifest_of(b"[" * 100_000),
    "a shard that is a link": shard_is_a_link,
    "a shard that is a pickle": shard_with(lambda place: pickle.dumps(Pickled(place.ran))),
    "a shard with a header of 100 MB": shard_with(lambda place: struct.pack("<Q", HUGE) + b"[" * HUGE),
    "parts that overlap": parts_overlap,
    "a tensor whose tail is missing": a_tail_is_missing,
    "a checkpoint that is a link": folder_is_a_link,
    "a checkpoint of 1e12 slots": config(lambda c: c["memory"].update(num_sub_keys=10**6, knn=4)),
    "a checkpoint with NaN": config(lambda c: c["memory"].update(dropout=float("nan"))),
    "an optimizer that is deep": optimizer("[" * 100_000),
    "an optimizer of 2^60 numbers": optimizer({"tensor": ["float32", [1 << 60], "00000000"]}),
    "an optimizer that names a function": optimizer({"tensor": ["load", [1], "00000000"]}),
}


def hostile_directories(short: bool) -> Iterator[Outcome]:
    """Each in a process that is watched."""
    command = [sys.executable, "-m", "benchmarks.reliability.hostile"]
    root, quiet = Path(__file__).parents[2], {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    told = [json.loads(line) for line in done.stdout.splitlines()]
    bad = [f"{case['case']}: {case['bad']}" for case in told if case["bad"]]
    yield Outcome(
        9,
        f"{len(told)} hostile model directories and checkpoints loaded",
        f"each refused by the name of the file in {SECONDS:.0f} s and {MEGABYTES:.0f} MB, nothing outside opened, no code run",
        f"{len(told) - len(bad)} refused, in at most {max(case['seconds'] for case in told):.2f} s and "
        f"{max(case['megabytes'] for case in told):.0f} MB" + "".join(f"; {line}" for line in bad[:3]),
        not bad and len(told) == len(MODELS) + len(CHECKPOINTS),
    )


# The program --------------------------------------------------------------------------------------------------


def main() -> None:
    """Makes a good model and a good run, then each case; prints a JSON object about each."""
    with tempfile.TemporaryDirectory() as top:
        good_model, good_run = _good(Path(top))
        for cases, good, use in ((MODELS, good_model, _load), (CHECKPOINTS, good_run, _resume)):
            use(good)  # everything is imported
            for number, (name, spoil) in enumerate(cases.items()):
                home = Path(top) / f"{good.name}-{number}"
                (home / "outside").mkdir(parents=True)
                place = Place(shutil.copytree(good, home / good.name), home / "outside", home / "ran")
                for file in good_model.iterdir():
                    shutil.copyfile(file, place.outside / file.name)
                shutil.copyfile(good_model / "tokenizer.json", place.outside / "tokenizer.1.json")
                named = spoil(place)
                print(json.dumps({"case": name, **_watched(place, use, named)}), flush=True)
                shutil.rmtree(home)


def _good(top: Path) -> tuple[Path, Path]:
    from pkmem import MemoryConfig
    from pkmem.lm.build import build_model
    from pkmem.lm.config import ModelConfig
    from pkmem.text import train_tokenizer
    from pkmem.training.checkpoint import save_checkpoint
    from pkmem.training.export import save_description
    from pkmem.training.named_state import model_tensors
    from pkmem.training.shards import plan_shard
    from pkmem.training.state import save_state
    from pkmem.training.together import Together

    tokenizer = train_tokenizer(["the cat sat on a mat and saw two dogs run far away"] * 50, 280)
    decoder = ModelConfig(num_layers=2, width=32, num_heads=2, context_tokens=32, vocab_size=280, memory_layers=[1])
    memory = MemoryConfig(num_sub_keys=8, heads=2, knn=4, query_dim=8)
    model = build_model(decoder, memory, len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(top / "model")
    tokenizer.save_pretrained(top / "model")

    def write(folder: Path) -> None:
        save_description(folder, model, tokenizer)
        save_state(folder / "optimizer.json", {"groups": [], "state": {}})

    named = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    save_checkpoint(top / "run", 1, write, plan_shard(named, Together()))
    return top / "model", top / "run"


def _load(folder: Path) -> None:
    from pkmem.training.saved import load_saved

    load_saved(folder)


def _resume(folder: Path) -> None:
    """What `pkmem train --resume`, `export` and `eval` do with a run."""
    from pkmem.training.checkpoint import newest_valid_checkpoint
    from pkmem.training.state import load_state

    newest = newest_valid_checkpoint(folder, print)
    assert newest is not None
    load_state(newest / "optimizer.json")
    _load(folder)


def _watched(place: Place, use: Callable[[Path], None], named: str) -> dict[str, Any]:
    """Loads a directory in a forked process; returns how that went."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = _judged(place, use, named)
        except BaseException:
            told = {"bad": traceback.format_exc()[-400:], "seconds": 0.0, "megabytes": 0.0}
        os.write(write_end, json.dumps(told).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = json.loads(pipe.read() or b'{"bad": "it died", "seconds": 0, "megabytes": 0}')
    os.waitpid(child, 0)
    return dict(told)


def _judged(place: Place, use: Callable[[Path], None], named: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    for file in place.outside.rglob("*"):
        os.utime(file, (1, time.time()), follow_symlinks=False)  # read, it is younger
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.append(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(watch)
    start, before, said = time.perf_counter(), _memory("VmRSS"), None
    try:
        use(place.folder)
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    megabytes = max(0.0, _memory("VmHWM") - before)
    outside = os.path.realpath(place.outside)
    read = [file.name for file in place.outside.rglob("*") if file.is_file() and file.stat().st_atime > 1]
    wrong = {
        "was loaded": said is None,
        f"named no {named} but said {said}": said is not None and named not in said,
        "ran code": place.ran.exists(),
        f"opened {opened}": any(name.startswith(outside) for name in opened) or bool(read),
        f"took {seconds:.1f} s": seconds > SECONDS,
        f"took {megabytes:.0f} MB": megabytes > MEGABYTES,
    }
    return {
        "bad": "; ".join(what for what, is_wrong in wrong.items() if is_wrong),
        "seconds": seconds,
        "megabytes": megabytes,
    }


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


if __name__ == "__main__":
    main()
