"""`bandsync/web/client/bandsync.js` against a scripted server: rare and invalid messages."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from scripts.testbed.browsers import BrowserPages, evaluate
from tests.support.browser_band import details, open_band, statuses, until
from tests.support.scripted_band import (
    EPOCH_MS,
    TRANSPORT,
    Peer,
    ScriptedServer,
    change,
    member,
    scripted_server,
    snapshot,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture
def joined(open_page: BrowserPages, scripted: ScriptedServer) -> "tuple[Page, Peer]":
    """A page that leads "song", at version 1, and its connection."""
    page = open_band(open_page, scripted.ws_url)
    page.evaluate("void (globalThis.joining = band.join())")
    peer = scripted.next()
    peer.admit()
    evaluate(page, "() => joining")
    return page, peer


def chat(version: int, text: str) -> dict[str, object]:
    return change(
        "chat_message",
        version,
        messageId=f"m{version}",
        memberId="me",
        displayName="Me",
        text=text,
        sentAt=EPOCH_MS,
    )


def texts(page: "Page") -> list[str]:
    found: list[str] = page.evaluate("band.session.chat.map(({ text }) => text)")
    return found


def test_gap_requests_one_snapshot(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    peer.send(chat(2, "two"), chat(4, "four"), chat(5, "five"))
    request = peer.next("sync_request")
    assert (request["version"], request["epoch"]) == (2, "first")
    assert texts(page) == ["two"]
    # One request for one gap.
    peer.send(snapshot(5, chat=[chat(v, str(v)) for v in (2, 3, 4, 5)]), peer.ack(request))
    peer.send(chat(6, "6"))
    until(page, "band.session.version === 6")
    assert texts(page) == ["2", "3", "4", "5", "6"]
    assert details(page, "gap") == [{"have": 2, "got": 4}]
    assert len(peer.all("sync_request")) == 1
    # A snapshot after a merge says nothing of who we are.
    assert page.evaluate("[band.memberId, band.isLeader, band.resumeToken]") == ["me", True, "t1"]


def test_a_refused_sync_request_is_repeated(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    peer.send(chat(3, "three"))
    peer.refuse(peer.next("sync_request"), "rate_limited")
    peer.send(snapshot(3), peer.ack(peer.next("sync_request")))
    until(page, "band.session.version === 3")


def test_old_and_foreign_messages_are_ignored(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    peer.send(chat(2, "two"), chat(2, "again"), chat(1, "old"), snapshot(1))
    peer.send({**chat(3, "elsewhere"), "sessionId": "other"})
    peer.send(change("of_the_future", 9), chat(3, "three"))
    until(page, "band.session.version === 3")
    assert texts(page) == ["two", "three"]
    assert peer.all("sync_request") == []


def test_a_new_epoch_starts_over(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    peer.send(chat(2, "two"), snapshot(1, epoch="second"), chat(2, "zwei"))
    until(page, "band.session.epoch === 'second' && band.session.version === 2")
    assert texts(page) == ["zwei"]


def test_every_change(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    playing = {**TRANSPORT, "isPlaying": True}
    peer.send(
        change("user_joined", 2, member=member("bob"), memberCount=2),
        change("user_joined", 3, member=member("cy"), memberCount=3),
        change("member_connection", 4, memberId="bob", connected=False),
        change(
            "role_changed", 5, memberId="me", role="follower", previousRole="leader", reason="x"
        ),
        change(
            "role_changed", 6, memberId="cy", role="leader", previousRole="follower", reason="x"
        ),
        change("user_left", 7, memberId="bob", memberCount=2, reason="timeout"),
        change("message_updated", 8, message="Bridge", by="cy"),
        change("tempo_changed", 9, transport={**playing, "tempoBpm": 90}, by="cy"),
        change("play", 10, transport=playing, by="cy"),
    )
    until(page, "band.session.version === 10")
    assert page.evaluate("[...band.session.members.keys()]") == ["me", "cy"]
    assert page.evaluate("[band.leader.memberId, band.isLeader, band.session.message]") == [
        "cy",
        False,
        "Bridge",
    ]
    assert page.evaluate("band.session.transport") == playing
    peer.send(change("user_left", 11, memberId="cy", memberCount=1, reason="left"))
    until(page, "band.session.version === 11")
    assert page.evaluate("[band.leader, band.session.leaderId]") == [None, None]


def test_chat_is_bounded(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    peer.send(*[chat(version, str(version)) for version in range(2, 80)])
    until(page, "band.session.version === 79")
    assert texts(page) == [str(version) for version in range(30, 80)]


def test_ack_before_and_after_its_event(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    page.evaluate("void (globalThis.done = band.chat('a').then(() => band.session.version))")
    request = peer.next("chat_message")
    peer.send(peer.ack(request, version=2))
    page.evaluate("void done.then(() => { globalThis.early = band.session.version; })")
    peer.send(chat(2, "a"))
    assert evaluate(page, "() => done") == 2
    page.evaluate("void (globalThis.done = band.chat('b').then(() => band.session.version))")
    request = peer.next("chat_message")
    peer.send(chat(3, "b"), peer.ack(request, version=3))
    assert evaluate(page, "() => done") == 3
    # An event that does not come because the connection went: what was acknowledged stays so.
    page.evaluate("void (globalThis.done = band.chat('c'))")
    peer.send(peer.ack(peer.next("chat_message"), version=9))
    peer.close(1011)
    assert evaluate(page, "() => done") == {"version": 9}


def test_the_latest_token_resumes(joined: "tuple[Page, Peer]", scripted: ScriptedServer) -> None:
    page, peer = joined
    for number in (1, 2, 3):
        peer.close(1012)
        peer = scripted.next()
        # Another server, whose version is behind.
        request = peer.admit(resumed=True, token_number=number + 1, version=1)
        assert request["resumeToken"] == f"t{number}"
        assert request["ticks"] is False
    until(page, "band.resumeToken === 't4' && band.status === 'online'")


@pytest.mark.slow
def test_messages_of_an_abandoned_connection_are_ignored(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer
) -> None:
    page, old = joined
    old.deaf = True
    page.evaluate("globalThis.dispatchEvent(new Event('online'))")
    until(page, "band.status === 'resuming'")
    new = scripted.next()
    new.admit(resumed=True, token_number=2)
    until(page, "band.status === 'online'")
    old.send(chat(2, "late"))
    old.close(4001)
    new.send(chat(2, "new"))
    until(page, "band.session.version === 2")
    assert texts(page) == ["new"]
    assert page.evaluate("band.status") == "online"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(1008, ("closed", 1008)), (4001, ("superseded", 4001))],
)
def test_closes_that_are_final(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer, code: int, expected: tuple[str, int]
) -> None:
    page, peer = joined
    peer.close(code, "enough")
    until(page, "band.status === 'closed'")
    reason = page.evaluate("[band.closeReason.code, band.closeReason.closeCode]")
    assert tuple(reason) == expected
    # And join() starts anew.
    page.evaluate("void (globalThis.joining = band.join())")
    scripted.next().admit()
    evaluate(page, "() => joining")


@pytest.mark.parametrize("code", [1000, 1001, 1009, 1011, 1012, 1013, 4000])
def test_closes_that_are_not(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer, code: int
) -> None:
    page, peer = joined
    peer.close(code)
    scripted.next().admit(resumed=True)
    until(page, "band.status === 'online' && band.session !== null")


@pytest.mark.slow
def test_page_waits_longer_for_a_full_server(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer
) -> None:
    page, peer = joined
    peer.close(1013)
    until(page, "band.status === 'resuming'")
    assert page.evaluate("seen.filter(([t]) => t === 'status').at(-1)[1].retryInMs") > 1000
    # Not hurried by anything.
    page.evaluate("globalThis.dispatchEvent(new Event('online'))")
    assert page.evaluate("band.status") == "resuming"
    scripted.next().admit(resumed=True)
    until(page, "band.status === 'online'")


@pytest.mark.slow
def test_backoff_doubles_with_jitter(open_page: BrowserPages, scripted: ScriptedServer) -> None:
    page = open_band(open_page, scripted.ws_url)
    page.evaluate("void band.join()")
    for _ in range(4):
        scripted.next().close(1011)
    until(page, "seen.filter(([t, d]) => t === 'status' && d.retryInMs !== null).length === 4")
    waits = [each["retryInMs"] for each in details(page, "status") if each["retryInMs"] is not None]
    for doublings, wait in enumerate(waits):
        assert 150 * 2**doublings - 1 <= wait <= 300 * 2**doublings
    assert statuses(page) == ["connecting"]


@pytest.mark.slow
def test_online_event_reconnects_at_once(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer
) -> None:
    page, peer = joined
    peer.close(1011)
    for _ in range(4):
        scripted.next().close(1011)
    until(page, "band.status === 'resuming' && seen.at(-1)[1].retryInMs > 2000")
    page.evaluate("globalThis.dispatchEvent(new Event('online'))")
    assert page.evaluate("seen.at(-1)[1].retryInMs") is None
    scripted.next().admit(resumed=True)
    until(page, "band.status === 'online'")


def test_draining_is_waited_out(joined: "tuple[Page, Peer]", scripted: ScriptedServer) -> None:
    page, peer = joined
    peer.send({"type": "server_draining", "reconnectInMs": 1500})
    until(page, "band.status === 'draining'")
    # Still online.
    page.evaluate("void (globalThis.done = band.updateMessage('x'))")
    peer.send(peer.ack(peer.next("update_message")))
    assert evaluate(page, "() => done") == {}
    peer.close(1012)
    until(page, "band.status === 'resuming'")
    wait = page.evaluate("seen.filter(([t]) => t === 'status').at(-1)[1].retryInMs")
    drained = page.evaluate("seen.filter(([t]) => t === 'status').at(-2)[1].status")
    assert (drained, 300 < wait <= 1500) == ("draining", True)
    page.evaluate("globalThis.dispatchEvent(new Event('online'))")
    assert page.evaluate("seen.filter(([t]) => t === 'status').at(-1)[1].retryInMs") == wait
    scripted.next().admit(resumed=True)
    until(page, "band.status === 'online'")


@pytest.mark.parametrize("code", ["conflict", "internal", "rate_limited"])
def test_join_refused_temporarily_is_retried(
    open_page: BrowserPages, scripted: ScriptedServer, code: str
) -> None:
    page = open_band(open_page, scripted.ws_url)
    page.evaluate("void (globalThis.joining = band.join())")
    peer = scripted.next()
    peer.welcome()
    peer.refuse(peer.next("join_session"), code)
    scripted.next().admit()
    assert evaluate(page, "() => joining")["version"] == 1


def test_session_full_at_a_resume_is_retried(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer
) -> None:
    page, peer = joined
    peer.close(1011)
    peer = scripted.next()
    peer.welcome()
    peer.refuse(peer.next("join_session"), "session_full")
    scripted.next().admit(token_number=2)
    until(page, "band.status === 'online'")


def test_other_protocol_version_is_unsupported(
    open_page: BrowserPages, scripted: ScriptedServer
) -> None:
    page = open_band(open_page, scripted.ws_url)
    page.evaluate("void (globalThis.refused = refusal(band.join()))")
    scripted.next().welcome(protocol=2)
    assert evaluate(page, "() => refused")["code"] == "unsupported_protocol"
    assert page.evaluate("band.status") == "closed"


def test_not_joined_error_joins_again(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer
) -> None:
    page, peer = joined
    page.evaluate("void (globalThis.refused = refusal(band.pause()))")
    peer.refuse(peer.next("pause"), "not_joined")
    assert evaluate(page, "() => refused")["code"] in {"not_joined", "connection_lost"}
    assert scripted.next().admit(resumed=True)["resumeToken"] == "t1"
    until(page, "band.status === 'online'")


@pytest.mark.parametrize("nonsense", ["{", "null", "17", '{"type": 5}'])
def test_invalid_message_ends_the_connection(
    joined: "tuple[Page, Peer]", scripted: ScriptedServer, nonsense: str
) -> None:
    page, peer = joined
    peer.send(nonsense)
    scripted.next().admit(resumed=True)
    until(page, "band.status === 'online'")


def test_visible_page_syncs_once(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    page.evaluate(
        """() => {
            for (let i = 0; i < 50; i += 1) document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    request = peer.next("sync_request")
    moved = {**TRANSPORT, "positionMs": 5000.0}
    answer = {"epoch": "first", "positionMs": 5000.0, "tempoBpm": 120.0, "isPlaying": False}
    peer.send(change("sync_response", 1, transport=moved, **answer), peer.ack(request))
    until(page, "band.positionAt() === 5000")
    assert len(peer.all("sync_request")) == 1


@pytest.mark.slow
def test_probes_stay_within_the_rate_limit(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    evaluate(
        page,
        """async () => {
            for (let i = 0; i < 60; i += 1) {
                document.dispatchEvent(new Event("visibilitychange"));
                globalThis.dispatchEvent(new Event("online"));
                await new Promise((resolve) => setTimeout(resolve, 40));
            }
        }""",
    )
    until(page, "band.clock.settled")
    times = [at for at, _ in peer.all("clock_sync")]
    assert len(times) >= 20
    # The token bucket of the server: 20 at once, 20 a second.
    tokens, before = 20.0, times[0]
    for at in times:
        tokens = min(20.0, tokens + (at - before) * 20) - 1
        before = at
        assert tokens >= 0


@pytest.mark.slow
def test_the_error_bound_is_reported(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    report = peer.next("sync_report")
    assert 0 <= report["errorMs"] < math.inf
    until(page, "band.clock.settled")
    peer.next("sync_report")


def test_drift_corrections_and_stats(joined: "tuple[Page, Peer]") -> None:
    page, peer = joined
    stats = {"memberId": "me", "latencyMs": 12.5, "syncErrorMs": None, "quality": "excellent"}
    peer.send({"type": "room_stats", "sessionId": "song", "members": [stats]})
    until(page, "band.stats.size === 1")
    assert page.evaluate("band.stats.get('me')") == stats
    moved = {**TRANSPORT, "positionMs": 700.0}
    peer.send(change("drift_correction", 1, positionMs=700.0, driftMs=30.0, transport=moved))
    until(page, "band.positionAt() === 700")


def test_a_token_can_be_fetched_for_each_connection(
    open_page: BrowserPages, scripted: ScriptedServer
) -> None:
    page = open_band(open_page, scripted.ws_url)
    page.evaluate(
        """(url) => {
            let number = 0;
            const token = async () => `pass${(number += 1)}`;
            globalThis.band = new bandsync.BandSync({ url, sessionId: "song", token });
            void band.join();
        }""",
        scripted.ws_url,
    )
    peer = scripted.next()
    assert peer.admit()["token"] == "pass1"
    peer.close(1011)
    assert scripted.next().admit(resumed=True)["token"] == "pass2"
    until(page, "band.status === 'online'")


def test_closing_while_joining(open_page: BrowserPages, scripted: ScriptedServer) -> None:
    page = open_band(open_page, scripted.ws_url)
    page.evaluate("void (globalThis.refused = refusal(band.join()))")
    scripted.next().welcome()
    page.evaluate("band.close()")
    assert evaluate(page, "() => refused")["code"] == "closed"
    assert evaluate(page, "() => band.leave()") is None
    assert scripted.connections == 1


def test_instants_of_beats_in_javascript(open_page: BrowserPages, scripted: ScriptedServer) -> None:
    page = open_band(open_page, scripted.ws_url)
    found = page.evaluate(
        """() => {
            const { instantOfBeat, beatAt, positionAt, segmentAt } = bandsync;
            const standing = { isPlaying: false, positionMs: 0, anchorTime: 0, tempoBpm: 60,
                beat: 0, beatsPerBar: 4, next: null };
            const start = { ...standing, isPlaying: true, anchorTime: 5000 };
            const soon = { ...standing, next: start };
            const quick = { ...start, anchorTime: 8000, beat: 3, tempoBpm: 120 };
            const faster = { ...start, next: quick };
            const back = { ...start, next: { ...start, anchorTime: 8000, beat: 0 } };
            return [
                instantOfBeat(standing, 1, 0),
                instantOfBeat(soon, 1, 0),
                instantOfBeat(soon, 0, 0),
                instantOfBeat(soon, 0, 5000.5),
                instantOfBeat(faster, 2, 0),
                instantOfBeat(faster, 3, 0),
                instantOfBeat(faster, 5, 0),
                instantOfBeat(back, 1, 7000),
                [beatAt(soon, 4000), beatAt(soon, 6500), beatAt(faster, 9000)],
                [positionAt(soon, 4999), positionAt(soon, 6000), positionAt(start, 1e9)],
                segmentAt(faster, 8000).tempoBpm,
            ];
        }"""
    )
    assert found == [
        None,
        6000,
        5000,
        None,
        7000,
        8000,
        9000,
        9000,
        [0, 1.5, 5],
        [0, 1000, 86_400_000],
        120,
    ]
