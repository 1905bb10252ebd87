"""`scripts/top.py` as a program, and its view of answers."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from scripts.testbed.redis_server import RedisServer, free_port
from scripts.testbed.server_process import ServerProcess
from scripts.top_view import WIDTH, Watched, duration, number, screen, sparkline

SCRIPTS = Path(__file__).parents[2] / "scripts"
PATIENCE_S = 30.0


Start = Callable[..., ServerProcess]


def environment(**variables: str) -> dict[str, str]:
    plain = {name: text for name, text in os.environ.items() if name != "ADMIN_TOKEN"}
    return plain | variables


def top(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `top.py --once`."""
    return subprocess.run(
        [sys.executable, SCRIPTS / "top.py", "--once", *arguments],
        env=environment(COLUMNS="100", **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def answer_of(server: ServerProcess, samples: int = 0) -> Any:
    """The answer of ``/api/ops``, once it has at least so many samples."""
    deadline = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < deadline:
        answer = httpx.get(f"{server.url}/api/ops").json()
        if len(answer["samples"]) >= samples:
            return answer
        time.sleep(0.05)
    raise AssertionError("no samples")


def shown(*servers: Watched, width: int = 80) -> list[str]:
    console = Console(width=width, file=StringIO())
    console.print(screen(servers))
    return console.file.getvalue().splitlines()


def test_once_exits_with_0_when_all_is_well(start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    answer_of(server, samples=1)
    done = top(server.url)
    assert done.returncode == 0, done.stderr
    for text in ("stage-left", "All is well.", "memory", "deliveries/s", "clock error"):
        assert text in done.stdout
    # The scheme may be left out.
    assert top(server.url.removeprefix("http://")).returncode == 0


def test_once_exits_with_1_when_redis_is_lost(
    start_process: Start, redis_server: RedisServer
) -> None:
    server = start_process(
        REDIS_ENABLED="true", REDIS_URL=redis_server.url(), REDIS_HEALTH_INTERVAL_MS="100"
    )
    redis_server.kill()
    deadline = time.perf_counter() + PATIENCE_S
    while answer_of(server)["storage"]["mode"] != "memory" and time.perf_counter() < deadline:
        time.sleep(0.05)
    done = top(server.url)
    assert done.returncode == 1, done.stderr
    assert "Redis is lost" in done.stdout
    assert "Redis lost" in done.stdout


def test_once_exits_with_2_when_a_server_does_not_answer(start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    done = top(server.url, f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert "stage-left" in done.stdout
    assert "does not answer" in done.stdout
    assert done.stderr == ""


def test_token_comes_from_flag_environment_or_address(start_process: Start) -> None:
    server = start_process(ADMIN_TOKEN="höchst geheim")
    refused = top(server.url)
    assert refused.returncode == 2
    assert "ADMIN_TOKEN" in refused.stdout
    assert top(server.url, "--token", "höchst geheim").returncode == 0
    assert top(server.url, ADMIN_TOKEN="höchst geheim").returncode == 0
    own = server.url.replace("//", "//ops:h%C3%B6chst%20geheim@")
    done = top(own)
    assert done.returncode == 0
    assert "geheim" not in done.stdout


def test_malformed_address_is_refused(start_process: Start) -> None:
    server = start_process()
    assert top(f"{server.url}/elsewhere").returncode == 0  # Only the origin counts.
    for address in ("ftp://x", "http://", "http://x:port"):
        done = top(address)
        assert done.returncode == 2
        assert "is not an address such as" in done.stderr


@contextmanager
def terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], None]]]:
    """Run `top.py` in a terminal; return it, and a function that waits until a text is shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "top.py", *arguments],
        env=environment(COLUMNS="100", LINES="40", TERM="xterm-256color"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)

    def shows(text: str) -> None:
        seen = ""
        deadline = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += re.sub(
                    r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(ours, 65_536).decode(errors="replace")
                )
                if text in seen:
                    return
        raise AssertionError(f"never showed {text!r}:\n{seen[-4000:]}")

    try:
        yield process, shows
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_screen_outlives_a_server_and_ends_at_sigint(start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    with terminal(server.url) as (process, shows):
        shows("All is well.")
        server.kill()
        shows("does not answer")
        server.start()
        shows("All is well.")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_samples_continue_over_a_restart(start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left")
    watched = Watched(server.url)
    watched.update(answer_of(server, samples=2))
    known = list(watched.samples)
    assert watched.since == known[-1]["at"]
    # Without `since` the answer repeats samples: none is stored twice.
    watched.update(answer_of(server))
    assert watched.samples[: len(known)] == known
    moments = [each["at"] for each in watched.samples]
    assert moments == sorted(set(moments))
    watched.fail("gone")
    assert not watched.well
    server.restart()
    watched.update(answer_of(server, samples=1))
    assert watched.samples[: len(known)] == known
    assert len(watched.samples) > len(known)
    moments = [each["at"] for each in watched.samples]
    assert moments == sorted(set(moments))


def test_view_behind_a_load_balancer_stays_with_its_server(start_process: Start) -> None:
    left, right = start_process(SERVER_ID="left"), start_process(SERVER_ID="right")
    watched = Watched(left.url)
    watched.update(answer_of(left, samples=1))
    watched.update(answer_of(right, samples=1))
    assert not watched.well
    assert watched.latest is not None
    assert watched.latest["serverId"] == "left"
    watched.update(answer_of(left))
    assert watched.well
    # The other server has replaced it for good.
    for _ in range(10):
        watched.update(answer_of(right))
    assert watched.well
    assert watched.latest["serverId"] == "right"


def test_unknown_values_of_a_newer_server_are_shown_as_a_warning(start_process: Start) -> None:
    server = start_process()
    watched = Watched(server.url)
    answer = answer_of(server, samples=1)
    others = [{"code": "new", "level": "odd", "text": "Odd.", "meaning": "Very.", "since": None}]
    answer["verdict"] |= {"level": "grave", "text": "Something new.", "others": others}
    answer["events"].append(answer["events"][0] | {"kind": "promotion"})
    answer["samples"][-1]["mode"] = "elsewhere"
    watched.update(answer)
    text = "\n".join(shown(watched))
    assert "! Something new." in text
    assert "Odd. Very." in text
    assert not watched.well


def test_lines_fit_the_width_of_the_terminal(start_process: Start) -> None:
    server = start_process(SERVER_ID="stage-left-of-a-very-large-hall-with-a-name")
    watched, silent = Watched(server.url), Watched("http://127.0.0.1:1")
    watched.update(answer_of(server, samples=1))
    silent.fail("connection refused")
    for width in (60, 80, 120):
        assert max(len(line) for line in shown(watched, width=width)) <= width
        lines = shown(watched, silent, width=width)
        assert max(len(line) for line in lines) <= width
        assert any("no answer" in line for line in lines)
    # The whole screen fits 24 lines.
    assert len(shown(watched)) <= 24


def test_sparkline_is_scaled_to_its_highest_value() -> None:
    assert sparkline([]) == " " * WIDTH
    assert sparkline([0, 0]).strip() == "▁▁"
    assert sparkline([0, 4, None, 8]).endswith("▁▅ █")
    assert len(sparkline([1.0] * WIDTH)) == WIDTH


def test_numbers_and_durations_are_short() -> None:
    assert [number(each) for each in (None, 0, 7, 0.25, 12.34, 1234.5)] == [
        "-",
        "0",
        "7",
        "0.25",
        "12.3",
        "1,234",
    ]
    durations = {
        12: "12 ms",
        4_200: "4.2 s",
        9_990: "10 s",
        61_000: "1 min 1 s",
        3_600_000: "1 h",
        90_061_000: "1 d 1 h",
        86_400_000 + 61_000: "1 d",
    }
    assert {ms: duration(ms) for ms in durations} == durations
