"""The judge of `python -m scripts.chaos` finds each violation; and short whole runs."""

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
from scripts.chaos.judge import FaultWindow, FinalState, RunResult, judge
from scripts.chaos.player import Player, close_code
from scripts.chaos.records import ClockSample, CommandRecord, ConnectionRecord, agreed_state
from scripts.chaos.report import missed_targets, table
from tests.support.servers import Server, musician

ROOT = Path(__file__).parents[2]
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


def acked(type_: str, version: int | None, at: float, **fields: object) -> CommandRecord:
    answer = {"type": "ack"} | ({} if version is None else {"version": version})
    return CommandRecord(type_, fields, at, at + 0.002, answer)


class CleanRun:
    """A run without a violation, for tests to break: one fault at 10 s, recovered by 11 s."""

    def __init__(self) -> None:
        faster = LINE | {"anchorTime": 51_000.0, "positionMs": 2000.0, "tempoBpm": 140.0}
        self.chat = chat("hello")
        self.record = ConnectionRecord(
            "song",
            "ann",
            received=[
                (0.0, snapshot(1)),
                (1.0, {"type": "tempo_changed", "version": 2, "transport": faster}),
                (2.0, {"type": "scroll_tick", "serverTime": 52_000.0, "positionMs": 3000.0}),
                (3.0, {"type": "message_updated", "version": 3, "message": "verse"}),
                (10.1, {"type": "chat_message", "version": 4, **self.chat}),
                (10.5, snapshot(6, transport=faster)),
                (12.0, {"type": "member_connection", "version": 7}),
            ],
            commands=[
                acked("set_tempo", 2, 1.0, tempoBpm=140),
                acked("update_message", 3, 3.0, message="verse"),
                acked("chat_message", 4, 10.1, text="hello"),
                acked("sync_request", None, 12.0),
            ],
            clock=[ClockSample(0.0, 50_000.0, 2.0), ClockSample(12.0, 50_001.5, 2.0)],
        )
        end = snapshot(7, message="verse", transport=faster, chat=[self.chat])
        self.final = FinalState("song", {"late": end, "ann": deepcopy(end)}, None, {"ann"})

    def judge(self) -> RunResult:
        windows = [
            FaultWindow("none", "none", 0.0, quiet_from=0.0),
            FaultWindow("reset", "end", 10.0, 10.004, 10.5, 11.0, quiet_from=11.0),
        ]
        return judge([self.record], windows, [self.final])

    def found(self) -> list[tuple[str, str]]:
        """The kinds of the violations, each with the fault of its row."""
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
def run() -> CleanRun:
    return CleanRun()


def test_clean_run_has_no_violation(run: CleanRun) -> None:
    verdict = run.judge()
    assert verdict.violations == []
    none, reset = verdict.rows
    assert none.detection_ms is none.recovery_ms is None
    assert reset.detection_ms == pytest.approx(4)
    assert reset.recovery_ms == pytest.approx(500)
    assert reset.stall_ms == pytest.approx(2)
    assert verdict.quiet_stall_ms == pytest.approx(2)
    assert reset.position_error_ms == 0
    assert missed_targets(reset, verdict.quiet_stall_ms) == []


def test_command_without_a_reply_is_found(run: CleanRun) -> None:
    run.record.commands.append(CommandRecord("chat_message", {"text": "lost"}, 10.2))
    assert run.found() == [("reset", "ack")]


def test_refused_command_is_found(run: CleanRun) -> None:
    error = {"type": "error", "code": "internal", "message": "a bug"}
    run.record.commands.append(CommandRecord("chat_message", {"text": "x"}, 10.2, 10.3, error))
    assert run.found() == [("reset", "refusal")]


def test_lost_chat_message_is_found(run: CleanRun) -> None:
    for state in run.final.snapshots.values():
        state["chat"].clear()
    assert run.found() == [("reset", "ack")]


@pytest.mark.parametrize(("later", "found"), [(50, []), (49, [("reset", "ack")])])
def test_chat_message_may_be_pushed_out_by_fifty_later_ones(
    run: CleanRun, later: int, found: list[tuple[str, str]]
) -> None:
    older = [] if later == 50 else [chat("older", 59_000.0)]
    ring = [*older, *(chat(f"later {n}", 60_001.0 + n) for n in range(later))]
    for state in run.final.snapshots.values():
        state["chat"] = ring
    assert run.found() == found


@pytest.mark.parametrize(
    ("part", "value"),
    [("message", "older"), ("transport", LINE), ("leaderId", "bob")],
)
def test_lost_last_write_is_found(run: CleanRun, part: str, value: object) -> None:
    run.record.commands.append(acked("set_role", 6, 10.2, memberId="ann"))
    for state in run.final.snapshots.values():
        state[part] = value
    fault = {"message": "none", "transport": "none", "leaderId": "reset"}[part]
    assert run.found() == [(fault, "ack")]


def test_unanswered_last_write_may_be_applied_or_not(run: CleanRun) -> None:
    run.record.commands.append(CommandRecord("update_message", {"message": "chorus"}, 10.2))
    for message in ("verse", "chorus"):
        for state in run.final.snapshots.values():
            state["message"] = message
        # The missing reply is a violation in both cases.
        assert run.found() == [("reset", "ack")]


def test_acknowledged_version_that_no_client_received_is_found(run: CleanRun) -> None:
    run.record.commands.append(acked("seek", 9, 12.5, positionMs=0))
    assert ("reset", "ack") in run.found()


@pytest.mark.parametrize("version", [6, 8, 9])
def test_version_out_of_order_is_found(run: CleanRun, version: int) -> None:
    run.record.received[-1][1]["version"] = version
    assert run.found() == [("reset", "version")]


def test_snapshot_with_an_older_version_is_found(run: CleanRun) -> None:
    run.record.received[-2][1]["version"] = 3
    assert ("reset", "version") in run.found()
    run.record.received[-2][1]["epoch"] = "another"
    run.record.received[-1][1]["version"] = 4
    assert run.found() == []


def test_lost_connection_is_found(run: CleanRun) -> None:
    run.record.closed = (10.3, 1011)
    assert run.found() == [("reset", "connection")]


def test_difference_of_a_client_s_replica_is_found(run: CleanRun) -> None:
    run.record.replica_errors = [(10.2, "replica / snapshot at version 4: message: a / b")]
    assert run.found() == [("reset", "state")]


@pytest.mark.parametrize("frozen", [False, True])
async def test_replica_of_our_client_must_keep_up(
    server: Server, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    player = Player(nursery, server.port, "song", "ann", foreign=False)
    await player.join()
    if frozen:
        monkeypatch.setattr(Membership, "apply", lambda self, message: False)
    async with musician(server) as bob:
        await bob.join()
        await player.until(
            lambda: any(m["type"] == "user_joined" for _, m in player.records[0].received)
        )
        await player.fresh_snapshot()
    assert [text for _, text in player.records[0].replica_errors] == (
        ["the replica has version 1, the snapshot 2"] if frozen else []
    )
    await player.disconnect()


async def test_superseded_connection_of_our_client_counts_as_lost(
    server: Server, nursery: trio.Nursery
) -> None:
    player = Player(nursery, server.port, "song", "ann", foreign=False)
    await player.join()
    async with musician(server) as other_client:
        await other_client.join(resumeToken=player.snapshot["you"]["resumeToken"])
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
def test_close_code_of_our_client_s_exceptions(ended: client.Ended, code: int) -> None:
    assert close_code(ended) == code


def test_position_jump_in_a_snapshot_is_measured(run: CleanRun) -> None:
    message = run.record.received[-2][1]
    message["transport"] = message["transport"] | {"positionMs": 2005.0}
    _, reset = run.judge().rows
    assert reset.position_error_ms == pytest.approx(5)
    assert missed_targets(reset, 0.0) == ["reset: the music jumped by 5.0 ms"]


def test_position_jump_in_a_tick_is_measured(run: CleanRun) -> None:
    tick = {"type": "scroll_tick", "serverTime": 60_000.0, "positionMs": 11_003.0}
    run.record.received.insert(-2, (10.4, tick))
    assert run.judge().rows[1].position_error_ms == pytest.approx(3)


def test_scheduled_change_is_no_jump(run: CleanRun) -> None:
    landing = LINE | {"anchorTime": 61_000.0, "positionMs": 0.0}
    scheduled = LINE | {"anchorTime": 60_000.0, "positionMs": 9000.0, "next": landing}
    run.record.received[5:5] = [
        (10.2, {"type": "seek", "version": 5, "transport": scheduled}),
        (10.3, {"type": "scroll_tick", "serverTime": 60_500.0, "positionMs": 9500.0}),
        (10.4, {"type": "scroll_tick", "serverTime": 61_500.0, "positionMs": 500.0}),
    ]
    run.record.received[8][1]["transport"] = scheduled
    assert run.judge().rows[1].position_error_ms == 0


def test_clock_step_is_a_jump(run: CleanRun) -> None:
    run.record.clock.append(ClockSample(12.5, 50_010.0, 2.0))
    assert run.judge().rows[1].position_error_ms == pytest.approx(8)


def test_different_snapshots_are_found(run: CleanRun) -> None:
    run.final.snapshots["ann"]["message"] = "chorus"
    assert run.found() == [("reset", "state")]
    verdict = run.judge()
    assert "late has verse, ann has chorus" in verdict.violations[0].text


def test_different_state_in_redis_is_found(run: CleanRun) -> None:
    run.final.stored = {"version": 6, "members": [MEMBER], "chat": [run.chat]}
    assert "Redis has 6" in run.judge().violations[0].text


def test_unexpected_member_is_found(run: CleanRun) -> None:
    run.final.members = {"bob"}
    assert run.found() == [("reset", "state")]


def test_stall_counts_in_the_window_where_it_ends(run: CleanRun) -> None:
    run.record.commands.append(
        CommandRecord("chat_message", {"text": "hello"}, 9.9, 10.1, {"type": "ack"})
    )
    verdict = run.judge()
    assert verdict.rows[1].stall_ms == pytest.approx(200)
    assert verdict.rows[0].stall_ms == pytest.approx(2)
    assert verdict.quiet_stall_ms == pytest.approx(2)
    assert missed_targets(verdict.rows[1], verdict.quiet_stall_ms) == [
        "reset: a command waited 200 ms, over 52"
    ]


def test_command_sent_before_the_recovery_is_no_quiet_stall(run: CleanRun) -> None:
    late = CommandRecord("chat_message", {"text": "hello"}, 10.9, 11.1, {"type": "ack"})
    run.record.commands.append(late)
    assert run.judge().quiet_stall_ms == pytest.approx(2)


def test_agreed_state_ignores_times() -> None:
    assert agreed_state(snapshot(1)) == agreed_state(snapshot(1, serverTime=0.0, position=3.0))


def run_chaos(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if "COV" not in name}
    return subprocess.run(
        [sys.executable, "-m", "scripts.chaos", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_dry_run_without_redis_loses_nothing(tmp_path: Path) -> None:
    result = run_chaos("--memory", "--bands", "1", "--keep-logs", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("Nothing was lost.\n")
    assert "server.started" in (tmp_path / "server-1.log").read_text()


@pytest.mark.slow
def test_short_run_loses_nothing(tmp_path: Path, redis_binary: None) -> None:
    result = run_chaos("--bands", "1", "--members", "3", "--faults", "reset,flush")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    faults = [record[:26].strip() for record in result.stdout.splitlines()[4:9]]
    assert [fault.removesuffix(" (brief)") for fault in faults] == [
        *("none", "reset", "FLUSHALL", "server: SIGTERM", "server: SIGKILL")
    ]


def test_interrupted_run_leaves_no_process_behind(tmp_path: Path, redis_binary: None) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.chaos", "--faults", "none", "--keep-logs", tmp_path],
        cwd=ROOT,
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
