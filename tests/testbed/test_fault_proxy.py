"""The fault proxy injects each of its faults."""

import errno
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import trio

from scripts.testbed.fault_proxy import FaultProxy

PATIENCE_S = 20.0
# Silence of this length proves that nothing is forwarded.
SILENCE_S = 0.05


class Upstream:
    """Echoes data, and keeps everything in ``received``."""

    def __init__(self) -> None:
        self.received = b""
        self.streams: list[trio.SocketStream] = []
        self.ends: list[str] = []

    async def echo(self, stream: trio.SocketStream) -> None:
        self.streams.append(stream)
        try:
            async for data in stream:
                self.received += data
                await stream.send_all(data)
            self.ends.append("eof")
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            assert isinstance(cause, OSError)
            self.ends.append(errno.errorcode[cause.errno or 0])


@pytest.fixture
async def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
async def proxy(nursery: trio.Nursery, upstream: Upstream) -> AsyncIterator[FaultProxy]:
    (listener,) = await nursery.start(partial(trio.serve_tcp, upstream.echo, 0, host="127.0.0.1"))
    started: FaultProxy = await nursery.start(FaultProxy(listener.socket.getsockname()[1]).run)
    with trio.fail_after(PATIENCE_S):
        yield started


async def connect(proxy: FaultProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", proxy.port)


async def exchange(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    received = b""
    while len(received) < len(data):
        chunk = await stream.receive_some()
        assert chunk
        received += chunk
    assert received == data


async def is_silent(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(SILENCE_S):
        await stream.receive_some()
        return False
    return True


async def until(wanted: Callable[[], bool]) -> None:
    while not wanted():  # noqa: ASYNC110  # two ends of a socket share no event
        await trio.sleep(0.001)


async def test_proxy_without_faults_forwards_and_closes(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    async with await connect(proxy) as one, await connect(proxy) as two:
        await exchange(one, b"one" * 100_000)
        await exchange(two, b"two")
        assert (proxy.accepted, proxy.open) == (2, 2)
        await two.send_eof()
        assert await two.receive_some() == b""
        await upstream.streams[0].send_eof()
        assert await one.receive_some() == b""
    await until(lambda: not proxy.open)


async def test_delay_applies_in_both_directions(proxy: FaultProxy) -> None:
    async with await connect(proxy) as stream:
        await exchange(stream, b"before")
        proxy.delay_s = 0.1
        began = trio.current_time()
        await exchange(stream, b"slow")
        assert trio.current_time() - began >= 0.2
        proxy.heal()
        assert proxy.delay_s == 0
        await exchange(stream, b"after")


async def test_black_hole_keeps_connections_and_forwards_after_heal(
    proxy: FaultProxy, upstream: Upstream
) -> None:
    async with await connect(proxy) as old:
        await exchange(old, b"before")
        proxy.black_hole()
        async with await connect(proxy) as new:
            await old.send_all(b"old")
            await new.send_all(b"new")
            assert await is_silent(old)
            assert await is_silent(new)
            assert upstream.received == b"before"
            proxy.heal()
            assert await old.receive_some() == b"old"
            assert await new.receive_some() == b"new"


async def test_black_hole_can_affect_one_direction(proxy: FaultProxy, upstream: Upstream) -> None:
    async with await connect(proxy) as stream:
        proxy.black_hole("down")
        await stream.send_all(b"forwarded")
        await until(lambda: upstream.received == b"forwarded")
        assert await is_silent(stream)
        proxy.black_hole("up")
        assert await stream.receive_some() == b"forwarded"
        await stream.send_all(b"held back")
        assert await is_silent(stream)
        assert upstream.received == b"forwarded"


async def test_black_hole_hides_the_end_of_upstream(proxy: FaultProxy, upstream: Upstream) -> None:
    async with await connect(proxy) as stream:
        await exchange(stream, b"before")
        proxy.black_hole()
        await upstream.streams[0].send_eof()
        assert await is_silent(stream)
        proxy.heal()
        assert await stream.receive_some() == b""


async def test_reset_reaches_both_ends(proxy: FaultProxy, upstream: Upstream) -> None:
    async with await connect(proxy) as stream:
        await exchange(stream, b"before")
        proxy.reset()
        with pytest.raises(trio.BrokenResourceError) as broken:
            await stream.receive_some()
        assert isinstance(broken.value.__cause__, ConnectionResetError)
        await until(lambda: bool(upstream.ends))
        assert upstream.ends == ["ECONNRESET"]
        async with await connect(proxy) as after:
            await exchange(after, b"after")


async def test_half_close_still_forwards_upstream(proxy: FaultProxy, upstream: Upstream) -> None:
    async with await connect(proxy) as stream:
        await exchange(stream, b"before")
        proxy.half_close()
        assert await stream.receive_some() == b""
        await stream.send_all(b" after")
        await until(lambda: upstream.received == b"before after")
        await stream.send_eof()
        await until(lambda: bool(upstream.ends))
        assert upstream.ends == ["eof"]


async def test_refusal_keeps_open_connections(proxy: FaultProxy) -> None:
    port = proxy.port
    async with await connect(proxy) as stream:
        await exchange(stream, b"before")
        proxy.refuse()
        with pytest.raises(OSError, match="attempts to connect"):
            await connect(proxy)
        await exchange(stream, b"the old one goes on")
        proxy.heal()
        assert proxy.port == port
        async with await connect(proxy) as after:
            await exchange(after, b"after")


async def test_refusing_upstream_resets_the_client(nursery: trio.Nursery) -> None:
    with trio.fail_after(PATIENCE_S):
        # No socket listens on port 1.
        proxy = await nursery.start(FaultProxy(1).run)
        async with await connect(proxy) as stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
