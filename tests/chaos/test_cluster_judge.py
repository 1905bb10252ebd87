"""Many servers: the judge of `scripts/chaos.py --servers` sees what is lost; and a short run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.chaos.cluster_judge import (
    Ending,
    disagreements,
    judge_changes,
    judge_lines,
    judge_mirrors,
    judge_removals,
    judge_returns,
)
from scripts.chaos.judge import Asked, Finding
from scripts.chaos.roaming import Line, Return
from scripts.chaos.servers import Life
from scripts.chaos.trace import Traces
from scripts.chaos.view import View

SCRIPTS = Path(__file__).parents[2] / "scripts"
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


class Scene:
    """A run in which nothing went wrong, to be spoilt: Ann joins and writes a headline."""

    def __init__(self, directory: Path) -> None:
        self.life = Life("s1", directory / "trace", 0.0)
        self.headline = Asked(
            "update_message", {"message": "verse"}, 2.0, 2.1, {"type": "ack", "version": 2}
        )
        self.line = Line(
            "song",
            "Ann",
            heard=[(1.0, snapshot()), (2.0, event(2))],
            asked=[self.headline],
            life=self.life,
            member_id="ann",
        )
        self.trace = [committed(1, "redis", 1.0), committed(2, "redis", 2.0)]
        self.head = {"leader": {"rank": RANK}, "transport": {"stamp": HEADLINE}} | {
            "message": {"stamp": HEADLINE}
        }
        shown = snapshot(2)
        self.ending = Ending("song", {"Ann": shown}, shown, self.head, {"ann": "Ann"})

    @property
    def traces(self) -> Traces:
        lines = [json.dumps(entry) + "\n" for entry in self.trace]
        # As a kill leaves it.
        self.life.trace.write_text("".join(lines) + '{"at"')
        return Traces([self.life], 0.0)

    def found(self) -> list[str]:
        findings: list[Finding] = [
            *judge_lines([self.line], self.traces, 60.0),
            *judge_changes([self.line], self.ending, self.traces),
        ]
        return sorted(finding.kind for finding in findings)


def event(version: int, message: str = "verse") -> dict[str, Any]:
    return {"type": "message_updated", "version": version, "message": message}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_nothing_is_found_where_nothing_was_lost(scene: Scene) -> None:
    assert scene.found() == []
    assert disagreements(scene.ending) == []


def test_a_change_whose_stamp_is_greater_than_the_final_one_was_lost(scene: Scene) -> None:
    scene.trace[1]["message"] = HEADLINE | {"time": 6.0}
    assert scene.found() == ["ack"]
    # Another register is no excuse, a greater rank is.
    scene.head["transport"]["stamp"] = HEADLINE | {"time": 7.0}
    assert scene.found() == ["ack"]
    scene.head["message"]["stamp"] = HEADLINE | {"rank": RANK | {"term": 2}}
    assert scene.found() == []


def test_a_change_with_the_final_stamp_has_the_final_value(scene: Scene) -> None:
    scene.headline.fields = {"message": "chorus"}
    assert scene.found() == ["ack"]


def test_what_was_only_in_the_memory_of_a_killed_server_may_be_lost(scene: Scene) -> None:
    scene.trace[1] |= {"storage": "memory", "event": "a-2", "message": HEADLINE | {"time": 6.0}}
    assert scene.found() == ["ack"]
    scene.life.how = signal.SIGKILL
    assert scene.found() == []
    # But it was not only there.
    scene.trace.append(committed(3, "redis", 3.0))
    assert scene.found() == ["ack"]


def test_what_a_server_knows_does_not_get_older(scene: Scene) -> None:
    older = HEADLINE | {"time": 4.0}
    scene.trace = [committed(1, "mirror", 1.0), committed(2, "mirror", 2.0, transport=older)]

    def found() -> int:
        return len(list(judge_mirrors([scene.life], scene.traces)))

    assert found() == 1
    # Nobody was there in between, and it is read anew.
    scene.trace[1]["first"] = True
    assert found() == 0


def test_an_acknowledgement_of_what_was_not_committed(scene: Scene) -> None:
    scene.trace.pop()
    assert scene.found() == ["ack"]


def test_a_chat_message_that_is_gone(scene: Scene) -> None:
    said = {"type": "chat_message", "text": "hello", "messageId": "m", "sentAt": 3.0}
    scene.line.heard.append((3.0, said | {"version": 3}))
    scene.trace.append(committed(3, "redis", 3.0, chat=[["m", 3.0]]))
    scene.line.asked.append(
        Asked("chat_message", {"text": "hello"}, 3.0, 3.1, {"type": "ack", "version": 3})
    )
    assert scene.found() == ["ack"]
    scene.ending.stored["chat"] = [said]
    assert scene.found() == []


def test_a_version_that_is_missing(scene: Scene) -> None:
    scene.line.heard.append((3.0, event(4)))
    assert scene.found() == ["version"]


@pytest.mark.parametrize("code", ["internal", "not_joined", "not_leader"])
def test_a_refused_command(scene: Scene, code: str) -> None:
    error = {"type": "error", "code": code, "message": ""}
    scene.line.asked.append(Asked("play", {}, 3.0, 3.1, error))
    assert scene.found() == ([] if code == "not_leader" else ["ack"])


def test_a_command_that_is_not_answered(scene: Scene) -> None:
    scene.line.asked.append(Asked("play", {}, 10.0))
    assert scene.found() == ["ack"]
    scene.life.pauses.append([12.0, 20.0])
    assert scene.found() == []


@pytest.mark.parametrize(
    ("code", "how", "deserted", "right"),
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
def test_the_end_of_a_connection(
    scene: Scene, code: int, how: signal.Signals | None, deserted: float, right: bool
) -> None:
    scene.line.closed = (5.0, code)
    scene.line.deserted = deserted
    if how is not None:
        scene.life.how, scene.life.ended = how, 5.0
    assert scene.found() == ([] if right else ["connection"])


def test_an_old_connection_that_stays_open(scene: Scene) -> None:
    scene.line.superseded = 5.0
    assert scene.found() == ["connection"]


def test_who_comes_back_in_time_is_the_same_again(scene: Scene) -> None:
    wiped: list[float] = []
    gone: dict[str, float] = {}
    join = Asked("join_session", {}, 0.9, 1.1, {"type": "ack", "version": 1})
    scene.line.asked.insert(0, join)
    again = Asked("join_session", {}, 4.0, 4.1, {"type": "ack", "version": 2})
    back = Return("Ann", again, 3.0, scene.line, scene.line, resumed=False)

    def found() -> int:
        return len(list(judge_returns([back], wiped, gone, scene.traces)))

    assert found() == 1
    scene.trace[0] |= {"storage": "memory"}
    # It came to Redis with the next change.
    assert found() == 1
    scene.trace[1]["event"] = "a-2"
    assert found() == 0
    scene.trace[0] |= {"storage": "redis"}
    assert found() == 1
    wiped.append(3.5)
    assert found() == 0
    wiped.clear()
    gone["ann"] = 3.5
    assert found() == 0
    gone.clear()
    back.away = 0.5
    assert found() == 0


def test_who_is_connected_or_in_the_grace_is_not_removed(scene: Scene) -> None:
    left = {"type": "user_left", "memberId": "ann", "reason": "timeout"}
    other = Line("song", "Bob", heard=[(30.0, left)], life=scene.life, member_id="bob")

    def found() -> int:
        return len(list(judge_removals([scene.line, other], scene.traces)))

    assert found() == 1
    scene.line.left = 26.0
    assert found() == 0
    scene.line.left = 28.0
    assert found() == 1
    scene.trace.append(committed(3, "memory", 20.0))
    assert found() == 0
    scene.trace.pop()
    scene.life.pauses.append([20.0, 21.0])
    assert found() == 0
    scene.life.pauses.clear()
    left["reason"] = "left"
    assert found() == 0
    left |= {"type": "member_connection", "connected": False}
    assert found() == 0
    scene.line.left = FOREVER
    assert found() == 1
    scene.line.deserted = 29.0
    assert found() == 0


@pytest.mark.parametrize(
    ("part", "value"),
    [("message", "chorus"), ("version", 3), ("leaderId", "bob"), ("epoch", "f"), ("members", [])],
)
def test_those_who_do_not_agree(scene: Scene, part: str, value: object) -> None:
    scene.ending.snapshots["Bob"] = snapshot(2) | {part: value}
    assert disagreements(scene.ending)


def test_ghosts_and_leaders(scene: Scene) -> None:
    (ann,) = scene.ending.stored["members"]
    bob = ann | {"memberId": "bob", "role": "follower"}
    scene.ending.stored["members"].append(bob)
    assert disagreements(scene.ending)
    scene.ending.members["bob"] = "Bob"
    assert disagreements(scene.ending) == []
    bob["role"] = "leader"
    assert disagreements(scene.ending)
    bob |= {"role": "follower", "connected": False}
    assert disagreements(scene.ending)


def test_a_view_follows_the_events_and_compares() -> None:
    view = View()
    assert view.hear(snapshot(1)) is None
    bob = {"memberId": "bob", "role": "follower", "connected": True}
    view.hear({"type": "user_joined", "version": 2, "member": bob})
    view.hear({"type": "role_changed", "version": 3, "memberId": "ann", "role": "follower"})
    view.hear({"type": "role_changed", "version": 4, "memberId": "bob", "role": "leader"})
    view.hear({"type": "member_connection", "version": 5, "memberId": "ann", "connected": False})
    view.hear({"type": "user_left", "version": 6, "memberId": "ann"})
    view.hear({"type": "chat_message", "version": 7, "messageId": "m"})
    view.hear({"type": "play", "version": 8, "transport": LINE | {"isPlaying": True}})
    shown = snapshot(
        8,
        members=[bob],
        leaderId="bob",
        chat=[{"messageId": "m"}],
        transport=LINE | {"isPlaying": True},
    )
    assert view.hear(shown) is None
    assert "message: verse / chorus" in (view.hear(shown | {"message": "chorus"}) or "")
    assert view.hear(snapshot(9)) is None


@pytest.mark.parametrize(
    ("seed", "servers", "faults"),
    [(1, 3, "server kill,server term,redis restart"), (3, 2, "cut off,redis flush,subscriptions")],
)
def test_a_short_run(
    tmp_path: Path, redis_binary: None, seed: int, servers: int, faults: str
) -> None:
    arguments = ["--servers", str(servers), "--seed", str(seed), "--faults", faults]
    arguments += ["--minutes", "0.03", "--calm", "1", "--bands", "2", "--members", "4"]
    environment = {name: text for name, text in os.environ.items() if "COV" not in name}
    result = subprocess.run(
        [sys.executable, "-m", "scripts.chaos", *arguments, "--keep-logs", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert f"seed {seed}: clean" in result.stdout
