"""`python -m scripts.check`: one line for each check, and a failure does not stop the next one."""

import re

import pytest

from scripts.check import CHECKS, FAST_TESTS, ROOT, Check, main

PASS = Check("good", ("-c", "print('not shown')"))
FAIL = Check("bad", ("-c", "print('the reason'); raise SystemExit(3)"))


def test_failure_does_not_stop_the_next_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main((FAIL, PASS)) == 1
    first, reason, _, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"bad +FAILED +\d+\.\d s", first)
    assert reason == "the reason"
    assert re.fullmatch(r"good +ok +\d+\.\d s", last)


def test_exit_code_is_0_when_all_checks_pass() -> None:
    assert main((PASS, PASS)) == 0


def test_checks_are_formatter_linter_types_prose_and_fast_tests() -> None:
    assert [check.name for check in CHECKS] == ["format", "lint", "types", "prose", "fast tests"]
    assert all((ROOT / path).exists() for path in FAST_TESTS)
