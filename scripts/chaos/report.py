"""The report of a run with one server: the table, violations, and missed latency targets."""

import sys
from pathlib import Path

from scripts.chaos.judge import FaultRow, RunResult

_LOG_LINES = 40

# The targets of ``--strict``.
_STALL_MS = 50.0
_SILENCE_MS = 1000.0 + 100.0
_POSITION_MS = 1.0


def print_report(seed: int, verdict: RunResult, log: Path, *, strict: bool) -> bool:
    """Print the report, with the end of the server's log after a failure.

    Args:
        seed: of the run.
        result: of the judge.
        log: path of the server's log.
        strict: a missed latency target is a failure, too.

    Returns:
        Whether the run was good.
    """
    missed = [text for row in verdict.rows for text in missed_targets(row, verdict.quiet_stall_ms)]
    good = not verdict.violations and not (strict and missed)
    print(f"\nseed {seed}: longest stall without a fault {verdict.quiet_stall_ms:.1f} ms")
    print(table(verdict))
    for violation in verdict.violations:
        print(f"LOST ({violation.kind}) {violation.text}")
    for text in missed:
        print(f"SLOW {text}")
    if not good:
        print("The log of the server ends with (--keep-logs keeps it):")
        print("\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]))
    sys.stdout.flush()
    return good


def missed_targets(row: FaultRow, quiet_stall_ms: float) -> list[str]:
    """The latency targets that this row misses, as sentences."""
    missed = []
    allowed = {"end": quiet_stall_ms + _STALL_MS, "silence": _SILENCE_MS}.get(row.kind)
    if allowed is not None and row.stall_ms > allowed:
        missed.append(f"{row.fault}: a command waited {row.stall_ms:.0f} ms, over {allowed:.0f}")
    if row.position_error_ms > _POSITION_MS:
        missed.append(f"{row.fault}: the music jumped by {row.position_error_ms:.1f} ms")
    return missed


_COLUMNS = (
    ("detected", "ms"),
    ("stall", "ms"),
    ("recovered", "ms"),
    ("acks", "lost"),
    ("connections", "lost"),
    ("position", "error ms"),
    ("versions", "out of order"),
    ("other", "findings"),
)


def table(verdict: RunResult) -> str:
    """The table, as text."""
    lines = [
        " ".join([f"{'':26}", *(f"{name:>12}" for name, _ in _COLUMNS)]),
        " ".join([f"{'fault':26}", *(f"{unit:>12}" for _, unit in _COLUMNS)]),
    ]
    for row in verdict.rows:
        found = row.found
        cells = [
            _cell(row.detection_ms),
            _cell(row.stall_ms),
            _cell(row.recovery_ms),
            str(found.get("ack", 0)),
            str(found.get("connection", 0)),
            f"{row.position_error_ms:.3f}",
            str(found.get("version", 0)),
            str(found.get("refusal", 0) + found.get("state", 0)),
        ]
        lines.append(" ".join([f"{row.fault:26}", *(f"{cell:>12}" for cell in cells)]))
    return "\n".join(lines)


def _cell(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f}"
