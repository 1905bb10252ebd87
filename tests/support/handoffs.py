"""Workers of a group in this process that hand connections off to each other."""

import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

import trio

from bandsync.handoff.channel import address_of
from bandsync.handoff.peers import HandoffPeers
from bandsync.handoff.rendezvous import preference
from tests.support.log_capture import LogCapture
from tests.support.servers import PATIENCE_S

SESSIONS = [f"song-{number}" for number in range(8)]


def session_for(worker: int, workers: int = 2) -> str:
    """A session that belongs to this worker."""
    return next(name for name in SESSIONS if preference(name, workers)[0] == worker)


class HandoffWorker:
    """A worker that receives handoffs and serves none of them.

    Attributes:
        hosted: the sessions that it says it hosts.
        has_room: what it answers to probes.
        received: the bytes that came with each connection.
        sockets: the connections.
    """

    def __init__(self, group: str, worker: int, workers: int = 2) -> None:
        self.log = LogCapture()
        self.hosted: set[str] = set()
        self.peers = HandoffPeers(group, worker, workers, lambda: self.hosted, self.log.logger)
        self.sockets: list[socket.socket] = []
        self.received: list[bytes] = []
        self.has_room = True
        self._arrived = trio.Event()
        self._stack = ExitStack()

    async def run(
        self, *, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self._stack, trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.peers.run, self._receive, lambda: self.has_room)
                task_status.started(scope)

    def _receive(self, sock: socket.socket, received: bytes) -> None:
        self.sockets.append(self._stack.enter_context(sock))
        self.received.append(received)
        self._arrived.set()

    async def until(self, count: int) -> None:
        """Wait until so many connections were received."""
        with trio.fail_after(PATIENCE_S):
            while len(self.received) < count:
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def hand_off(
        self, session_id: str, received: bytes = b"head", *, full: bool = False
    ) -> bool:
        """Hand a new connection off; its socket here is closed, as it must be."""
        with connection() as (_, accepted):
            return await self.peers.hand_off(session_id, accepted, received, full=full)


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: the client's socket, and the accepted one."""
    client, accepted = socket.socketpair()
    client.settimeout(PATIENCE_S)
    accepted.setblocking(False)
    with client, accepted:
        yield client, accepted


@contextmanager
def channel_to(group: str, worker: int) -> Iterator[socket.socket]:
    """A bare socket that is connected to a worker."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(address_of(group, worker))
        yield sock


@asynccontextmanager
async def unresponsive(group: str, worker: int) -> AsyncIterator[socket.socket]:
    """Listens like a process that was stopped: the kernel accepts, nothing answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        listener.bind(address_of(group, worker))
        listener.listen(16)
        yield listener


@contextmanager
def no_file_descriptors() -> Iterator[None]:
    """This process can open no further file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
