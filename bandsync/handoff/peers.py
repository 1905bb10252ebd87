"""Workers that share a port pass connections on to each other, so that a band is on one of them.

The kernel deals connections out before anybody knows whose they are. Whoever accepted one reads its
head, and passes socket and head on to the worker that the session is for: over a UNIX socket with
SCM_RIGHTS (unix(7)), so that nothing stays behind and nothing is relayed.

A connection is passed on only to who has just answered: one that waits for a process that hangs is
a musician who waits. When a worker is gone its sessions go to others; when it is back it asks who
has them, and passes newcomers on to there until the band has left.
"""

import array
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Collection

import msgspec
import trio
from structlog.typing import FilteringBoundLogger

from bandsync.handoff.channel import ASK, NO, YES, HandoffChannel, address_of, close_now, is_ours
from bandsync.handoff.rendezvous import preference
from bandsync.wire.http_messages import MAX_HEAD_BYTES

# What can have been read of a connection: `read_head`.
_MOST_BYTES = MAX_HEAD_BYTES + 1
# How often one who cannot listen tries again: somebody else has the name, or there is no memory.
REBIND_S = 1.0

# Whether a session is hosted there; which are that should live on the worker with this number.
_HOSTED = b"hosted "
_AWAY = b"away "
# Sessions in one answer; more may be in two parts.
_MOST_AWAY = 1000
_BACKLOG = 64
_BATCH = 64
_RETRY_S = 0.1
_DESCRIPTOR = struct.calcsize("i")

Take = Callable[[socket.socket, bytes], None]
HasRoom = Callable[[], bool]


class HandoffPeers:
    """The workers of one port, as one of them sees the others.

    Args:
        crew: a name that these workers share with nobody else.
        worker: which one this is, from 1.
        workers: how many they are.
        hosted: the sessions that have a room here.
    """

    def __init__(
        self,
        crew: str,
        worker: int,
        workers: int,
        hosted: Callable[[], Collection[str]],
        log: FilteringBoundLogger,
    ) -> None:
        self._worker = worker
        self._hosted = hosted
        # Sessions that should live here, and who had them when this worker began.
        self._away: dict[str, int] = {}
        self._workers = workers
        self._own = address_of(crew, worker)
        self._ways = {
            number: HandoffChannel(address_of(crew, number), log.bind(neighbour=number))
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
        if session_id in self._hosted() and not full:
            return False
        if await self.pass_back(session_id, sock, received):
            return True
        for number in preference(session_id, self._workers):
            if number == self._worker:
                if full:
                    continue
                break
            if await self._ways[number].pass_on(sock, received):
                return True
        return False

    async def pass_back(self, session_id: str, sock: socket.socket, received: bytes) -> bool:
        """The same if the band is elsewhere since before this worker began; for who was passed on.

        Nobody else has such a session to pass on, so that no connection goes in circles.
        """
        number = self._away.get(session_id)
        if number is None or session_id in self._hosted():
            return False
        way = self._ways[number]
        if await way.ask(_HOSTED + session_id.encode()) == NO:
            self._away.pop(session_id, None)
            return False
        # Also without an answer: when many come at once, not each of them gets one in time.
        return await way.pass_on(sock, received)

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
            # Before anybody can come here.
            async with trio.open_nursery() as nursery:
                for number, way in self._ways.items():
                    nursery.start_soon(self._find, number, way)
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
            close_now(self._listener)
            self._listener = None
        for inlet in self._inlets:
            # From now on sending to it fails; what is in it can still be read: unix(7).
            with contextlib.suppress(OSError):
                inlet.shutdown(socket.SHUT_RD)

    async def _find(self, number: int, way: HandoffChannel) -> None:
        """Ask a neighbour for the sessions that it has and that should live here."""
        answer = await way.ask(_AWAY + str(self._worker).encode())
        with contextlib.suppress(msgspec.MsgspecError):
            found = msgspec.json.decode(answer, type=list[str])
            self._away |= dict.fromkeys(found[:_MOST_AWAY], number)

    def _answer(self, question: bytes) -> bytes | None:
        """The answer to a rare question; None if it is none."""
        if question.startswith(_HOSTED):
            session_id = question[len(_HOSTED) :].decode(errors="replace")
            return YES if session_id in self._hosted() else NO
        if question.startswith(_AWAY):
            home = question[len(_AWAY) :].decode(errors="replace")
            away = [
                session_id
                for session_id in self._hosted()
                if str(preference(session_id, self._workers)[0]) == home
            ]
            return msgspec.json.encode(away[:_MOST_AWAY])
        return None

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
                if is_ours(inlet):
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
                elif data == ASK:
                    asked = True
                elif (answer := self._answer(data)) is not None:
                    inlet.send(answer)
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
                inlet.send(YES if has_room() and _can_receive(inlet) else NO)
            except OSError:
                return False
        return True


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


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
