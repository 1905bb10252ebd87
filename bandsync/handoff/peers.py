"""Handoff of connections between the workers of one port, so that a session is on one of them.

The kernel distributes connections before it is known which session they are for. The worker that
has accepted one reads its HTTP head. It then hands off socket and head to the worker of the
session, over a UNIX socket with SCM_RIGHTS (unix(7)). Nothing stays behind, and nothing is relayed.

Protocol, states and failures: `bandsync/handoff/README.md`.
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

from bandsync.handoff.channel import (
    NO,
    PROBE,
    YES,
    HandoffChannel,
    address_of,
    close_now,
    is_same_user,
)
from bandsync.handoff.rendezvous import preference
from bandsync.wire.http_messages import MAX_HEAD_BYTES

# The most that `read_head` reads of a connection.
_MAX_RECEIVED_BYTES = MAX_HEAD_BYTES + 1
# How often to retry to bind: another process has the name, or memory is short.
REBIND_S = 1.0

# Queries: whether the peer hosts this session; which sessions it hosts that belong to the worker
# with this number.
_HOSTED = b"hosted "
_AWAY = b"away "
# Sessions in one answer. A larger answer could need two messages.
_MAX_DISPLACED = 1000
_ACCEPT_QUEUE = 64
# Messages of one socket before other tasks get their turn.
_MESSAGE_BATCH = 64
_RETRY_S = 0.1
_DESCRIPTOR = struct.calcsize("i")

# Starts to serve a received connection, from which these bytes were read already.
Receive = Callable[[socket.socket, bytes], None]
HasRoom = Callable[[], bool]


class HandoffPeers:
    """The other workers of one port.

    Args:
        group: random name of the worker group.
        worker: the number of this worker, from 1.
        workers: how many workers the group has.
        hosted: the sessions that have a room here.
    """

    def __init__(
        self,
        group: str,
        worker: int,
        workers: int,
        hosted: Callable[[], Collection[str]],
        log: FilteringBoundLogger,
    ) -> None:
        self._worker = worker
        self._workers = workers
        self._hosted = hosted
        # Sessions that belong here but were hosted by another worker when this one started.
        self._displaced: dict[str, int] = {}
        self._address = address_of(group, worker)
        self._channels = {
            number: HandoffChannel(address_of(group, number), log.bind(peer=number))
            for number in range(1, workers + 1)
            if number != worker
        }
        self._log = log
        self._listener: socket.socket | None = None
        self._left = False  # `leave` was called
        self._receivers: set[socket.socket] = set()  # accepted from peers

    async def hand_off(
        self, session_id: str, sock: socket.socket, received: bytes, *, full: bool = False
    ) -> bool:
        """Hand a connection off to the worker that its session belongs to.

        Args:
            received: all bytes that were read from ``sock``.
            full: this worker cannot serve it, so any other that can should.

        Returns:
            True if it was handed off: close ``sock`` here and do nothing else. False if the
            session belongs here, or no worker that it prefers can accept the connection.
        """
        if session_id in self._hosted() and not full:
            return False
        if await self.hand_back(session_id, sock, received):
            return True
        for number in preference(session_id, self._workers):
            if number == self._worker:
                if full:
                    continue
                break
            if await self._channels[number].hand_off(sock, received):
                return True
        return False

    async def hand_back(self, session_id: str, sock: socket.socket, received: bytes) -> bool:
        """Hand a connection off to the worker that hosted its session before this one started.

        This applies to received connections, too. No loop is possible: the other worker has no
        such entry for the session.
        """
        number = self._displaced.get(session_id)
        if number is None or session_id in self._hosted():
            return False
        channel = self._channels[number]
        if await channel.query(_HOSTED + session_id.encode()) == NO:
            self._displaced.pop(session_id, None)
            return False
        # Also without an answer: when many connections arrive, some queries get none in time.
        return await channel.hand_off(sock, received)

    async def run(
        self,
        receive: Receive,
        has_room: HasRoom,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Receive handoffs, for ever.

        Args:
            receive: called with each connection and the bytes that were read from it; owns the
                socket.
            has_room: whether this worker can serve more connections; answers the probes.
        """
        try:
            # Before this worker can receive any connection.
            async with trio.open_nursery() as nursery:
                for number, channel in self._channels.items():
                    nursery.start_soon(self._find_displaced, number, channel)
            error = self._listen()
            task_status.started()
            if error is not None:
                # Not fatal: its connections are served by the workers that accept them.
                self._log.error("handoff.bind_failed", error=str(error))
            while error is not None and not self._left:
                await trio.sleep(REBIND_S)
                error = self._listen()
            if self._listener is not None:
                with self._listener as listener:
                    await self._accept(listener, receive, has_room)
            await trio.sleep_forever()
        finally:
            for channel in self._channels.values():
                channel.close()

    def leave(self) -> None:
        """Accept no further handoffs, except those that were sent before. Peers are notified."""
        self._left = True
        if self._listener is not None:
            close_now(self._listener)
            self._listener = None
        for receiver in self._receivers:
            # A send to it fails from now on; what is queued can still be read: unix(7).
            with contextlib.suppress(OSError):
                receiver.shutdown(socket.SHUT_RD)

    async def _find_displaced(self, number: int, channel: HandoffChannel) -> None:
        """Query a peer for sessions that it hosts and that belong here."""
        answer = await channel.query(_AWAY + str(self._worker).encode())
        with contextlib.suppress(msgspec.MsgspecError):
            found = msgspec.json.decode(answer, type=list[str])
            self._displaced |= dict.fromkeys(found[:_MAX_DISPLACED], number)

    def _answer(self, query: bytes) -> bytes | None:
        """The answer to a query; None if it is invalid."""
        if query.startswith(_HOSTED):
            session_id = query[len(_HOSTED) :].decode(errors="replace")
            return YES if session_id in self._hosted() else NO
        if query.startswith(_AWAY):
            home = query[len(_AWAY) :].decode(errors="replace")
            displaced = [
                session_id
                for session_id in self._hosted()
                if str(preference(session_id, self._workers)[0]) == home
            ]
            return msgspec.json.encode(displaced[:_MAX_DISPLACED])
        return None

    def _listen(self) -> OSError | None:
        """Bind and listen, unless this worker has left; the error if it failed."""
        if not self._left:
            try:
                self._listener = _listening(self._address)
            except OSError as error:
                return error
        return None

    async def _accept(self, listener: socket.socket, receive: Receive, has_room: HasRoom) -> None:
        exhausted = False  # no file descriptors or memory: log it once, not ten times a second
        async with trio.open_nursery() as nursery:
            while listener.fileno() != -1:
                try:
                    await trio.lowlevel.wait_readable(listener)
                    receiver, _ = listener.accept()
                except BlockingIOError:
                    continue
                except trio.ClosedResourceError:
                    return
                except OSError as error:
                    if error.errno == errno.EBADF:
                        return
                    if not exhausted:
                        self._log.error("handoff.accept_failed", error=str(error))
                    exhausted = True
                    await trio.sleep(_RETRY_S)
                    continue
                exhausted = False
                receiver.setblocking(False)
                if is_same_user(receiver):
                    # Add it before its task runs: `leave` must find it.
                    self._receivers.add(receiver)
                    nursery.start_soon(self._run_receiver, receiver, receive, has_room)
                else:
                    receiver.close()

    async def _run_receiver(
        self, receiver: socket.socket, receive: Receive, has_room: HasRoom
    ) -> None:
        with receiver:
            try:
                while await self._read(receiver, receive, has_room):
                    await trio.lowlevel.checkpoint()
            finally:
                self._receivers.discard(receiver)

    async def _read(self, receiver: socket.socket, receive: Receive, has_room: HasRoom) -> bool:
        """Process the messages that are queued; False at the end of the stream or after junk."""
        await trio.lowlevel.wait_readable(receiver)
        probed = False
        lost = 0
        try:
            for _ in range(_MESSAGE_BATCH):
                data, ancillary, flags, _ = receiver.recvmsg(
                    _MAX_RECEIVED_BYTES, socket.CMSG_LEN(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
                )
                descriptors = _descriptors(ancillary)
                if descriptors:
                    receive(_socket_of(descriptors[0]), data)
                elif flags & socket.MSG_CTRUNC:
                    # No file descriptor was left: the kernel has closed the connection.
                    lost += 1
                elif data == PROBE:
                    probed = True
                elif (answer := self._answer(data)) is not None:
                    receiver.send(answer)
                else:
                    return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        finally:
            if lost:
                self._log.error(
                    "handoff.connections_lost", error=os.strerror(errno.EMFILE), connections=lost
                )
        if probed:
            try:
                receiver.send(YES if has_room() and _has_descriptors(receiver) else NO)
            except OSError:
                return False
        return True


def _listening(address: bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(_ACCEPT_QUEUE)
    except BaseException:
        listener.close()
        raise
    return listener


def _socket_of(descriptor: int) -> socket.socket:
    """The socket of a received descriptor.

    Raises:
        OSError: it is no socket; the descriptor is closed.
    """
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise
    sock.setblocking(False)
    return sock


def _has_descriptors(sock: socket.socket) -> bool:
    """Whether a file descriptor is left; without one the kernel closes what is handed off."""
    try:
        os.close(os.dup(sock.fileno()))
    except OSError:
        return False
    return True


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """The file descriptors in the ancillary data of a message."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
