"""The channel from one worker to a peer: readiness probes, queries, and handoffs of connections.

Messages and states are described in `bandsync/handoff/README.md`.
"""

import array
import contextlib
import errno
import math
import os
import socket
import struct

import trio
from structlog.typing import FilteringBoundLogger

# How long to wait for an answer: longer than a worker is busy when a thousand connections arrive
# at once.
ANSWER_TIMEOUT_S = 2.0
# How long the answer to a probe is valid.
PROBE_VALID_S = 0.1
# Circuit breaker: skip an unresponsive worker for this long.
BREAKER_OPEN_S = 5.0
# How long a connection waits in all for a peer that is ready but whose socket is full.
HANDOFF_TIMEOUT_S = 10.0

# The readiness probe, and the answers to it: the peer accepts handoffs, or it has no room.
PROBE = b"?"
YES = b"!"
NO = b"-"
MAX_ANSWER_BYTES = 100_000
# Errors of a send to a worker that has left or died.
_DISCONNECTED = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})
_CREDENTIALS = struct.Struct("3i")  # ucred: pid, uid, gid


class _PendingProbe:
    """A probe that is under way; all handoffs that start meanwhile share its result.

    Attributes:
        done: set when it is answered, or has failed.
        sender: the socket to hand off on; None if the peer cannot accept handoffs.
    """

    def __init__(self) -> None:
        self.done = trio.Event()
        self.sender: socket.socket | None = None


class HandoffChannel:
    """The channel to one peer: a UNIX socket, which is connected when it is first needed.

    Args:
        address: where the peer listens: `address_of`.
    """

    def __init__(self, address: bytes, log: FilteringBoundLogger) -> None:
        self._address = address
        self._log = log
        self._sender: socket.socket | None = None  # for probes and handoffs
        self._probe: _PendingProbe | None = None
        self._query_lock = trio.Lock()
        self._ready_at = -math.inf  # when the peer last answered YES to a probe
        self._open_until = -math.inf  # the circuit breaker: no probes and no queries until then

    async def hand_off(self, sock: socket.socket, received: bytes) -> bool:
        """Send a connection to the peer.

        Args:
            received: all bytes that were read from ``sock``.

        Returns:
            False if the peer is absent, unresponsive, or has no room.
        """
        deadline = trio.current_time() + HANDOFF_TIMEOUT_S
        disconnects = 0
        while disconnects < 2 and trio.current_time() < deadline:
            sender = await self._ready_sender()
            if sender is None:
                return False
            try:
                _send_connection(sender, received, sock)
            except BlockingIOError:
                # Backpressure: probe again. The peer answers once it has read what is queued.
                self._ready_at = -math.inf
            except OSError as error:
                if error.errno not in _DISCONNECTED:
                    return False
                # The second attempt finds a worker that has replaced the first.
                disconnects += 1
                if sender is self._sender:
                    self.close()
            else:
                return True
        return False

    async def query(self, question: bytes) -> bytes:
        """Send a rare question; the answer, empty if there is none in time."""
        answer = b""
        if trio.current_time() < self._open_until:
            return answer
        with trio.move_on_after(ANSWER_TIMEOUT_S), contextlib.suppress(OSError):
            # One at a time, so that queries do not fill the peer's accept queue.
            async with self._query_lock:
                # On a connection of its own, so that answers cannot be mixed up.
                with _connect(self._address) as sock:
                    answer = await _request(sock, question)
        return answer

    def close(self) -> None:
        """Disconnect; the next probe connects again."""
        self._ready_at = -math.inf
        if self._sender is not None:
            close_now(self._sender)
            self._sender = None

    async def _ready_sender(self) -> socket.socket | None:
        """The socket to hand off on, if the peer has answered a probe recently or does so now.

        Concurrent callers share one probe. If each sent its own, one after the other, every answer
        would be out of date by the time it is used, as soon as a pass of the event loop takes
        longer than `PROBE_VALID_S`.
        """
        probe = self._probe
        if probe is None:
            now = trio.current_time()
            if now < self._open_until:
                return None
            if now < self._ready_at + PROBE_VALID_S:
                return self._sender
            probe = self._probe = _PendingProbe()
            try:
                probe.sender = await self._run_probe()
            finally:
                self._probe = None
                probe.done.set()
        else:
            await probe.done.wait()
        return probe.sender

    async def _run_probe(self) -> socket.socket | None:
        answer = b""
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S) as timeout:
                # The second attempt finds a worker that has replaced the first.
                answer = await self._send_probe() or await self._send_probe()
        finally:
            if not answer:
                # A late answer must not be read as the answer to the next probe.
                self.close()
        now = trio.current_time()
        if timeout.cancelled_caught:
            self._log.warning("handoff.peer_unresponsive", retry_in_s=BREAKER_OPEN_S)
            self._open_until = now + BREAKER_OPEN_S
        elif answer == NO:
            self._open_until = now + PROBE_VALID_S
        elif answer == YES:
            self._ready_at = now
            return self._sender
        return None

    async def _send_probe(self) -> bytes:
        """The answer to one probe; empty if the peer is absent."""
        try:
            if self._sender is None:
                self._sender = _connect(self._address)
            return await _request(self._sender, PROBE)
        except (OSError, trio.ClosedResourceError):
            self.close()
            return b""


def address_of(group: str, worker: int) -> bytes:
    """Where a worker of this group listens: a name in the abstract namespace of unix(7).

    It needs no file, no directory with the right permissions, and no cleanup. Any local process
    may bind or connect to it, so both sides check `is_same_user`.
    """
    return f"\0bandsync-{group}-{worker}".encode()


def is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as the same user."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return bool(user == os.geteuid())


def close_now(sock: socket.socket) -> None:
    """Close, and wake the tasks that wait for the socket."""
    trio.lowlevel.notify_closing(sock)
    sock.close()


def _connect(address: bytes) -> socket.socket:
    """A socket that is connected to this address.

    Raises:
        OSError: nothing listens there, the accept queue is full, or another user has the name.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        sock.connect(address)
        if not is_same_user(sock):
            raise PermissionError("another user has taken the socket name of a worker")
    except BaseException:
        sock.close()
        raise
    return sock


async def _request(sock: socket.socket, message: bytes) -> bytes:
    """Send a message, and receive the answer; empty if the peer has disconnected.

    Raises:
        OSError: the peer is gone.
    """
    while True:
        try:
            sock.send(message)
            break
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
    while True:
        await trio.lowlevel.wait_readable(sock)
        with contextlib.suppress(BlockingIOError):
            return sock.recv(MAX_ANSWER_BYTES)


def _send_connection(sender: socket.socket, received: bytes, sock: socket.socket) -> None:
    """Send a connection as one message: what was read from it, and its descriptor.

    Raises:
        BlockingIOError: the socket's queue is full.
        OSError: the peer is gone, or the message cannot be sent.
    """
    descriptors = array.array("i", [sock.fileno()])
    sender.sendmsg([received], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
