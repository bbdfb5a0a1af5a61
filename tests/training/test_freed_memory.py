"""Memory that steps free waits for the next one, unless the user has told malloc otherwise."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
{prepare}

def step():
    parts = [torch.ones(1 << 18) for _ in range(64)]  # 64 MiB, as activations come and go
    return sum(parts)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from pkmem.training.freed_memory import keep_freed_memory; keep_freed_memory()"
SMALL = "MALLOC_TRIM_THRESHOLD_", "131072"  # glibc's own start
PAGES_OF_A_STEP = (64 << 20) // 4096


def faults(prepare: str, *told: tuple[str, str]) -> int:
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS.format(prepare=prepare)]
    finished = subprocess.run(command, env=environ | dict(told), capture_output=True, text=True, check=True)
    return int(finished.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_a_step_finds_the_memory_of_the_last_one() -> None:
    assert faults(KEEP) < PAGES_OF_A_STEP / 2 < faults("")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
@pytest.mark.parametrize("told", [SMALL, ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")])
def test_what_the_user_told_malloc_stays(told: tuple[str, str]) -> None:
    assert faults(KEEP, told) > PAGES_OF_A_STEP / 2


def test_the_command_line_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from pkmem import cli

    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append("kept"))
    with pytest.raises(SystemExit):
        cli.main(["eval", "no-such-model"])
    assert calls == ["kept"]


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from pkmem.training.freed_memory import keep_freed_memory

    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    keep_freed_memory()
