"""The judge of `scripts/chaos.py` sees what is lost; and a short run of the whole."""

import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import trio

from bandsync import client
from bandsync.client.membership import Membership
from scripts.chaos.judge import (
    Asked,
    ClockSample,
    Final,
    Record,
    Verdict,
    Window,
    essence,
    judge,
)
from scripts.chaos.player import Player, close_code
from scripts.chaos.report import table, too_much
from tests.support.servers import Server, musician

SCRIPTS = Path(__file__).parents[2] / "scripts"
PATIENCE_S = 120


LINE = {
    "isPlaying": True,
    "positionMs": 1000.0,
    "anchorTime": 50_000.0,
    "tempoBpm": 120.0,
    "beat": 2.0,
    "beatsPerBar": 4,
    "next": None,
}
MEMBER = {"memberId": "ann", "displayName": "Ann", "role": "leader", "connected": True}


def chat(text: str, sent_at: float = 60_000.0, message_id: str | None = None) -> dict[str, Any]:
    return {"messageId": message_id or text, "text": text, "sentAt": sent_at}


def snapshot(version: int, **changes: object) -> dict[str, Any]:
    return {
        "type": "snapshot",
        "epoch": "e",
        "version": version,
        "serverTime": 50_000.0 + version,
        "message": "",
        "transport": LINE,
        "leaderId": "ann",
        "members": [MEMBER],
        "chat": [],
    } | changes


def acked(type_: str, version: int | None, at: float, **fields: object) -> Asked:
    answer = {"type": "ack"} | ({} if version is None else {"version": version})
    return Asked(type_, fields, at, at + 0.002, answer)


class History:
    """A run in which nothing went wrong, to be spoilt: a fault at 10 s, seen and over by 11 s."""

    def __init__(self) -> None:
        faster = LINE | {"anchorTime": 51_000.0, "positionMs": 2000.0, "tempoBpm": 140.0}
        self.chat = chat("hello")
        self.record = Record(
            "song",
            "ann",
            heard=[
                (0.0, snapshot(1)),
                (1.0, {"type": "tempo_changed", "version": 2, "transport": faster}),
                (2.0, {"type": "scroll_tick", "serverTime": 52_000.0, "positionMs": 3000.0}),
                (3.0, {"type": "message_updated", "version": 3, "message": "verse"}),
                (10.1, {"type": "chat_message", "version": 4, **self.chat}),
                (10.5, snapshot(6, transport=faster)),
                (12.0, {"type": "member_connection", "version": 7}),
            ],
            asked=[
                acked("set_tempo", 2, 1.0, tempoBpm=140),
                acked("update_message", 3, 3.0, message="verse"),
                acked("chat_message", 4, 10.1, text="hello"),
                acked("sync_request", None, 12.0),
            ],
            clock=[ClockSample(0.0, 50_000.0, 2.0), ClockSample(12.0, 50_001.5, 2.0)],
        )
        end = snapshot(7, message="verse", transport=faster, chat=[self.chat])
        self.final = Final("song", {"late": end, "ann": deepcopy(end)}, None, {"ann"})

    def judge(self) -> Verdict:
        windows = [
            Window("none", "none", 0.0, quiet_from=0.0),
            Window("reset", "end", 10.0, 10.004, 10.5, 11.0, quiet_from=11.0),
        ]
        return judge([self.record], windows, [self.final])

    def found(self) -> list[tuple[str, str]]:
        """The kinds of what was found, and the number of the row that shows it."""
        verdict = self.judge()
        for row in verdict.rows:
            assert row.fault in table(verdict)
        return sorted(
            (row.fault, kind)
            for row in verdict.rows
            for kind, number in row.found.items()
            for _ in range(number)
        )


@pytest.fixture
def history() -> History:
    return History()


def test_nothing_is_found_where_nothing_was_lost(history: History) -> None:
    verdict = history.judge()
    assert verdict.findings == []
    none, reset = verdict.rows
    assert none.detection_ms is none.recovery_ms is None
    assert reset.detection_ms == pytest.approx(4)
    assert reset.recovery_ms == pytest.approx(500)
    assert reset.stall_ms == pytest.approx(2)
    assert verdict.quiet_stall_ms == pytest.approx(2)
    assert reset.position_error_ms == 0
    assert too_much(reset, verdict.quiet_stall_ms) == []


def test_a_command_without_an_answer(history: History) -> None:
    history.record.asked.append(Asked("chat_message", {"text": "lost"}, 10.2))
    assert history.found() == [("reset", "ack")]


def test_a_refused_command(history: History) -> None:
    error = {"type": "error", "code": "internal", "message": "a bug"}
    history.record.asked.append(Asked("chat_message", {"text": "x"}, 10.2, 10.3, error))
    assert history.found() == [("reset", "refusal")]


def test_a_chat_message_that_is_gone(history: History) -> None:
    for state in history.final.snapshots.values():
        state["chat"].clear()
    assert history.found() == [("reset", "ack")]


@pytest.mark.parametrize(("later", "found"), [(50, []), (49, [("reset", "ack")])])
def test_fifty_later_messages_push_one_out(
    history: History, later: int, found: list[tuple[str, str]]
) -> None:
    older = [] if later == 50 else [chat("older", 59_000.0)]
    ring = [*older, *(chat(f"later {n}", 60_001.0 + n) for n in range(later))]
    for state in history.final.snapshots.values():
        state["chat"] = ring
    assert history.found() == found


@pytest.mark.parametrize(
    ("part", "value"),
    [("message", "older"), ("transport", LINE), ("leaderId", "bob")],
)
def test_a_last_write_that_is_gone(history: History, part: str, value: object) -> None:
    history.record.asked.append(acked("set_role", 6, 10.2, memberId="ann"))
    for state in history.final.snapshots.values():
        state[part] = value
    fault = {"message": "none", "transport": "none", "leaderId": "reset"}[part]
    assert history.found() == [(fault, "ack")]


def test_an_unanswered_last_write_may_have_been_carried_out_or_not(history: History) -> None:
    history.record.asked.append(Asked("update_message", {"message": "chorus"}, 10.2))
    for message in ("verse", "chorus"):
        for state in history.final.snapshots.values():
            state["message"] = message
        # Lost it is all the same.
        assert history.found() == [("reset", "ack")]


def test_an_acknowledged_version_that_nobody_heard_of(history: History) -> None:
    history.record.asked.append(acked("seek", 9, 12.5, positionMs=0))
    assert ("reset", "ack") in history.found()


@pytest.mark.parametrize("version", [6, 8, 9])
def test_a_version_out_of_order(history: History, version: int) -> None:
    history.record.heard[-1][1]["version"] = version
    assert history.found() == [("reset", "version")]


def test_a_snapshot_that_goes_back(history: History) -> None:
    history.record.heard[-2][1]["version"] = 3
    assert ("reset", "version") in history.found()
    history.record.heard[-2][1]["epoch"] = "another"
    history.record.heard[-1][1]["version"] = 4
    assert history.found() == []


def test_a_lost_connection(history: History) -> None:
    history.record.closed = (10.3, 1011)
    assert history.found() == [("reset", "connection")]


def test_a_client_that_knows_something_else(history: History) -> None:
    history.record.wrong = [(10.2, "known / shown at version 4: message: a / b")]
    assert history.found() == [("reset", "state")]


@pytest.mark.parametrize("frozen", [False, True])
async def test_our_client_s_view_must_keep_up(
    server: Server, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    player = Player(nursery, server.port, "song", "ann", foreign=False)
    await player.join()
    if frozen:
        monkeypatch.setattr(Membership, "hear", lambda self, message: False)
    async with musician(server) as bob:
        await bob.join()
        await player.until(
            lambda: any(m["type"] == "user_joined" for _, m in player.records[0].heard)
        )
        await player.fresh_snapshot()
    assert [text for _, text in player.records[0].wrong] == (
        ["known is version 1, shown is 2"] if frozen else []
    )
    await player.disconnect()


async def test_our_client_s_place_that_is_taken_is_a_lost_connection(
    server: Server, nursery: trio.Nursery
) -> None:
    player = Player(nursery, server.port, "song", "ann", foreign=False)
    await player.join()
    async with musician(server) as thief:
        await thief.join(resumeToken=player.snapshot["you"]["resumeToken"])
        await player.ended()
    closed = player.records[0].closed
    assert closed is not None
    assert closed[1] == 4001


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (client.Superseded(), 4001),
        (client.JoinRefused("policy", "Go."), 1008),
        (client.JoinRefused("unauthorized", "No."), 1006),
        (client.Unreachable("gone", 1012), 1012),
    ],
)
def test_the_code_that_ended_our_client(ended: client.Ended, code: int) -> None:
    assert close_code(ended) == code


def test_a_jump_of_the_position_in_a_snapshot(history: History) -> None:
    message = history.record.heard[-2][1]
    message["transport"] = message["transport"] | {"positionMs": 2005.0}
    _, reset = history.judge().rows
    assert reset.position_error_ms == pytest.approx(5)
    assert too_much(reset, 0.0) == ["reset: the music jumped by 5.0 ms"]


def test_a_jump_of_the_position_in_a_tick(history: History) -> None:
    tick = {"type": "scroll_tick", "serverTime": 60_000.0, "positionMs": 11_003.0}
    history.record.heard.insert(-2, (10.4, tick))
    assert history.judge().rows[1].position_error_ms == pytest.approx(3)


def test_a_scheduled_change_is_no_jump(history: History) -> None:
    landing = LINE | {"anchorTime": 61_000.0, "positionMs": 0.0}
    scheduled = LINE | {"anchorTime": 60_000.0, "positionMs": 9000.0, "next": landing}
    history.record.heard[5:5] = [
        (10.2, {"type": "seek", "version": 5, "transport": scheduled}),
        (10.3, {"type": "scroll_tick", "serverTime": 60_500.0, "positionMs": 9500.0}),
        (10.4, {"type": "scroll_tick", "serverTime": 61_500.0, "positionMs": 500.0}),
    ]
    history.record.heard[8][1]["transport"] = scheduled
    assert history.judge().rows[1].position_error_ms == 0


def test_a_step_of_the_clock_is_a_jump(history: History) -> None:
    history.record.clock.append(ClockSample(12.5, 50_010.0, 2.0))
    assert history.judge().rows[1].position_error_ms == pytest.approx(8)


def test_states_that_differ(history: History) -> None:
    history.final.snapshots["ann"]["message"] = "chorus"
    assert history.found() == [("reset", "state")]
    verdict = history.judge()
    assert "late has verse, ann has chorus" in verdict.findings[0].text


def test_a_state_in_redis_that_differs(history: History) -> None:
    history.final.stored = {"version": 6, "members": [MEMBER], "chat": [history.chat]}
    assert "Redis has 6" in history.judge().findings[0].text


def test_a_member_who_should_not_be_there(history: History) -> None:
    history.final.members = {"bob"}
    assert history.found() == [("reset", "state")]


def test_a_stall_counts_where_it_ends(history: History) -> None:
    history.record.asked.append(
        Asked("chat_message", {"text": "hello"}, 9.9, 10.1, {"type": "ack"})
    )
    verdict = history.judge()
    assert verdict.rows[1].stall_ms == pytest.approx(200)
    assert verdict.rows[0].stall_ms == pytest.approx(2)
    assert verdict.quiet_stall_ms == pytest.approx(2)
    assert too_much(verdict.rows[1], verdict.quiet_stall_ms) == [
        "reset: a command waited 200 ms, over 52"
    ]


def test_a_command_sent_before_all_was_quiet_again_is_no_quiet_stall(history: History) -> None:
    late = Asked("chat_message", {"text": "hello"}, 10.9, 11.1, {"type": "ack"})
    history.record.asked.append(late)
    assert history.judge().quiet_stall_ms == pytest.approx(2)


def test_what_counts_of_a_snapshot_leaves_times_out() -> None:
    assert essence(snapshot(1)) == essence(snapshot(1, serverTime=0.0, position=3.0))


def run_chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if "COV" not in name}
    return subprocess.run(
        [sys.executable, "-m", "scripts.chaos", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_a_dry_run(tmp_path: Path) -> None:
    result = run_chaos("--memory", "--bands", "1", "--keep-logs", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("Nothing was lost.\n")
    assert "server.started" in (tmp_path / "server-1.log").read_text()


def test_a_short_run(tmp_path: Path, redis_binary: None) -> None:
    result = run_chaos("--bands", "1", "--members", "3", "--faults", "reset,flush")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    faults = [line[:26].strip() for line in result.stdout.splitlines()[4:9]]
    assert [fault.removesuffix(" (brief)") for fault in faults] == [
        *("none", "reset", "FLUSHALL", "server: SIGTERM", "server: SIGKILL")
    ]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, redis_binary: None) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.chaos", "--faults", "none", "--keep-logs", tmp_path],
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    log = tmp_path / "server-1.log"
    deadline = time.perf_counter() + PATIENCE_S
    while not log.exists() or b"member.joined" not in log.read_bytes():
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    (pid,) = (int(path.name) for path in Path("/proc").iterdir() if serves(path, process.pid))
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 130
    assert not Path(f"/proc/{pid}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["server-1.log"]


def serves(process: Path, parent: int) -> bool:
    """Whether this entry of /proc is a BandSync server that ``parent`` started."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return fields[1] == str(parent) and b"serve.py" in (process / "cmdline").read_bytes()
    except OSError:
        return False
