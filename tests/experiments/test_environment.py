"""Where figures were measured: facts about this machine, and a commit only for a source tree."""

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import pkmem.experiments.environment as module
from pkmem.experiments.environment import environment


def test_names_machine_versions_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/pkmem", "demo", "--out", "x"])
    facts = environment()
    assert facts == json.loads(json.dumps(facts))
    assert facts["command"] == "pkmem demo --out x"
    assert facts["cores"] == os.cpu_count()
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["python"] == platform.python_version()
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # a wheel may not name its CUDA
    assert facts["versions"]["pkmem"]
    assert facts["processor"]
    assert facts["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert facts["system"]


def test_a_package_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    assert environment()["versions"].keys() == {"pkmem", "torch"}


def test_processor_without_proc_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert environment()["processor"] == (platform.processor() or platform.machine())


def test_the_commit_is_that_of_the_tracked_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *names, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "environment.py"
    source.write_text("one")
    monkeypatch.setattr(module, "__file__", str(source))
    assert environment()["commit"] is None  # no repository
    git("init")
    git("commit", "--allow-empty", "-m", "empty")
    assert environment()["commit"] is None  # somebody else's repository: a wheel in a project's .venv
    git("add", "environment.py")
    git("commit", "-m", "source")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert environment()["commit"] == commit
    source.write_text("two")
    assert environment()["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment()["commit"] is None  # no git
