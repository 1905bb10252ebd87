"""The client behind a network that breaks, and before servers that go away. Real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from bandsync import client
from bandsync.client import (
    Band,
    ConnectionLost,
    EventStream,
    JoinRefused,
    NotConnected,
    StatusChanged,
    Unreachable,
)
from bandsync.wire.messages import ServerDraining, Snapshot
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import RedisServer, free_port
from tests.support.servers import PATIENCE_S, Server, musician, start_server


@pytest.fixture
async def proxy(server: Server, nursery: trio.Nursery) -> AsyncIterator[FaultProxy]:
    started: FaultProxy = await nursery.start(FaultProxy(server.port).run)
    yield started
    started.heal()


@asynccontextmanager
async def joined(port: int, **options: object) -> AsyncIterator[Band]:
    with trio.fail_after(2 * PATIENCE_S):
        async with client.connect(f"ws://127.0.0.1:{port}", "song", **options) as band:  # type: ignore[arg-type]
            yield band


async def status(events: EventStream, *wanted: client.Status) -> StatusChanged:
    with trio.fail_after(PATIENCE_S):
        async for event in events:
            if isinstance(event, StatusChanged) and event.status in wanted:
                return event
    raise AssertionError(f"the events ended without {wanted}")


@pytest.mark.parametrize("how", ["reset", "half_close"])
async def test_client_resumes_after_a_cut(server: Server, proxy: FaultProxy, how: str) -> None:
    async with joined(proxy.port) as ann, musician(server) as bob:
        member_id, token = ann.member_id, ann.resume_token
        await bob.join()
        events = ann.events()
        await ann.play(start_in_ms=0)
        anchor = ann.session.transport
        getattr(proxy, how)()
        proxy.refuse()
        resuming = await status(events, "resuming")
        assert resuming.retry_in_s is not None
        assert ann.status == "resuming"
        with pytest.raises(NotConnected):
            await ann.pause()
        # The state stays, and the song goes on.
        beat = ann.beat_at()
        await trio.sleep(0.05)
        assert ann.beat_at() > beat
        await bob.next("member_connection", connected=False)
        await bob.ok("chat_message", text="where is she?")
        while (await status(events, "resuming")).failures < 2:
            pass
        proxy.heal()
        await ann.until_online()
        assert ann.you.resumed
        assert (ann.member_id, ann.is_leader) == (member_id, True)
        assert ann.resume_token != token
        # The snapshot contains the missed messages.
        assert [chat.text for chat in ann.session.chat] == ["where is she?"]
        assert ann.session.transport == anchor
        assert await ann.pause() is not None
        await bob.next("pause")


async def test_the_snapshot_of_a_resume_is_an_event(proxy: FaultProxy) -> None:
    async with joined(proxy.port) as ann:
        events = ann.events()
        proxy.reset()
        with trio.fail_after(PATIENCE_S):
            async for event in events:
                if isinstance(event, Snapshot):
                    assert event.you == ann.you
                    break


async def test_unanswered_command_is_connection_lost_and_may_have_happened(
    server: Server, proxy: FaultProxy
) -> None:
    async with joined(proxy.port) as ann:
        events = ann.events()
        proxy.black_hole("down")

        async def cut() -> None:
            async with musician(server) as bob:
                await bob.join()
                # It has happened, and nobody tells her.
                await bob.until(lambda: any(m.get("text") or m.get("chat") for m in bob.inbox))
                proxy.reset()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(ConnectionLost):
                await ann.chat("did it?")
        proxy.heal()
        await status(events, "online")
        assert [chat.text for chat in ann.session.chat] == ["did it?"]


async def test_client_gives_up_after_its_limit(proxy: FaultProxy) -> None:
    with pytest.raises(Unreachable):
        async with joined(proxy.port, give_up_after=0.8):
            proxy.refuse()
            proxy.reset()
            await trio.sleep_forever()


async def test_leaving_without_a_connection(server: Server, proxy: FaultProxy) -> None:
    async with joined(proxy.port) as ann:
        proxy.refuse()
        proxy.reset()
        await status(ann.events(), "resuming")
    assert ann.status == "closed"


async def test_client_resumes_after_a_server_restart(
    nursery: trio.Nursery, shared_redis: RedisServer
) -> None:
    redis: dict[str, object] = {"redis_enabled": True, "redis_url": shared_redis.url()}
    port = free_port()
    server = await start_server(nursery, port=port, **redis)
    async with joined(port) as ann:
        events = ann.events()
        member_id = ann.member_id
        await ann.set_tempo(77)
        await server.stop()
        with trio.fail_after(PATIENCE_S):
            async for event in events:
                if isinstance(event, ServerDraining):
                    break
        assert (await status(events, "draining", "resuming")).status == "draining"
        server = await start_server(nursery, port=port, **redis)
        await status(events, "online")
        assert (ann.you.resumed, ann.member_id, ann.is_leader) == (True, member_id, True)
        assert ann.transport_at().tempo_bpm == 77
        await ann.play()
    await server.stop()


async def test_client_joins_a_server_without_its_session_anew(nursery: trio.Nursery) -> None:
    port = free_port()
    server = await start_server(nursery, port=port)
    async with joined(port) as ann:
        events = ann.events()
        member_id, epoch = ann.member_id, ann.session.epoch
        for _ in range(5):
            await ann.chat("x")
        await server.stop()
        server = await start_server(nursery, port=port)
        await status(events, "online")
        assert not ann.you.resumed
        assert ann.member_id != member_id
        assert (ann.session.epoch == epoch, ann.session.version) == (False, 1)
        await ann.chat("anew")
        assert [chat.text for chat in ann.session.chat] == ["anew"]
    await server.stop()


async def test_join_at_a_full_server_is_retried(nursery: trio.Nursery) -> None:
    server = await start_server(nursery, max_connections=1)
    async with trio.open_nursery() as inner:
        first = await inner.start(_stay, server.port)
        with pytest.raises(Unreachable):
            # Slowly: it says 1013, which is no refusal for good.
            async with joined(server.port, join_within=1):
                raise AssertionError("nobody is in")
        first.set()
    async with joined(server.port):
        pass
    await server.stop()


async def _stay(port: int, *, task_status: trio.TaskStatus[trio.Event]) -> None:
    done = trio.Event()
    async with joined(port):
        task_status.started(done)
        await done.wait()


Serve = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                await serve(stream)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


ANSWERS = [
    (b"", Unreachable),
    (b"what?\r\n\r\n", Unreachable),
    (b"\x00" * 5000, Unreachable),
    (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno", Unreachable),
    (b"HTTP/1.1 503 No\r\nConnection: close\r\n\r\nno", Unreachable),
    (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", Unreachable),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Unreachable),
    (b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\n\r\n", Unreachable),
    (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", JoinRefused),
    (b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno", JoinRefused),
    # Without an end of its own but that of the connection.
    (b"HTTP/1.1 401 No\r\nConnection: close\r\n\r\nno", JoinRefused),
    (b"HTTP/1.0 403 No\r\n\r\nno", JoinRefused),
]


@pytest.mark.parametrize(("answer", "error"), ANSWERS)
async def test_foreign_answers_are_unreachable_or_refused(
    answer: bytes, error: type[Exception]
) -> None:
    asked = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal asked
        asked += 1
        await stream.receive_some()
        await stream.send_all(answer)

    async with listening(serve) as port:
        # One line of exceptions, not a group of groups.
        with pytest.raises(error):
            async with joined(port, join_within=1):
                raise AssertionError("nobody is in")
    if error is JoinRefused or b"503" in answer:
        # Not again, or not so soon.
        assert asked == 1
    else:
        assert asked > 1


async def test_silence_in_the_handshake_has_an_end() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with listening(serve) as port:
        with pytest.raises(Unreachable):
            async with joined(port, join_within=0.5):
                raise AssertionError("nobody is in")
