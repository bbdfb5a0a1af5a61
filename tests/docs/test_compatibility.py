"""The page of compatibility says what the tests prove, and nothing else."""

import re
from collections import Counter

import pytest

import compatibility

CASES = compatibility.cases()


def test_the_page_is_what_the_tests_say() -> None:
    written = compatibility.PAGE.read_text(encoding="utf-8")
    assert written == compatibility.page(), "run: python docs/compatibility.py"


def test_there_are_many_cases_and_none_twice() -> None:
    assert len(CASES) >= 40
    assert [tried for tried, count in Counter((case.kind, case.tried) for case in CASES).items() if count > 1] == []
    assert sum(bool(case.source) for case in CASES) >= 15
    assert {case.kind for case in CASES} == set(compatibility.KINDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}::{case.test}")
def test_a_case_says_what_happens(case: compatibility.Case) -> None:
    assert case.test.startswith("test_")
    assert re.match(r"(works|refused|not supported)(: |$)", case.outcome), case.outcome
    assert case.outcome == "works" or ": " in case.outcome
    assert case.source == "" or case.source.startswith("https://")


def test_marks_and_their_arguments_are_found(tmp_path) -> None:
    file = compatibility.ROOT / "tests" / "docs" / "test_compatibility.py"
    assert list(compatibility._cases_of(file)) == []
    made = tmp_path / "test_made.py"
    made.write_text('KIND = "K"\n@pytest.mark.case(KIND, "a " "b", "works", "")\ndef test_it():\n    pass\n')
    compatibility_root, compatibility.ROOT = compatibility.ROOT, tmp_path
    try:
        assert list(compatibility._cases_of(made)) == [("K", "a b", "works", "", "test_made.py", "test_it")]
    finally:
        compatibility.ROOT = compatibility_root
