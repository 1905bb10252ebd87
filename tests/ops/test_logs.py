"""Logs: structured, and never blocking."""

import io
import json
import os
import threading

from bandsync.ops.logs import Sink, make_logger
from bandsync.settings import Settings


def logged(settings: Settings) -> str:
    """The text of some events."""
    out = io.StringIO()
    sink = Sink(out)
    log = make_logger(settings, sink)
    log.debug("below.the.level")
    log.info("member.joined", session_id="söng", role="leader")
    try:
        raise RuntimeError("a bug")
    except RuntimeError:
        log.exception("command.failed", error_id="e1")
    sink.close()
    return out.getvalue()


def test_json_format_is_an_object_per_line() -> None:
    joined, failed = map(json.loads, logged(Settings(log_format="json")).splitlines())
    assert joined.pop("timestamp").endswith("Z")
    assert joined == {
        "event": "member.joined",
        "level": "info",
        "session_id": "söng",
        "role": "leader",
    }
    assert failed["exception"][0]["exc_value"] == "a bug"


def test_console_format_shows_fields_and_traceback() -> None:
    text = logged(Settings())
    assert "member.joined" in text
    assert "session_id=söng" in text
    assert "RuntimeError: a bug" in text
    assert "\x1b" not in text or os.isatty(2)


def test_sink_drops_and_counts_lines_that_cannot_be_written() -> None:
    class Broken(io.StringIO):
        """A pipe whose reader is gone."""

        def flush(self) -> None:
            raise BrokenPipeError

    sink = Sink(Broken())
    sink.write("lost\n")
    sink.write("lost too\n")
    sink.close()
    assert sink.dropped == 2


def test_sink_never_blocks_when_its_output_hangs() -> None:
    class Unread(io.StringIO):
        """The first write hangs until the gate opens."""

        gate = threading.Event()

        def write(self, text: str) -> int:
            self.gate.wait()
            return super().write(text)

    out = Unread()
    sink = Sink(out)
    for number in range(20_000):
        sink.write(f"{number}\n")
    assert sink.dropped >= 9_999
    sink.close(timeout_s=0.01)
    out.gate.set()
