"""The oracle and the members of a load report each violation. No server runs here."""

import json
import random
import time
from typing import Any

import pytest

from bandsync.wire.frames import text_frame
from scripts.bench.band import LoadBand
from scripts.bench.epoll_ws import EpollLoop, TargetAddress
from scripts.bench.phone import LoadMember
from scripts.bench.score import LoadScore


class FakeConnection:
    """Accepts what a member sends."""

    open = True
    report_ticks = True

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def cut(self) -> None:
        self.open = False


class BandWithoutServer:
    """A band of two members that have joined at version 5, without a server."""

    def __init__(self) -> None:
        self.score = LoadScore()
        self.loop = EpollLoop()
        address = TargetAddress(2, ("127.0.0.1", 1), "nowhere")
        chance = random.Random(1)
        self.session = LoadBand(self.loop, self.score, "b", 0, 2, [address], chance=chance)
        for number, member in enumerate(self.session.members):
            member.away = False
            member.connection = FakeConnection()  # type: ignore[assignment]  # all that a member uses
            self.deliver(member, snapshot(you=you(number)))

    @property
    def found(self) -> dict[str, int]:
        return dict(self.score.findings)

    def deliver(self, member: LoadMember, message: dict[str, Any]) -> None:
        # As the server encodes it, without spaces.
        payload = json.dumps(message, separators=(",", ":")).encode()
        frame = text_frame(payload)
        start = len(frame) - len(payload)
        kind = frame[start + 9 : start + 13]
        member.received(kind, frame, start, len(frame))

    def deliver_to_all(self, message: dict[str, Any]) -> None:
        for member in self.session.members:
            self.deliver(member, message)

    def end(self, *snapshots: dict[str, Any]) -> None:
        self.session.request_snapshots()
        for member, each in zip(self.session.members, snapshots, strict=True):
            self.deliver(member, each)
        self.session.oracle.judge()


TRANSPORT = {
    "isPlaying": True,
    "positionMs": 0.0,
    "anchorTime": 1000.0,
    "tempoBpm": 120.0,
    "beat": 0.0,
    "beatsPerBar": 4,
    "next": None,
}


def you(number: int, *, resumed: bool = False) -> dict[str, Any]:
    role = "follower" if number else "leader"
    return {"memberId": f"m{number}", "role": role, "resumeToken": "t", "resumed": resumed}


def snapshot(version: int = 5, **changes: object) -> dict[str, Any]:
    return {
        "type": "snapshot",
        "version": version,
        "serverTime": 2000.0,
        "epoch": "e",
        "message": "",
        "transport": TRANSPORT,
        "leaderId": "m0",
        "members": [],
        "chat": [],
    } | changes


def event(kind: str, version: int, **fields: object) -> dict[str, Any]:
    fields = fields or {"memberId": "m9"}
    return {"type": kind, "sessionId": "b", "version": version, "serverTime": 2000.0, **fields}


def test_correct_messages_have_no_finding() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    assert leader.request("seek", positionMs=0)
    moved = event("seek", 6, transport=TRANSPORT | {"positionMs": 7.0}, by="m0")
    band.deliver_to_all(moved)
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    band.end(*[snapshot(6, transport=moved["transport"])] * 2)
    assert band.found == {}
    assert band.score.counts["acks"] == 1
    assert band.score.anchor_error_ms == 0


def test_version_gap_is_found() -> None:
    band = BandWithoutServer()
    band.deliver_to_all(event("user_left", 7))
    assert band.found == {"versionGap": 2}


def test_different_events_of_one_version_are_found() -> None:
    band = BandWithoutServer()
    first, second = band.session.members
    band.deliver(first, event("seek", 6, transport=TRANSPORT, by="m0"))
    band.deliver(second, event("seek", 6, transport=TRANSPORT | {"positionMs": 30.0}, by="m0"))
    assert band.found == {"disagreement": 1, "beat": 1}
    assert band.score.anchor_error_ms == pytest.approx(30)


def test_lost_acknowledged_change_is_found() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("seek", positionMs=0)
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    band.end(snapshot(), snapshot())
    assert band.found == {"lostAck": 1}


def test_ack_of_another_event_is_found() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("seek", positionMs=0)
    band.deliver_to_all(event("message_updated", 6, message="x", by="m0"))
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    assert band.found == {"otherAck": 1}
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    assert band.found == {"otherAck": 1, "answeredTwice": 1}


def test_ack_before_another_event_is_found() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("seek", positionMs=0)
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    band.deliver_to_all(event("message_updated", 6, message="x", by="m0"))
    assert band.found == {"otherAck": 1}


def test_lost_chat_message_is_found() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("chat_message", text="hello")
    band.deliver_to_all(event("chat_message", 6, text="hello"))
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    band.end(snapshot(6), snapshot(6))
    assert band.found == {"lostAck": 1}


def test_old_chat_message_may_leave_the_ring() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("chat_message", text="hello")
    band.deliver(leader, {"type": "ack", "requestId": "1", "version": 6})
    for version in range(6, 57):
        band.deliver_to_all(event("chat_message", version, text=str(version)))
    ring = [{"text": str(version)} for version in range(7, 57)]
    band.end(snapshot(56, chat=ring), snapshot(56, chat=ring))
    assert band.found == {}


def test_overdue_reply_is_found() -> None:
    band = BandWithoutServer()
    leader = band.session.members[0]
    leader.request("seek", positionMs=0)
    band.session.check_deadlines(time.perf_counter() + 9)
    assert band.found == {}
    band.session.check_deadlines(time.perf_counter() + 11)
    assert band.found == {"unanswered": 1}


def test_refused_resume_is_found() -> None:
    band = BandWithoutServer()
    follower = band.session.members[1]
    follower.cut(1.0)
    follower.connection = FakeConnection()  # type: ignore[assignment]  # all that a member uses
    band.deliver(follower, snapshot(6, you=you(1)))
    assert band.found == {"notResumed": 1}


def test_new_epoch_of_a_session_in_use_is_found() -> None:
    band = BandWithoutServer()
    band.deliver(band.session.members[1], snapshot(1, epoch="f"))
    assert band.found == {"newEpoch": 1}


def test_different_final_snapshots_are_found() -> None:
    band = BandWithoutServer()
    band.end(snapshot(), snapshot(message="other"))
    assert band.found == {"disagreement": 1}


def test_tick_error_against_the_anchor_is_measured() -> None:
    band = BandWithoutServer()
    tick = {"type": "scroll_tick", "serverTime": 3000.0, "positionMs": 2012.0}
    band.deliver(band.session.members[0], tick)
    assert band.score.tick_error_ms == pytest.approx(12)
