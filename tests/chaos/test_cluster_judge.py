"""The judge of `python -m scripts.chaos --servers` finds each violation; and short whole runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos.cluster_judge import (
    ClusterFinalState,
    disagreements,
    judge_acked_changes,
    judge_connections,
    judge_mirrors,
    judge_removals,
    judge_resumes,
)
from scripts.chaos.cluster_records import ResumeAttempt, RoamingRecord, ServerRun
from scripts.chaos.judge import Violation
from scripts.chaos.records import CommandRecord
from scripts.chaos.trace import CommitTraces
from scripts.chaos.view import SessionReplica

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120
FOREVER = float("inf")


LINE = {"isPlaying": False, "anchorTime": 1.0}
RANK = {"term": 1, "time": 1.0, "bootId": "a"}
HEADLINE = {"rank": RANK, "time": 5.0, "bootId": "a"}


def snapshot(version: int = 1, **changes: object) -> dict[str, Any]:
    member = {"memberId": "ann", "displayName": "Ann", "role": "leader", "connected": True}
    return {
        "type": "snapshot",
        "epoch": "e",
        "version": version,
        "message": "verse",
        "transport": LINE,
        "leaderId": "ann",
        "members": [member],
        "chat": [],
    } | changes


def committed(version: int, storage: str, at: float, **changes: object) -> dict[str, Any]:
    return {
        "at": at,
        "first": False,
        "storage": storage,
        "session": "song",
        "epoch": "e",
        "version": version,
        "event": f"a-{'r' if storage == 'redis' else ''}{version}",
        "leader": {"rank": RANK, "memberId": "ann"},
        "transport": HEADLINE,
        "message": HEADLINE,
        "chat": [],
        "members": {},
        "gone": [],
    } | changes


class CleanClusterRun:
    """A run without a violation, for tests to break: Ann joins and writes a headline."""

    def __init__(self, directory: Path) -> None:
        self.server_run = ServerRun("s1", directory / "trace", 0.0)
        self.headline = CommandRecord(
            "update_message", {"message": "verse"}, 2.0, 2.1, {"type": "ack", "version": 2}
        )
        self.record = RoamingRecord(
            "song",
            "Ann",
            received=[(1.0, snapshot()), (2.0, event(2))],
            commands=[self.headline],
            server_run=self.server_run,
            member_id="ann",
        )
        self.trace = [committed(1, "redis", 1.0), committed(2, "redis", 2.0)]
        self.registers: dict[str, Any] = {
            "leader": {"rank": RANK},
            "transport": HEADLINE,
            "message": HEADLINE,
        }
        shown = snapshot(2)
        self.final = ClusterFinalState(
            "song", {"Ann": shown}, shown, self.registers, {"ann": "Ann"}
        )

    @property
    def traces(self) -> CommitTraces:
        lines = [json.dumps(entry) + "\n" for entry in self.trace]
        # A kill truncates the last line.
        self.server_run.trace.write_text("".join(lines) + '{"at"')
        return CommitTraces([self.server_run], 0.0)

    def found(self) -> list[str]:
        violations: list[Violation] = [
            *judge_connections([self.record], self.traces, 60.0),
            *judge_acked_changes([self.record], self.final, self.traces),
        ]
        return sorted(violation.kind for violation in violations)


def event(version: int, message: str = "verse") -> dict[str, Any]:
    return {"type": "message_updated", "version": version, "message": message}


@pytest.fixture
def run(tmp_path: Path) -> CleanClusterRun:
    return CleanClusterRun(tmp_path)


def test_clean_run_has_no_violation(run: CleanClusterRun) -> None:
    assert run.found() == []
    assert disagreements(run.final) == []


def test_change_with_a_greater_stamp_than_the_final_one_is_lost(run: CleanClusterRun) -> None:
    run.trace[1]["message"] = HEADLINE | {"time": 6.0}
    assert run.found() == ["ack"]
    # A greater rank of another register is no excuse; one of the same register is.
    run.registers["transport"] = HEADLINE | {"time": 7.0}
    assert run.found() == ["ack"]
    run.registers["message"] = HEADLINE | {"rank": RANK | {"term": 2}}
    assert run.found() == []


def test_change_with_the_final_stamp_must_have_the_final_value(run: CleanClusterRun) -> None:
    run.headline.fields = {"message": "chorus"}
    assert run.found() == ["ack"]


def test_change_only_in_memory_of_a_killed_server_may_be_lost(run: CleanClusterRun) -> None:
    run.trace[1] |= {"storage": "memory", "event": "a-2", "message": HEADLINE | {"time": 6.0}}
    assert run.found() == ["ack"]
    run.server_run.end_signal = signal.SIGKILL
    assert run.found() == []
    # A later commit brought it to Redis.
    run.trace.append(committed(3, "redis", 3.0))
    assert run.found() == ["ack"]


def test_mirror_must_not_go_back_to_an_older_stamp(run: CleanClusterRun) -> None:
    older = HEADLINE | {"time": 4.0}
    run.trace = [committed(1, "mirror", 1.0), committed(2, "mirror", 2.0, transport=older)]

    def found() -> int:
        return len(list(judge_mirrors([run.server_run], run.traces)))

    assert found() == 1
    # No member was there in between, and the server read the session anew.
    run.trace[1]["first"] = True
    assert found() == 0


def test_ack_without_a_commit_is_found(run: CleanClusterRun) -> None:
    run.trace.pop()
    assert run.found() == ["ack"]


def test_lost_chat_message_is_found(run: CleanClusterRun) -> None:
    said = {"type": "chat_message", "text": "hello", "messageId": "m", "sentAt": 3.0}
    run.record.received.append((3.0, said | {"version": 3}))
    run.trace.append(committed(3, "redis", 3.0, chat=[["m", 3.0]]))
    run.record.commands.append(
        CommandRecord("chat_message", {"text": "hello"}, 3.0, 3.1, {"type": "ack", "version": 3})
    )
    assert run.found() == ["ack"]
    run.final.stored["chat"] = [said]
    assert run.found() == []


def test_missing_version_is_found(run: CleanClusterRun) -> None:
    run.record.received.append((3.0, event(4)))
    assert run.found() == ["version"]


@pytest.mark.parametrize("code", ["internal", "not_joined", "not_leader"])
def test_refused_command_is_found(run: CleanClusterRun, code: str) -> None:
    error = {"type": "error", "code": code, "message": ""}
    run.record.commands.append(CommandRecord("play", {}, 3.0, 3.1, error))
    assert run.found() == ([] if code == "not_leader" else ["ack"])


def test_unanswered_command_is_found_unless_the_server_was_suspended(run: CleanClusterRun) -> None:
    run.record.commands.append(CommandRecord("play", {}, 10.0))
    assert run.found() == ["ack"]
    run.server_run.suspensions.append([12.0, 20.0])
    assert run.found() == []


@pytest.mark.parametrize(
    ("code", "end_signal", "abandoned", "right"),
    [
        (1006, None, FOREVER, False),
        (1006, signal.SIGKILL, FOREVER, True),
        (1006, signal.SIGTERM, FOREVER, False),
        (1012, signal.SIGTERM, FOREVER, True),
        (1012, None, FOREVER, False),
        (1013, None, FOREVER, False),
        (4001, None, FOREVER, False),
        (4001, None, 4.0, True),
    ],
)
def test_close_code_must_fit_the_cause(
    run: CleanClusterRun,
    code: int,
    end_signal: signal.Signals | None,
    abandoned: float,
    right: bool,
) -> None:
    run.record.closed = (5.0, code)
    run.record.abandoned = abandoned
    if end_signal is not None:
        run.server_run.end_signal, run.server_run.ended = end_signal, 5.0
    assert run.found() == ([] if right else ["connection"])


def test_superseded_connection_must_be_closed(run: CleanClusterRun) -> None:
    run.record.superseded = 5.0
    assert run.found() == ["connection"]


def test_member_back_within_the_grace_must_be_resumed(run: CleanClusterRun) -> None:
    data_losses: list[float] = []
    removals: dict[str, float] = {}
    join = CommandRecord("join_session", {}, 0.9, 1.1, {"type": "ack", "version": 1})
    run.record.commands.insert(0, join)
    again = CommandRecord("join_session", {}, 4.0, 4.1, {"type": "ack", "version": 2})
    back = ResumeAttempt("Ann", again, 3.0, run.record, run.record, resumed=False)

    def found() -> int:
        return len(list(judge_resumes([back], data_losses, removals, run.traces)))

    assert found() == 1
    run.trace[0] |= {"storage": "memory"}
    # The next commit brought it to Redis.
    assert found() == 1
    run.trace[1]["event"] = "a-2"
    assert found() == 0
    run.trace[0] |= {"storage": "redis"}
    assert found() == 1
    data_losses.append(3.5)
    assert found() == 0
    data_losses.clear()
    removals["ann"] = 3.5
    assert found() == 0
    removals.clear()
    back.last_seen = 0.5
    assert found() == 0


def test_connected_member_must_not_be_removed(run: CleanClusterRun) -> None:
    left = {"type": "user_left", "memberId": "ann", "reason": "timeout"}
    other = RoamingRecord(
        "song", "Bob", received=[(30.0, left)], server_run=run.server_run, member_id="bob"
    )

    def found() -> int:
        return len(list(judge_removals([run.record, other], run.traces)))

    assert found() == 1
    run.record.left = 26.0
    assert found() == 0
    run.record.left = 28.0
    assert found() == 1
    run.trace.append(committed(3, "memory", 20.0))
    assert found() == 0
    run.trace.pop()
    run.server_run.suspensions.append([20.0, 21.0])
    assert found() == 0
    run.server_run.suspensions.clear()
    left["reason"] = "left"
    assert found() == 0
    left |= {"type": "member_connection", "connected": False}
    assert found() == 0
    run.record.left = FOREVER
    assert found() == 1
    run.record.abandoned = 29.0
    assert found() == 0


@pytest.mark.parametrize(
    ("part", "value"),
    [("message", "chorus"), ("version", 3), ("leaderId", "bob"), ("epoch", "f"), ("members", [])],
)
def test_difference_between_final_states_is_found(
    run: CleanClusterRun, part: str, value: object
) -> None:
    run.final.snapshots["Bob"] = snapshot(2) | {part: value}
    assert disagreements(run.final)


def test_extra_members_and_second_leaders_are_found(run: CleanClusterRun) -> None:
    (ann,) = run.final.stored["members"]
    bob = ann | {"memberId": "bob", "role": "follower"}
    run.final.stored["members"].append(bob)
    assert disagreements(run.final)
    run.final.members["bob"] = "Bob"
    assert disagreements(run.final) == []
    bob["role"] = "leader"
    assert disagreements(run.final)
    bob |= {"role": "follower", "connected": False}
    assert disagreements(run.final)


def test_replica_applies_events_and_compares_snapshots() -> None:
    view = SessionReplica()
    assert view.apply(snapshot(1)) is None
    bob = {"memberId": "bob", "role": "follower", "connected": True}
    view.apply({"type": "user_joined", "version": 2, "member": bob})
    view.apply({"type": "role_changed", "version": 3, "memberId": "ann", "role": "follower"})
    view.apply({"type": "role_changed", "version": 4, "memberId": "bob", "role": "leader"})
    view.apply({"type": "member_connection", "version": 5, "memberId": "ann", "connected": False})
    view.apply({"type": "user_left", "version": 6, "memberId": "ann"})
    view.apply({"type": "chat_message", "version": 7, "messageId": "m"})
    view.apply({"type": "play", "version": 8, "transport": LINE | {"isPlaying": True}})
    shown = snapshot(
        8,
        members=[bob],
        leaderId="bob",
        chat=[{"messageId": "m"}],
        transport=LINE | {"isPlaying": True},
    )
    assert view.apply(shown) is None
    assert "message: verse / chorus" in (view.apply(shown | {"message": "chorus"}) or "")
    assert view.apply(snapshot(9)) is None


@pytest.mark.parametrize(
    ("seed", "servers", "faults"),
    [
        (1, 3, "server kill,server term,redis restart"),
        pytest.param(3, 2, "cut off,redis flush,subscriptions", marks=pytest.mark.slow),
    ],
)
def test_short_run_loses_nothing(
    tmp_path: Path, redis_binary: None, seed: int, servers: int, faults: str
) -> None:
    arguments = ["--servers", str(servers), "--seed", str(seed), "--faults", faults]
    arguments += ["--minutes", "0.03", "--calm", "1", "--bands", "2", "--members", "4"]
    environment = {name: text for name, text in os.environ.items() if "COV" not in name}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.chaos", *arguments, "--keep-logs", tmp_path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert f"seed {seed}: clean" in result.stdout
