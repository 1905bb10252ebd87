"""The client on whole servers of this process."""

import ssl

import jwt
import pytest
import trio
import trustme

from bandsync import client
from bandsync.client import Band, CommandRefused, JoinRefused, NotConnected, Superseded, Unreachable
from bandsync.client.server_address import address_of
from bandsync.wire.commands import Heartbeat, Play
from bandsync.wire.messages import (
    ChatSent,
    DriftCorrection,
    LeaderDenied,
    LeaderRequested,
    Outgoing,
    Played,
    RoleChanged,
    RoomStats,
    ScrollTick,
    Snapshot,
    TempoChanged,
    UserJoined,
    UserLeft,
)
from scripts.testbed.redis_server import RedisServer, free_port
from tests.support.servers import PATIENCE_S, Message, Server, band, musician, start_server

pytestmark = pytest.mark.usefixtures("_not_for_ever")


@pytest.fixture
async def _not_for_ever(nursery: trio.Nursery) -> None:
    """A wait that is forgotten ends the test, with a traceback of where it was."""
    nursery.cancel_scope.deadline = trio.current_time() + 4 * PATIENCE_S


def url(server: Server) -> str:
    return f"ws://127.0.0.1:{server.port}"


async def heard(events: client.EventStream, kind: type, **fields: object) -> Outgoing:
    """The next event of this kind with these fields."""
    with trio.fail_after(PATIENCE_S):
        async for event in events:
            if isinstance(event, kind) and all(getattr(event, n) == v for n, v in fields.items()):
                return event
    raise AssertionError(f"the events ended without {kind}")


async def test_client_joins_members_on_another_library(server: Server) -> None:
    async with band(server, "Bob") as (bob,):
        async with client.connect(url(server), "song", display_name="Ann") as ann:
            events = ann.events()
            assert ann.status == "online"
            assert [m.display_name for m in ann.session.members.values()] == ["Bob", "Ann"]
            assert ann.me is not None
            assert (ann.me.display_name, ann.is_leader) == ("Ann", False)
            assert ann.leader is not None
            assert ann.leader.display_name == "Bob"
            assert ann.server.server_id == "stage"
            await bob.ok("set_tempo", tempoBpm=96)
            changed = await heard(events, TempoChanged)
            assert isinstance(changed, TempoChanged)
            assert (changed.old_tempo_bpm, changed.new_tempo_bpm) == (120, 96)
            assert ann.transport_at().tempo_bpm == 96
            version = await ann.chat("Hello")
            assert (await bob.next("chat_message"))["version"] == version
        left = await bob.next("user_left")
        assert (left["memberId"], left["reason"]) == (ann.member_id, "left")


async def test_leader_commands_return_the_version_they_caused(server: Server) -> None:
    async with client.connect(url(server), "song") as ann, musician(server) as bob:
        bob_id = (await bob.join())["you"]["memberId"]
        assert ann.is_leader
        transport = ann.session.transport
        # The version of an answer is in the view when the command returns, without a wait.
        for number, command in enumerate(
            (
                lambda: ann.set_tempo(90, beats_per_bar=3),
                lambda: ann.seek(30_000),
                lambda: ann.play(position_ms=1000, start_in_ms=0),
                lambda: ann.set_tempo(180, at="bar"),
                ann.pause,
                lambda: ann.position_sync(500, ann.clock.now()),
                ann.stop,
                lambda: ann.update_message("Da capo"),
                lambda: ann.chat("?"),
            ),
            3,
        ):
            assert await command() == number
            assert ann.session.version == number
            assert (ann.session.transport != transport) == (number <= 9)
            transport = ann.session.transport
        assert ann.session.message == "Da capo"
        assert [chat.text for chat in ann.session.chat] == ["?"]
        await bob.ok("request_leader")
        await ann.deny_leader(bob_id)
        await bob.next("leader_denied")
        assert await ann.hand_over(bob_id) == 13
        assert not ann.is_leader
        with pytest.raises(CommandRefused) as refused:
            await ann.take_lead()
        assert refused.value.code == "leader_present"
        events = ann.events()
        await bob.ok("set_role", role="leader", memberId=ann.member_id)
        await heard(events, RoleChanged, member_id=ann.member_id, role="leader")
        assert await ann.step_down() == 17
        assert await ann.command(Heartbeat()) is None


async def test_refusal_has_code_message_and_context(server: Server) -> None:
    async with client.connect(url(server), "song") as ann:
        with pytest.raises(CommandRefused) as refused:
            await ann.command(Play(count_in_beats=33))
        assert refused.value.code == "invalid_field"
        assert refused.value.context == {"field": "countInBeats"}
        assert "32" in refused.value.message
        assert ann.session.version == 1


async def test_follower_receives_messages_addressed_to_it(server: Server) -> None:
    async with (
        client.connect(url(server), "song", display_name="Ann") as ann,
        client.connect(url(server), "song", display_name="Bob") as bob,
    ):
        of_ann, of_bob = ann.events(), bob.events()
        await bob.request_leader()
        asked = await heard(of_ann, LeaderRequested, member_id=bob.member_id)
        assert isinstance(asked, LeaderRequested)
        await ann.deny_leader(asked.member_id)
        await heard(of_bob, LeaderDenied)
        await ann.play(start_in_ms=0)
        await heard(of_bob, Played)
        assert await bob.position_sync(50_000, bob.clock.now()) is None
        drift = await heard(of_bob, DriftCorrection)
        assert isinstance(drift, DriftCorrection)
        assert drift.drift_ms == pytest.approx(bob.position_at() * -1 + 50_000, abs=500)


async def test_position_and_beat_agree_between_clients(server: Server) -> None:
    async with (
        client.connect(url(server), "song") as ann,
        client.connect(url(server), "song") as bob,
    ):
        of_bob = bob.events()
        await ann.play(count_in_beats=4)
        await heard(of_bob, Played)
        start = ann.instant_of_beat(0.0)
        assert start is not None
        assert start == bob.instant_of_beat(0.0)
        assert bob.beat_at(start + 1000) == pytest.approx(2.0)
        assert bob.position_at(start + 1000) == pytest.approx(1000)
        await trio.sleep_until(bob.clock.to_local(start))
        assert bob.clock.error_ms is not None
        assert bob.clock.now() >= start - 1e-3
        assert bob.instant_of_beat(-4.0) is None
        before = bob.beat_at()
        await trio.sleep(0.05)
        assert bob.beat_at() > before


async def test_clock_error_bound_holds(server: Server) -> None:
    async with client.connect(url(server), "song") as ann, musician(server) as bob:
        # Known as soon as we are in.
        assert ann.clock.samples >= 1
        while ann.clock.samples < 20:
            error = ann.clock.error_ms
            assert error is not None
            # The true offset, by another exchange: exact within one process.
            await bob.send("clock_sync", t0=trio.current_time() * 1000)
            reply = await bob.next("clock_sync")
            least, most = reply["t2"] - trio.current_time() * 1000, reply["t1"] - reply["t0"]
            assert ann.clock.offset_ms is not None
            assert least - error <= ann.clock.offset_ms <= most + error
            await trio.sleep(0.05)


async def test_ticks_are_sent_only_on_request(server: Server) -> None:
    async with (
        client.connect(url(server), "song", ticks=True) as ann,
        client.connect(url(server), "song") as bob,
    ):
        of_ann, of_bob = ann.events(), bob.events()
        await ann.play(start_in_ms=0)
        for _ in range(3):
            await heard(of_ann, ScrollTick)
        await ann.chat("enough")
        async for event in of_bob:
            assert not isinstance(event, ScrollTick)
            if isinstance(event, ChatSent):
                break


async def test_closing_keeps_the_place_for_the_resume_token(server: Server) -> None:
    async with band(server, "Bob") as (bob,):
        async with client.connect(url(server), "song") as ann:
            token, member_id = ann.resume_token, ann.member_id
            await ann.close()
            assert ann.status == "closed"
            with pytest.raises(NotConnected):
                await ann.chat("x")
            with pytest.raises(NotConnected):
                await ann.until_online()
        await bob.next("member_connection", connected=False)
        async with client.connect(url(server), "song", resume_token=token) as again:
            assert again.you.resumed
            assert again.member_id == member_id
        assert (await bob.next("user_left"))["reason"] == "left"


async def test_events_end_with_the_client(server: Server) -> None:
    async with client.connect(url(server), "song") as ann:
        before = ann.events()
        await ann.chat("bye")
        await ann.leave()
        seen = [event async for event in before]
        assert isinstance(seen[0], ChatSent | RoomStats)
        assert isinstance(seen[-1], client.StatusChanged)
        assert seen[-1].status == "closed"
        assert [event async for event in ann.events()] == []
    assert ann.session.message == ""


@pytest.mark.parametrize("how", ["error", "cancel", "group"])
async def test_every_exit_of_the_block_leaves(server: Server, how: str) -> None:
    async with band(server, "Bob") as (bob,):
        try:
            with trio.CancelScope() as scope:
                async with client.connect(url(server), "song"):
                    if how == "error":
                        raise KeyError("ours")
                    if how == "group":
                        raise ExceptionGroup("ours", [KeyError("a"), ValueError("b")])
                    scope.cancel()
                    await trio.sleep_forever()
        except KeyError as error:
            assert error.args == ("ours",)
            assert error.__context__ is None
        except ExceptionGroup as group:
            assert group.message == "ours"
        else:
            assert scope.cancelled_caught
        left = await bob.next("user_left")
        assert left["reason"] == "left"


async def test_cancelled_command_leaves_the_client_usable(server: Server) -> None:
    async with client.connect(url(server), "song") as ann:
        for _ in range(20):
            with trio.CancelScope() as scope:
                scope.cancel()
                await ann.chat("never mind")
        assert await ann.chat("done") is not None
        assert ann.session.chat[-1].text == "done"


async def test_resume_elsewhere_supersedes_the_client(server: Server) -> None:
    with pytest.raises(Superseded):
        async with client.connect(url(server), "song") as first, musician(server) as second:
            assert (await second.join(resumeToken=first.resume_token))["you"]["resumed"]
            await trio.sleep_forever()
    assert first.status == "closed"


async def test_command_in_flight_does_not_hide_superseded(server: Server) -> None:
    async def chatter(ann: Band) -> None:
        while True:
            try:
                await ann.chat("x")
            except CommandRefused as refused:
                # Bound elsewhere already; the close is on its way.
                assert refused.code == "not_joined"

    with pytest.raises(Superseded):
        async with client.connect(url(server), "song") as ann, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(chatter, ann)
            async with musician(server) as second:
                await second.join(resumeToken=ann.resume_token)
                await trio.sleep_forever()


async def test_full_session_refuses_the_client(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, max_members=1)
    async with client.connect(url(server), "song"):
        with pytest.raises(JoinRefused) as refused:
            async with client.connect(url(server), "song"):
                raise AssertionError("nobody is in")
        assert refused.value.code == "session_full"
    await server.stop()


async def test_join_tokens(nursery: trio.Nursery) -> None:
    secret = "a secret of thirty-two characters"
    server = await start_server(nursery, join_secret=secret)
    with pytest.raises(JoinRefused) as refused:
        async with client.connect(url(server), "song", token="x"):
            raise AssertionError("nobody is in")
    assert refused.value.code == "unauthorized"
    token = jwt.encode({"sub": "u1", "session": "song", "exp": 4e9, "name": "Ann"}, secret)
    async with client.connect(url(server), "song", token=token) as ann:
        assert ann.me is not None
        assert ann.me.display_name == "Ann"
    await server.stop()


@pytest.mark.parametrize(
    ("address", "session"),
    [
        ("http://localhost", "song"),
        ("ws://", "song"),
        ("ws://localhost?x=1", "song"),
        ("localhost:3001", "song"),
        ("ws://localhost:99999", "song"),
        ("ws://localhost:0", "song"),
        ("ws://ann:secret@localhost", "song"),
        ("ws://local host", "song"),
        ("ws://local..host", "song"),
        ("ws://" + 64 * "a", "song"),
        ("ws://localhost", "no good"),
        ("ws://localhost", ""),
    ],
)
async def test_invalid_addresses_raise_at_once(address: str, session: str) -> None:
    with pytest.raises(ValueError, match=r"address|session id|[Pp]ort") as wrong:
        async with client.connect(address, session):
            raise AssertionError("nobody is in")
    assert "secret" not in str(wrong.value)
    with pytest.raises(ValueError, match="wss"):
        async with client.connect("ws://x", "song", ssl_context=ssl.create_default_context()):
            raise AssertionError("nobody is in")


@pytest.mark.parametrize(
    ("address", "host", "path"),
    [
        ("ws://Localhost:80/", "localhost", "/ws/song"),
        ("wss://localhost:80/band/", "localhost:80", "/band/ws/song"),
        ("ws://[::1]:3001", "[::1]:3001", "/ws/song"),
        (
            "ws://b\xfccher.example:81/p\xe4 th/%20",
            "xn--bcher-kva.example:81",
            "/p%C3%A4%20th/%20/ws/song",
        ),
    ],
)
async def test_addresses_are_encoded(address: str, host: str, path: str) -> None:
    found = address_of(address, "song")
    assert (found.host, found.path) == (host, path)


async def test_trust_store_is_loaded_once(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or create())
    port = free_port()
    with pytest.raises(Unreachable):
        # Several attempts.
        async with client.connect(f"wss://127.0.0.1:{port}", "song", join_within=1):
            raise AssertionError("nobody is in")
    assert made == [1]


async def test_unreachable_server_raises() -> None:
    port = free_port()
    with pytest.raises(Unreachable, match="refused") as unreachable:
        async with client.connect(f"ws://127.0.0.1:{port}", "song", join_within=0.5):
            raise AssertionError("nobody is in")
    assert isinstance(unreachable.value.__cause__, OSError)


async def test_tls(nursery: trio.Nursery, tmp_path: object) -> None:
    authority = trustme.CA()
    cert = authority.issue_cert("127.0.0.1")
    chain, key = f"{tmp_path}/cert.pem", f"{tmp_path}/key.pem"
    for number, blob in enumerate(cert.cert_chain_pems):
        blob.write_to_path(chain, append=number > 0)
    cert.private_key_pem.write_to_path(key)
    server = await start_server(nursery, tls_cert=chain, tls_key=key)
    address = f"wss://127.0.0.1:{server.port}"
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with client.connect(address, "song", ssl_context=context) as ann:
        await ann.chat("in private")
    # One that is not trusted is a matter for a person, at once.
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        async with client.connect(address, "song", join_within=float("inf")):
            raise AssertionError("nobody is in")
    await server.stop()


async def test_tap_receives_every_message(server: Server) -> None:
    texts: list[tuple[float, str]] = []
    async with client.connect(
        url(server), "song", tap=lambda at, text: texts.append((at, text))
    ) as ann:
        await ann.chat("x")
    kinds = [text.split('"')[3] for _, text in texts]
    assert kinds[0] == "welcome"
    assert {"snapshot", "ack", "clock_sync", "chat_message"} <= set(kinds)
    assert [at for at, _ in texts] == sorted(at for at, _ in texts)


async def test_two_servers_one_redis(nursery: trio.Nursery, shared_redis: RedisServer) -> None:
    redis: Message = {"redis_enabled": True, "redis_url": shared_redis.url()}
    one = await start_server(nursery, server_id="one", **redis)
    two = await start_server(nursery, server_id="two", **redis)
    async with (
        client.connect(url(one), "song", display_name="Ann") as ann,
        client.connect(url(two), "song", display_name="Bob") as bob,
    ):
        of_bob = bob.events()
        version = await ann.play(start_in_ms=500)
        played = await heard(of_bob, Played, version=version)
        assert isinstance(played, Played)
        assert bob.session.transport == ann.session.transport
        instant = played.server_time + 2000
        assert bob.beat_at(instant) == ann.beat_at(instant)
    # Elsewhere, with the token: the same place.
    with pytest.raises(Superseded):
        async with (
            client.connect(url(one), "other") as ann,
            client.connect(url(two), "other", resume_token=ann.resume_token) as again,
        ):
            assert again.you.resumed
            assert again.is_leader
            await trio.sleep_forever()
    await one.stop()
    await two.stop()


async def test_members_come_and_go(server: Server) -> None:
    async with client.connect(url(server), "song", display_name="Ann") as ann:
        events = ann.events()
        async with client.connect(url(server), "song", display_name="Bob", role="leader") as bob:
            joined = await heard(events, UserJoined)
            assert isinstance(joined, UserJoined)
            assert joined.member.display_name == "Bob"
            assert joined.member.role == "follower"
            await ann.hand_over(bob.member_id)
        await heard(events, UserLeft, member_id=bob.member_id)
        await heard(events, RoleChanged, member_id=ann.member_id, role="leader")
        assert ann.is_leader
        assert list(ann.session.members) == [ann.member_id]


async def test_only_later_snapshots_are_events(server: Server) -> None:
    async with client.connect(url(server), "song") as ann:
        events = ann.events()
        await ann.leave()
        assert not any([isinstance(event, Snapshot) async for event in events])
