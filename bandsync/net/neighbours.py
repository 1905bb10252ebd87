"""Workers that share a port pass connections on to each other, so that a band is on one of them.

The kernel deals connections out before anybody knows whose they are. Whoever accepted one reads its
head, and passes socket and head on to the worker that the session is for: over a UNIX socket with
SCM_RIGHTS (unix(7)), so that nothing stays behind and nothing is relayed.

A connection is passed on only to who has just answered: one that waits for a process that hangs is
a musician who waits.
"""

import array
import contextlib
import errno
import math
import os
import socket
import struct
from collections.abc import Callable

import trio
from structlog.typing import FilteringBoundLogger

from bandsync.net.head import MAX_HEAD_BYTES
from bandsync.rendezvous import preference

# What can have been read of a connection: `read_head`.
_MOST_BYTES = MAX_HEAD_BYTES + 1
# How long one waits for an answer: longer than a worker is busy when a thousand come at once.
ANSWER_S = 2.0
# How long it is good for.
FRESH_S = 0.1
# For how long nobody asks who did not answer.
SHUN_S = 5.0

_ASK = b"?"
_ANSWER = b"!"
_BACKLOG = 64
_BATCH = 64
_RETRY_S = 0.1
_DESCRIPTOR = struct.calcsize("i")
_CREDENTIALS = struct.Struct("3i")  # ucred: pid, uid, gid

Take = Callable[[socket.socket, bytes], None]


class Neighbours:
    """The workers of one port, as one of them sees the others.

    Args:
        crew: a name that these workers share with nobody else.
        worker: which one this is, from 1.
        workers: how many they are.
    """

    def __init__(self, crew: str, worker: int, workers: int, log: FilteringBoundLogger) -> None:
        self._worker = worker
        self._workers = workers
        self._own = address_of(crew, worker)
        self._ways = {
            number: _Way(address_of(crew, number), log.bind(neighbour=number))
            for number in range(1, workers + 1)
            if number != worker
        }
        self._log = log
        self._listener: socket.socket | None = None
        self._inlets: set[socket.socket] = set()

    async def pass_on(self, session_id: str, sock: socket.socket, received: bytes) -> bool:
        """Pass a connection on to the worker that its session is for.

        Args:
            received: all that was read from ``sock``.

        Returns:
            True if it was passed on: ``sock`` must be closed here, and nothing else. False if this
            worker is the one, or none of those that the session would rather have can take it.
        """
        for number in preference(session_id, self._workers):
            if number == self._worker:
                break
            if await self._ways[number].pass_on(sock, received):
                return True
        return False

    async def run(
        self, take: Take, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take what the others pass on, for ever, or until `leave`.

        Args:
            take: told of each connection and what was read from it; the socket is its own.
        """
        try:
            try:
                self._listener = _listening(self._own)
            except OSError as error:
                # It can do without: what should come here is served where it was accepted.
                self._log.error("neighbours.unreachable", error=str(error))
            task_status.started()
            if self._listener is not None:
                with self._listener as listener:
                    await self._accept(listener, take)
            await trio.sleep_forever()
        finally:
            for way in self._ways.values():
                way.close()

    def leave(self) -> None:
        """Take no more than what was passed on before now; the others notice."""
        if self._listener is not None:
            _close(self._listener)
            self._listener = None
        for inlet in self._inlets:
            # From now on sending to it fails; what is in it can still be read: unix(7).
            with contextlib.suppress(OSError):
                inlet.shutdown(socket.SHUT_RD)

    async def _accept(self, listener: socket.socket, take: Take) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    await trio.lowlevel.wait_readable(listener)
                    inlet, _ = listener.accept()
                except BlockingIOError:
                    continue
                except (trio.ClosedResourceError, ValueError):
                    return
                except OSError as error:
                    self._log.error("accept.failed", error=str(error))
                    await trio.sleep(_RETRY_S)
                    continue
                inlet.setblocking(False)
                if _is_ours(inlet):
                    nursery.start_soon(self._run_inlet, inlet, take)
                else:
                    inlet.close()

    async def _run_inlet(self, inlet: socket.socket, take: Take) -> None:
        with inlet:
            self._inlets.add(inlet)
            try:
                while await self._read(inlet, take):
                    await trio.lowlevel.checkpoint()
            finally:
                self._inlets.discard(inlet)

    async def _read(self, inlet: socket.socket, take: Take) -> bool:
        """Take what is there; False at the end."""
        await trio.lowlevel.wait_readable(inlet)
        asked = False
        for _ in range(_BATCH):
            try:
                data, ancillary, flags, _ = inlet.recvmsg(
                    _MOST_BYTES, socket.CMSG_LEN(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except OSError:
                return False
            passed = _descriptors(ancillary)
            if passed:
                sock = socket.socket(fileno=passed[0])
                sock.setblocking(False)
                take(sock, data)
            elif flags & socket.MSG_CTRUNC:
                # Out of file descriptors: the kernel closed it, as it would have been refused.
                self._log.error("accept.failed", error=os.strerror(errno.EMFILE))
            elif data == _ASK:
                asked = True
            else:
                return False
        if asked:
            try:
                inlet.send(_ANSWER)
            except OSError:
                return False
        return True


class _Way:
    """The way to one neighbour."""

    def __init__(self, address: bytes, log: FilteringBoundLogger) -> None:
        self._address = address
        self._log = log
        self._outlet: socket.socket | None = None
        self._turn = trio.Lock()
        self._answered_at = -math.inf
        self._shunned_until = -math.inf

    async def pass_on(self, sock: socket.socket, received: bytes) -> bool:
        with trio.move_on_after(ANSWER_S):
            async with self._turn:
                if self._shunned():
                    return False
                # The second try finds a neighbour that has been replaced.
                return await self._try(sock, received) or await self._try(sock, received)
        if not self._shunned():
            self._log.warning("neighbour.silent")
            self._shunned_until = trio.current_time() + SHUN_S
            self.close()
        return False

    def _shunned(self) -> bool:
        return trio.current_time() < self._shunned_until

    async def _try(self, sock: socket.socket, received: bytes) -> bool:
        try:
            if self._outlet is None:
                self._outlet = _connected(self._address)
            outlet = self._outlet
            if trio.current_time() >= self._answered_at + FRESH_S:
                await self._ask(outlet)
            await _send(outlet, received, sock)
        except (OSError, trio.ClosedResourceError):
            self.close()
            return False
        return True

    async def _ask(self, outlet: socket.socket) -> None:
        await _send(outlet, _ASK)
        while True:
            await trio.lowlevel.wait_readable(outlet)
            try:
                answer = outlet.recv(len(_ANSWER))
            except BlockingIOError:
                continue
            break
        if answer != _ANSWER:
            raise ConnectionResetError
        self._answered_at = trio.current_time()

    def close(self) -> None:
        self._answered_at = -math.inf
        if self._outlet is not None:
            _close(self._outlet)
            self._outlet = None


def address_of(crew: str, worker: int) -> bytes:
    """Abstract, unix(7): there is no file that somebody has to be allowed to write, or to remove.

    Nor does one keep others out: `_is_ours` does.
    """
    return f"\0bandsync-{crew}-{worker}".encode()


def _listening(address: bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _connected(address: bytes) -> socket.socket:
    """Connected to who listens there.

    Raises:
        OSError: nobody does, too many wait, or it is a stranger.
    """
    outlet = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        outlet.setblocking(False)
        outlet.connect(address)
        if not _is_ours(outlet):
            raise PermissionError("the name of a neighbour is taken by somebody else")
    except BaseException:
        outlet.close()
        raise
    return outlet


def _is_ours(sock: socket.socket) -> bool:
    """Whether the process at the other end is run by the same user."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return bool(user == os.geteuid())


async def _send(outlet: socket.socket, data: bytes, sock: socket.socket | None = None) -> None:
    """Send one message, with a descriptor.

    Raises:
        OSError: nobody reads it.
    """
    ancillary = []
    if sock is not None:
        descriptors = array.array("i", [sock.fileno()])
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors))
    while True:
        try:
            outlet.sendmsg([data], ancillary)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(outlet)
            continue
        return


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close(sock: socket.socket) -> None:
    trio.lowlevel.notify_closing(sock)
    sock.close()
