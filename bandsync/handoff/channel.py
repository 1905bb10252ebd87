"""The way from one worker to another: it is asked, and connections are passed on to it."""

import array
import contextlib
import errno
import math
import os
import socket
import struct

import trio
from structlog.typing import FilteringBoundLogger

# How long one waits for an answer: longer than a worker is busy when a thousand come at once.
ANSWER_S = 2.0
# How long it is good for.
FRESH_S = 0.1
# For how long nobody asks who did not answer.
SHUN_S = 5.0
# How long a connection waits in all for one that answers, but has more to take than it can.
PATIENCE_S = 10.0

# Whether connections can be passed on; YES, or NO: there is no room.
ASK = b"?"
YES = b"!"
NO = b"-"
MOST_ANSWER_BYTES = 100_000
# Sending to a neighbour that has left, or died.
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})
_CREDENTIALS = struct.Struct("3i")  # ucred: pid, uid, gid


class _Asking:
    """A question that is under way, for all who want to know the same.

    Attributes:
        over: set when it is answered, or nobody answers.
        outlet: where to send what is passed on; None if the neighbour cannot take it.
    """

    def __init__(self) -> None:
        self.over = trio.Event()
        self.outlet: socket.socket | None = None


class HandoffChannel:
    """The way to one neighbour."""

    def __init__(self, address: bytes, log: FilteringBoundLogger) -> None:
        self._address = address
        self._log = log
        self._outlet: socket.socket | None = None
        self._asking: _Asking | None = None
        self._turn = trio.Lock()
        self._answered_at = -math.inf
        self._shunned_until = -math.inf

    async def pass_on(self, sock: socket.socket, received: bytes) -> bool:
        """Pass a connection on; False if the neighbour is away, silent, or has no room.

        Args:
            received: all that was read from ``sock``.
        """
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

    async def ask(self, question: bytes) -> bytes:
        """The answer to a question that is rare; empty if there is none, or not in time."""
        answer = b""
        if trio.current_time() < self._shunned_until:
            return answer
        with trio.move_on_after(ANSWER_S), contextlib.suppress(OSError):
            # One at a time: so many at once would keep those out who pass something on.
            async with self._turn:
                # On a connection of its own: no other answer can be taken for this one.
                with _connected(self._address) as outlet:
                    answer = await _asked(outlet, question)
        return answer

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
        elif answer == NO:
            self._shunned_until = now + FRESH_S
        elif answer == YES:
            self._answered_at = now
            return self._outlet
        return None

    async def _try_to_ask(self) -> bytes:
        """The answer; empty if there is nobody."""
        try:
            if self._outlet is None:
                self._outlet = _connected(self._address)
            return await _asked(self._outlet, ASK)
        except (OSError, trio.ClosedResourceError):
            self.close()
            return b""

    def close(self) -> None:
        """Hang up; whoever passes something on connects anew."""
        self._answered_at = -math.inf
        if self._outlet is not None:
            close_now(self._outlet)
            self._outlet = None


def address_of(crew: str, worker: int) -> bytes:
    """Abstract, unix(7): there is no file that somebody has to be allowed to write, or to remove.

    Nor does one keep others out: `is_ours` does.
    """
    return f"\0bandsync-{crew}-{worker}".encode()


def _connected(address: bytes) -> socket.socket:
    """Connected to who listens there.

    Raises:
        OSError: nobody does, too many wait, or it is a stranger.
    """
    outlet = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        outlet.setblocking(False)
        outlet.connect(address)
        if not is_ours(outlet):
            raise PermissionError("the name of a neighbour is taken by somebody else")
    except BaseException:
        outlet.close()
        raise
    return outlet


def is_ours(sock: socket.socket) -> bool:
    """Whether the process at the other end is run by the same user."""
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return bool(user == os.geteuid())


async def _asked(outlet: socket.socket, question: bytes) -> bytes:
    """What is answered there; empty at the end.

    Raises:
        OSError: nobody is there any more.
    """
    while True:
        try:
            outlet.send(question)
            break
        except BlockingIOError:
            await trio.lowlevel.wait_writable(outlet)
    while True:
        await trio.lowlevel.wait_readable(outlet)
        with contextlib.suppress(BlockingIOError):
            return outlet.recv(MOST_ANSWER_BYTES)


def _send(outlet: socket.socket, data: bytes, sock: socket.socket) -> None:
    """Send one message with a descriptor: all of it, or an error is raised.

    Raises:
        BlockingIOError: too much is there that has not been taken.
        OSError: nobody takes it any more, or it cannot be sent.
    """
    descriptors = array.array("i", [sock.fileno()])
    outlet.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])


def close_now(sock: socket.socket) -> None:
    """Close, and wake who waits for it."""
    trio.lowlevel.notify_closing(sock)
    sock.close()
