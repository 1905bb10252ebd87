"""`TcpStream`: errors of a closed socket."""

import socket

import pytest
import trio

from bandsync.net.stream import TcpStream


async def test_every_wait_on_a_closed_stream_raises() -> None:
    for _ in range(3):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            stream = TcpStream(ours)

            async def wait(stream: TcpStream = stream) -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive_some()

            async with trio.open_nursery() as waiting:
                waiting.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                stream.close()
            for again in (
                stream.receive_some,
                stream.wait_send_all_might_not_block,
                lambda stream=stream: stream.send_all(b"hello"),
            ):
                with pytest.raises(trio.ClosedResourceError):
                    await again()
