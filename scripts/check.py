#!/usr/bin/env python3
"""Check the repository in about a minute: formatter, linter, types, prose, fast tests.

Every check runs, also after a failure. The exit code is 1 if any of them failed. `.ci/run` runs
these checks and all tests.
"""

import subprocess
import sys
import time
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).parent.parent
# Tests of pure packages and of the source itself: no server, no Redis, no browser.
FAST_TESTS = (
    "tests/model",
    "tests/wire",
    "tests/rules",
    "tests/test_imports.py",
    "tests/test_settings.py",
    "tests/test_prose_rules.py",
    "tests/client/test_estimate.py",
    "tests/client/test_view.py",
    "tests/ops/test_verdict.py",
    "tests/rooms/test_timer_wheel.py",
    "tests/redis_link/test_slots.py",
)


class Check(Struct, frozen=True):
    """One check.

    Attributes:
        name: name in the report.
        arguments: arguments of the Python interpreter.
    """

    name: str
    arguments: tuple[str, ...]


CHECKS = (
    Check("format", ("-m", "ruff", "format", "--check", ".")),
    Check("lint", ("-m", "ruff", "check", ".")),
    Check(
        "types",
        (
            "-m",
            "mypy",
        ),
    ),
    Check("prose", ("-m", "pytest", "-q", "tests/test_prose.py")),
    Check("fast tests", ("-m", "pytest", "-q", *FAST_TESTS)),
)


def run(check: Check) -> bool:
    """Run a check, print one line, and its output if it failed; return whether it passed."""
    started = time.perf_counter()
    result = subprocess.run(  # noqa: S603  # the commands above
        [sys.executable, *check.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    passed = result.returncode == 0
    duration_s = time.perf_counter() - started
    print(f"{check.name:12}{'ok' if passed else 'FAILED':8}{duration_s:5.1f} s", flush=True)
    if not passed:
        print(result.stdout, flush=True)
    return passed


def main(checks: tuple[Check, ...] = CHECKS) -> int:
    """Run all checks; return the exit code."""
    failed = [check.name for check in checks if not run(check)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
