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
# How long a connection waits in all for one that answers, but has more to take than it can.
PATIENCE_S = 10.0
# How often one who cannot listen tries again: somebody else has the name, or there is no memory.
REBIND_S = 1.0

_ASK = b"?"
_ANSWER = b"!"
_FULL = b"-"
# Sending to a neighbour that has left, or died.
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})
_BACKLOG = 64
_BATCH = 64
_RETRY_S = 0.1
_DESCRIPTOR = struct.calcsize("i")
_CREDENTIALS = struct.Struct("3i")  # ucred: pid, uid, gid

Take = Callable[[socket.socket, bytes], None]
HasRoom = Callable[[], bool]


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
        self._left = False
        self._inlets: set[socket.socket] = set()

    async def pass_on(
        self, session_id: str, sock: socket.socket, received: bytes, *, full: bool = False
    ) -> bool:
        """Pass a connection on to the worker that its session is for.

        Args:
            received: all that was read from ``sock``.
            full: whether any other that can take it should, because this worker cannot.

        Returns:
            True if it was passed on: ``sock`` must be closed here, and nothing else. False if this
            worker is the one, or none of those that the session would rather have can take it.
        """
        for number in preference(session_id, self._workers):
            if number == self._worker:
                if full:
                    continue
                break
            if await self._ways[number].pass_on(sock, received):
                return True
        return False

    async def run(
        self,
        take: Take,
        has_room: HasRoom,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take what the others pass on, for ever, or until `leave`.

        Args:
            take: told of each connection and what was read from it; the socket is its own.
            has_room: whether more of them can be served; asked now and then.
        """
        try:
            error = self._listen()
            task_status.started()
            if error is not None:
                # It can do without: what should come here is served where it was accepted.
                self._log.error("neighbours.unreachable", error=str(error))
            while error is not None and not self._left:
                await trio.sleep(REBIND_S)
                error = self._listen()
            if self._listener is not None:
                with self._listener as listener:
                    await self._accept(listener, take, has_room)
            await trio.sleep_forever()
        finally:
            for way in self._ways.values():
                way.close()

    def leave(self) -> None:
        """Take no more than what was passed on before now; the others notice."""
        self._left = True
        if self._listener is not None:
            _close(self._listener)
            self._listener = None
        for inlet in self._inlets:
            # From now on sending to it fails; what is in it can still be read: unix(7).
            with contextlib.suppress(OSError):
                inlet.shutdown(socket.SHUT_RD)

    def _listen(self) -> OSError | None:
        """What keeps this worker from listening, if something does."""
        if not self._left:
            try:
                self._listener = _listening(self._own)
            except OSError as error:
                return error
        return None

    async def _accept(self, listener: socket.socket, take: Take, has_room: HasRoom) -> None:
        short = False  # Of file descriptors or memory: said once, not ten times a second.
        async with trio.open_nursery() as nursery:
            while listener.fileno() != -1:
                try:
                    await trio.lowlevel.wait_readable(listener)
                    inlet, _ = listener.accept()
                except BlockingIOError:
                    continue
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    if error.errno == errno.EBADF:
                        return
                    if not short:
                        self._log.error("accept.failed", error=str(error))
                    short = True
                    await trio.sleep(_RETRY_S)
                    continue
                short = False
                inlet.setblocking(False)
                if _is_ours(inlet):
                    # From now on, not when its task runs: `leave` must not miss one.
                    self._inlets.add(inlet)
                    nursery.start_soon(self._run_inlet, inlet, take, has_room)
                else:
                    inlet.close()

    async def _run_inlet(self, inlet: socket.socket, take: Take, has_room: HasRoom) -> None:
        with inlet:
            try:
                while await self._read(inlet, take, has_room):
                    await trio.lowlevel.checkpoint()
            finally:
                self._inlets.discard(inlet)

    async def _read(self, inlet: socket.socket, take: Take, has_room: HasRoom) -> bool:
        """Take what is there; False at the end."""
        await trio.lowlevel.wait_readable(inlet)
        asked = False
        lost = 0
        try:
            for _ in range(_BATCH):
                data, ancillary, flags, _ = inlet.recvmsg(
                    _MOST_BYTES, socket.CMSG_LEN(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
                )
                passed = _descriptors(ancillary)
                if passed:
                    take(_adopted(passed[0]), data)
                elif flags & socket.MSG_CTRUNC:
                    # Out of file descriptors: the kernel has closed it.
                    lost += 1
                elif data == _ASK:
                    asked = True
                else:
                    return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        finally:
            if lost:
                self._log.error("accept.failed", error=os.strerror(errno.EMFILE), connections=lost)
        if asked:
            try:
                inlet.send(_ANSWER if has_room() and _can_receive(inlet) else _FULL)
            except OSError:
                return False
        return True


class _Asking:
    """A question that is under way, for all who want to know the same.

    Attributes:
        over: set when it is answered, or nobody answers.
        outlet: where to send what is passed on; None if the neighbour cannot take it.
    """

    def __init__(self) -> None:
        self.over = trio.Event()
        self.outlet: socket.socket | None = None


class _Way:
    """The way to one neighbour."""

    def __init__(self, address: bytes, log: FilteringBoundLogger) -> None:
        self._address = address
        self._log = log
        self._outlet: socket.socket | None = None
        self._asking: _Asking | None = None
        self._answered_at = -math.inf
        self._shunned_until = -math.inf

    async def pass_on(self, sock: socket.socket, received: bytes) -> bool:
        deadline = trio.current_time() + PATIENCE_S
        ended = 0
        while ended < 2 and trio.current_time() < deadline:
            outlet = await self._answering()
            if outlet is None:
                return False
            try:
                _send(outlet, received, sock)
            except BlockingIOError:
                # By its next answer it has taken what is there.
                self._answered_at = -math.inf
            except OSError as error:
                if error.errno not in _ENDED:
                    return False
                # The next try finds a neighbour that has been replaced.
                ended += 1
                if outlet is self._outlet:
                    self.close()
            else:
                return True
        return False

    async def _answering(self) -> socket.socket | None:
        """Where to send to, if the neighbour has just answered or does so now.

        All who come while one asks take the same answer. If they asked one after the other, each
        would find the last answer too old when a pass of the loop takes long: when many come.
        """
        asking = self._asking
        if asking is None:
            now = trio.current_time()
            if now < self._shunned_until:
                return None
            if now < self._answered_at + FRESH_S:
                return self._outlet
            asking = self._asking = _Asking()
            try:
                asking.outlet = await self._ask()
            finally:
                self._asking = None
                asking.over.set()
        else:
            await asking.over.wait()
        return asking.outlet

    async def _ask(self) -> socket.socket | None:
        answer = b""
        try:
            with trio.move_on_after(ANSWER_S) as patience:
                # The second try finds a neighbour that has been replaced.
                answer = await self._try_to_ask() or await self._try_to_ask()
        finally:
            if not answer:
                # What comes too late must not be taken for the answer to the next question.
                self.close()
        now = trio.current_time()
        if patience.cancelled_caught:
            self._log.warning("neighbour.silent")
            self._shunned_until = now + SHUN_S
        elif answer == _FULL:
            self._shunned_until = now + FRESH_S
        elif answer == _ANSWER:
            self._answered_at = now
            return self._outlet
        return None

    async def _try_to_ask(self) -> bytes:
        """The answer; empty if there is nobody."""
        try:
            if self._outlet is None:
                self._outlet = _connected(self._address)
            return await _asked(self._outlet)
        except (OSError, trio.ClosedResourceError):
            self.close()
            return b""

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


def _adopted(descriptor: int) -> socket.socket:
    """The socket of this descriptor.

    Raises:
        OSError: it is none; it is closed.
    """
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise
    sock.setblocking(False)
    return sock


def _can_receive(sock: socket.socket) -> bool:
    """Whether there are descriptors left for what is passed on: without, the kernel closes it."""
    try:
        os.close(os.dup(sock.fileno()))
    except OSError:
        return False
    return True


async def _asked(outlet: socket.socket) -> bytes:
    """What is answered there; empty at the end.

    Raises:
        OSError: nobody is there any more.
    """
    while True:
        try:
            outlet.send(_ASK)
            break
        except BlockingIOError:
            await trio.lowlevel.wait_writable(outlet)
    while True:
        await trio.lowlevel.wait_readable(outlet)
        with contextlib.suppress(BlockingIOError):
            return outlet.recv(len(_ANSWER))


def _send(outlet: socket.socket, data: bytes, sock: socket.socket) -> None:
    """Send one message with a descriptor: all of it, or an error is raised.

    Raises:
        BlockingIOError: too much is there that has not been taken.
        OSError: nobody takes it any more, or it cannot be sent.
    """
    descriptors = array.array("i", [sock.fileno()])
    outlet.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close(sock: socket.socket) -> None:
    trio.lowlevel.notify_closing(sock)
    sock.close()
