"""A floor of pyproject.toml is a version that was run, and what is run every day is admitted."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]
NEEDED = [Requirement(line) for line in (*PROJECT["dependencies"], *OPTIONAL["cpu"], *OPTIONAL["lm"], *OPTIONAL["hub"])]
NEEDED = [requirement for requirement in NEEDED if requirement.name != "pkmem"]


def pins(file: str) -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in lines}


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_the_floor_is_what_make_test_oldest_runs(requirement: Requirement) -> None:
    (floor,) = (part.version for part in requirement.specifier if part.operator == ">=")
    assert Requirement(f"x=={floor}").specifier.contains(
        pins("constraints-oldest.txt")[canonicalize_name(requirement.name)]
    )


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_every_pin_is_admitted(requirement: Requirement, file: str) -> None:
    assert requirement.specifier.contains(pins(file)[canonicalize_name(requirement.name)])
