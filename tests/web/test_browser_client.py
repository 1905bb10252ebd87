"""`bandsync/web/client/bandsync.js` in a browser, with real servers and a real network between."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jwt
import pytest

from scripts.testbed.browsers import BrowserPages, evaluate
from scripts.testbed.network import Network
from scripts.testbed.redis_server import RedisServer
from scripts.testbed.server_process import ServerProcess
from tests.support.browser_band import JOIN, ORIGIN, details, join, open_band, statuses, until

if TYPE_CHECKING:
    from playwright.sync_api import Page

Start = Callable[..., ServerProcess]
Connect = Callable[[int], Network]


@pytest.fixture
def server(start_process: Start) -> ServerProcess:
    return start_process(ALLOWED_ORIGINS=ORIGIN)


def test_a_band_plays(open_page: BrowserPages, server: ServerProcess) -> None:
    ada = open_band(open_page, server.ws_url, displayName="Ada")
    assert ada.evaluate("[band.status, band.session, band.memberId, band.beatAt()]") == [
        "idle",
        None,
        None,
        None,
    ]
    snapshot = evaluate(ada, JOIN)
    assert snapshot["you"]["role"] == "leader"
    assert ada.evaluate("[band.status, band.isLeader, band.me.displayName]") == [
        "online",
        True,
        "Ada",
    ]
    bob = join(open_page, server.ws_url, displayName="Bob")
    until(ada, "band.session.members.size === 2")
    assert bob.evaluate("[band.isLeader, band.leader.displayName]") == [False, "Ada"]
    assert bob.evaluate("[...band.session.members.values()].map((m) => m.displayName)") == [
        "Ada",
        "Bob",
    ]

    # The sender's state contains an acknowledged command.
    after = evaluate(
        ada,
        """async () => {
            const { version } = await band.setTempo(96, { beatsPerBar: 3 });
            return [version === band.session.version, band.transportAt().tempoBpm];
        }""",
    )
    assert after == [True, 96]
    evaluate(ada, "() => band.play({ positionMs: 10_000, startInMs: 0 })")
    evaluate(ada, "() => band.updateMessage('Bridge!')")
    evaluate(bob, "() => band.chat('<b>here</b>')")
    until(bob, "band.transportAt().isPlaying && band.session.message === 'Bridge!'")
    until(ada, "band.session.chat.length === 1")
    assert ada.evaluate("band.session.chat[0].text") == "<b>here</b>"
    until(bob, "band.beatAt() > 16 && band.positionAt() > 10_000")
    assert bob.evaluate("band.transportAt().beatsPerBar") == 3
    assert bob.evaluate(
        """(() => {
            const beat = Math.ceil(band.beatAt());
            const { instantOfBeat, beatAt } = bandsync;
            const { transport } = band.session;
            const instant = instantOfBeat(transport, beat, band.clock.now());
            return Math.abs(beatAt(transport, instant) - beat) < 1e-6;
        })()"""
    )
    evaluate(ada, "() => band.pause()")
    until(bob, "!band.transportAt().isPlaying")
    evaluate(ada, "() => band.seek(0)")
    until(bob, "band.positionAt() === 0")
    evaluate(ada, "() => band.stop()")
    assert ada.evaluate("changes") > 3


def test_lead_is_requested_denied_and_handed_over(
    open_page: BrowserPages, server: ServerProcess
) -> None:
    ada = join(open_page, server.ws_url, displayName="Ada")
    bob = join(open_page, server.ws_url, displayName="Bob")
    refused = evaluate(bob, "() => refusal(band.play())")
    assert (refused["name"], refused["code"]) == ("BandSyncError", "not_leader")
    assert evaluate(bob, "() => refusal(band.takeLead())")["code"] == "leader_present"
    evaluate(bob, "() => band.requestLeader()")
    until(ada, "seen.some(([type]) => type === 'leader_requested')")
    bob_id = bob.evaluate("band.memberId")
    assert details(ada, "leader_requested")[0]["memberId"] == bob_id
    evaluate(ada, "(id) => band.denyLeader(id)", bob_id)
    until(bob, "seen.some(([type]) => type === 'leader_denied')")
    evaluate(ada, "(id) => band.handOver(id)", bob_id)
    assert ada.evaluate("[band.isLeader, band.me.role, band.leader.displayName]") == [
        False,
        "follower",
        "Bob",
    ]
    until(bob, "band.isLeader")
    evaluate(bob, "() => band.stepDown()")
    until(ada, "band.isLeader")
    until(bob, "band.session.members.get(band.session.leaderId).role === 'leader'")
    assert bob.evaluate("band.leader.displayName") == "Ada"


@pytest.mark.slow
def test_positions_from_the_devices(open_page: BrowserPages, server: ServerProcess) -> None:
    ada = join(open_page, server.ws_url)
    bob = join(open_page, server.ws_url)
    evaluate(ada, "() => band.play({ startInMs: 0 })")
    evaluate(ada, "() => band.positionSync(band.positionAt() + 5000)")
    until(bob, "band.positionAt() > 5000")
    heard = evaluate(
        bob,
        """() => new Promise((resolve) => {
            band.addEventListener("drift_correction", ({ detail }) => resolve(detail));
            band.positionSync(band.positionAt() + 1000);
        })""",
    )
    assert 900 < heard["driftMs"] < 1100


def test_refusals_of_the_server_and_of_the_client(
    open_page: BrowserPages, server: ServerProcess
) -> None:
    page = open_band(open_page, server.ws_url)
    assert evaluate(page, "() => refusal(band.play())")["code"] == "not_connected"
    evaluate(page, JOIN)
    refused = evaluate(page, "() => refusal(band.setTempo(500))")
    assert (refused["code"], refused["context"]) == ("invalid_field", {"field": "tempoBpm"})
    refused = evaluate(page, "() => refusal(band.chat('x'.repeat(20_000)))")
    assert refused["code"] == "message_too_large"
    codes = evaluate(
        page,
        """async () => {
            const many = Array.from({ length: 300 }, () => refusal(band.requestLeader()));
            return (await Promise.all(many)).map((each) => each?.code ?? "ok");
        }""",
    )
    assert {"rate_limited"} <= set(codes) <= {"rate_limited", "ok"}
    assert page.evaluate("band.status") == "online"


@pytest.mark.slow
def test_leaving_and_closing(open_page: BrowserPages, server: ServerProcess) -> None:
    ada = join(open_page, server.ws_url)
    bob = join(open_page, server.ws_url)
    token, bob_id = bob.evaluate("[band.resumeToken, band.memberId]")
    bob.evaluate("band.close()")
    until(ada, f"band.session.members.get('{bob_id}').connected === false")
    assert bob.evaluate("[band.status, band.closeReason, band.session !== null]") == [
        "closed",
        None,
        True,
    ]
    # The same object resumes, and so does another one with the token.
    evaluate(bob, JOIN)
    assert details(bob, "joined")[-1]["resumed"] is True
    assert bob.evaluate("band.memberId") == bob_id
    assert bob.evaluate("band.resumeToken") != token
    token = bob.evaluate("band.resumeToken")
    bob.evaluate("band.close()")
    again = join(open_page, server.ws_url, resumeToken=token)
    assert again.evaluate("band.memberId") == bob_id
    evaluate(again, "() => band.leave()")
    until(ada, "band.session.members.size === 1")
    assert details(ada, "user_left")[-1]["reason"] == "left"
    assert again.evaluate("[band.status, band.session, band.memberId, band.resumeToken]") == [
        "closed",
        None,
        None,
        None,
    ]


@pytest.mark.slow
def test_resume_elsewhere_supersedes_the_page(
    open_page: BrowserPages, server: ServerProcess
) -> None:
    here = join(open_page, server.ws_url)
    there = join(open_page, server.ws_url, resumeToken=here.evaluate("band.resumeToken"))
    until(here, "band.status === 'closed'")
    assert here.evaluate("[band.closeReason.code, band.closeReason.closeCode]") == [
        "superseded",
        4001,
    ]
    assert there.evaluate("band.status") == "online"
    assert evaluate(here, "() => refusal(band.play())")["code"] == "not_connected"


@pytest.mark.slow
def test_permanent_refusals_close_the_page_client(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process(ALLOWED_ORIGINS=ORIGIN, JOIN_SECRET="s" * 32, MAX_MEMBERS="1")
    page = open_band(open_page, server.ws_url)
    assert evaluate(page, "() => refusal(band.join())")["code"] == "unauthorized"
    assert page.evaluate("[band.status, band.closeReason.code]") == ["closed", "unauthorized"]
    claims = {"sub": "ada", "session": "song", "exp": int(time.time()) + 3600}  # noqa: TID251
    token = jwt.encode(claims, "s" * 32, algorithm="HS256")
    join(open_page, server.ws_url, token=token)
    other = open_band(open_page, server.ws_url, token=token)
    assert evaluate(other, "() => refusal(band.join())")["code"] == "session_full"
    nameless = open_band(open_page, server.ws_url, sessionId="no such/name")
    refused = evaluate(nameless, "() => refusal(band.join())")
    assert (refused["code"], refused["context"]) == ("invalid_field", {"field": "sessionId"})
    nowhere = open_band(open_page, "gopher://127.0.0.1")
    assert evaluate(nowhere, "() => refusal(band.join())")["code"] == "invalid_url"


def test_ids_that_look_like_paths(open_page: BrowserPages, server: ServerProcess) -> None:
    page = join(open_page, server.ws_url, sessionId="..")
    assert page.evaluate("band.session.sessionId") == ".."


# --- The network ---


def assert_resumed(page: "Page", member_id: str) -> None:
    """It is online as the member that it was, and nobody had to do anything."""
    until(page, "band.status === 'online' && seen.filter(([t]) => t === 'joined').length === 2")
    assert details(page, "joined")[-1]["resumed"] is True
    assert page.evaluate("band.memberId") == member_id
    assert statuses(page) == ["connecting", "online", "resuming", "online"]


def test_page_resumes_after_a_cut_network(
    open_page: BrowserPages, server: ServerProcess, network_to: Connect
) -> None:
    network = network_to(server.port)
    ada = join(open_page, network.ws_url)
    bob = join(open_page, server.ws_url)
    member_id, token = ada.evaluate("[band.memberId, band.resumeToken]")
    evaluate(ada, "() => band.play({ startInMs: 0 })")
    network.cut()
    until(ada, "band.status === 'resuming'")
    # The beat goes on, the commands do not.
    before = ada.evaluate("band.beatAt()")
    until(ada, f"band.beatAt() > {before} + 0.5")
    assert evaluate(ada, "() => refusal(band.pause())")["code"] == "not_connected"
    # Changes during the cut are not lost.
    evaluate(bob, "() => band.chat('where is Ada?')")
    network.heal()
    assert_resumed(ada, member_id)
    assert ada.evaluate("band.session.chat[0].text") == "where is Ada?"
    assert ada.evaluate("band.isLeader && band.resumeToken") != token
    assert ada.evaluate("band.isLeader") is True


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_silence_is_noticed_within_the_grace(
    open_page: BrowserPages, server: ServerProcess, network_to: Connect, direction: str
) -> None:
    network = network_to(server.port)
    page = join(open_page, network.ws_url)
    member_id = page.evaluate("band.memberId")
    network.black_hole(*([] if direction == "both" else [direction]))
    until(page, "band.status === 'resuming'")
    network.heal()
    assert_resumed(page, member_id)


@pytest.mark.slow
def test_command_in_flight_at_a_loss_is_connection_lost(
    open_page: BrowserPages, server: ServerProcess, network_to: Connect
) -> None:
    network = network_to(server.port)
    page = join(open_page, network.ws_url)
    other = join(open_page, server.ws_url)
    network.black_hole("down")
    page.evaluate("void (globalThis.asked = refusal(band.setTempo(99)))")
    until(other, "band.transportAt().tempoBpm === 99")
    network.cut()
    assert evaluate(page, "() => asked")["code"] == "connection_lost"
    network.heal()
    until(page, "band.status === 'online'")
    # It had happened.
    assert page.evaluate("band.transportAt().tempoBpm") == 99


@pytest.mark.slow
def test_offline_device_retries_until_online(
    open_page: BrowserPages, server: ServerProcess
) -> None:
    page = join(open_page, server.ws_url)
    member_id = page.evaluate("band.memberId")
    page.context.set_offline(True)
    page.evaluate("band.close(); void band.join()")
    until(page, "band.status === 'resuming' && seen.at(-1)[1].attempts >= 2")
    page.context.set_offline(False)
    until(page, "band.status === 'online'")
    assert page.evaluate("band.memberId") == member_id


@pytest.mark.slow
def test_slow_network_is_not_a_loss(
    open_page: BrowserPages, server: ServerProcess, network_to: Connect
) -> None:
    network = network_to(server.port)
    network.delay((600, 1200), (600, 1200))
    page = join(open_page, network.ws_url)
    until(page, "band.clock.settled")
    page.evaluate("globalThis.dispatchEvent(new Event('online'))")
    evaluate(page, "() => band.setTempo(100)")
    assert statuses(page) == ["connecting", "online"]


# --- The server ---


@pytest.mark.slow
def test_page_resumes_after_a_server_kill(
    open_page: BrowserPages, start_process: Start, redis_server: RedisServer
) -> None:
    server = start_process(
        ALLOWED_ORIGINS=ORIGIN, REDIS_ENABLED="true", REDIS_URL=redis_server.url()
    )
    page = join(open_page, server.ws_url)
    member_id = page.evaluate("band.memberId")
    evaluate(page, "() => band.setTempo(77)")
    server.restart()
    assert_resumed(page, member_id)
    assert page.evaluate("band.transportAt().tempoBpm") == 77


def test_page_joins_a_server_without_its_session_anew(
    open_page: BrowserPages, server: ServerProcess
) -> None:
    page = join(open_page, server.ws_url)
    member_id, epoch = page.evaluate("[band.memberId, band.session.epoch]")
    evaluate(page, "() => band.setTempo(77)")
    server.restart()
    until(page, "band.status === 'online' && band.memberId !== '" + member_id + "'")
    assert details(page, "joined")[-1]["resumed"] is False
    assert page.evaluate("[band.session.epoch, band.transportAt().tempoBpm]") != [epoch, 77]
    # A new epoch starts over; its versions are not compared with the old ones.
    assert page.evaluate("band.session.version") == 1
    evaluate(page, "() => band.setTempo(88)")
    assert page.evaluate("band.transportAt().tempoBpm") == 88


def test_page_resumes_after_a_drain(
    open_page: BrowserPages, start_process: Start, redis_server: RedisServer
) -> None:
    server = start_process(
        ALLOWED_ORIGINS=ORIGIN, REDIS_ENABLED="true", REDIS_URL=redis_server.url()
    )
    page = join(open_page, server.ws_url)
    member_id = page.evaluate("band.memberId")
    server.stop()
    server.start()
    until(page, "band.status === 'online' && seen.filter(([t]) => t === 'joined').length === 2")
    assert page.evaluate("band.memberId") == member_id
    assert statuses(page) == ["connecting", "online", "draining", "resuming", "online"]


@pytest.mark.slow
def test_page_leaves_a_server_that_hangs(
    open_page: BrowserPages, start_process: Start, redis_server: RedisServer
) -> None:
    """One that hangs is left as a dead network is; the one behind the same address takes over."""
    server = start_process(
        ALLOWED_ORIGINS=ORIGIN, REDIS_ENABLED="true", REDIS_URL=redis_server.url()
    )
    page = join(open_page, server.ws_url)
    member_id = page.evaluate("band.memberId")
    server.freeze()
    until(page, "band.status === 'resuming'")
    server.thaw()
    assert_resumed(page, member_id)


@pytest.mark.slow
def test_storage_lost_and_back(
    open_page: BrowserPages, start_process: Start, redis_server: RedisServer
) -> None:
    server = start_process(
        ALLOWED_ORIGINS=ORIGIN, REDIS_ENABLED="true", REDIS_URL=redis_server.url()
    )
    page = join(open_page, server.ws_url)
    assert page.evaluate("band.storage") == {
        "storageType": "redis",
        "degraded": None,
        "reason": None,
    }
    redis_server.kill()
    until(page, "band.storage.degraded === true")
    assert page.evaluate("band.storage.storageType") == "memory"
    evaluate(page, "() => band.setTempo(91)")
    redis_server.start()
    until(page, "band.storage.degraded === false")
    assert page.evaluate("[band.storage.storageType, band.transportAt().tempoBpm]") == [
        "redis",
        91,
    ]
    until(page, "band.clock.settled")
