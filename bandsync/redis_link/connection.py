"""A connection to Redis: open, authenticate, and parse replies."""

import contextlib
import ssl
from collections.abc import Callable
from typing import Final, TypeAlias, cast

import anyio
import anyio.to_thread
import hiredis
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    TimeoutError,  # noqa: A004 -- the name redis-py gives it
)

from bandsync.redis_link.errors import LinkLostError, LossReason, loss_reason, reply_error
from bandsync.redis_link.redis_address import RedisAddress, TLSOptions

Argument: TypeAlias = bytes | str | int | float
# An error inside of an array is an element, as in the reply to EXEC.
Reply: TypeAlias = bytes | int | list["Reply | RedisError"] | None

# hiredis annotates tuples of exactly one element, and no result.
pack: Final = cast("Callable[[tuple[Argument, ...]], bytes]", hiredis.pack_command)

_RECEIVE_BYTES = 65_536
_INCOMPLETE: Final = object()


class RedisConnection:
    """A byte stream to Redis, and the parser of its replies."""

    __slots__ = ("_address", "_reader", "_stream")

    def __init__(self, stream: ByteStream, address: RedisAddress) -> None:
        self._stream = stream
        self._address = address
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse, replyError=reply_error, notEnoughData=_INCOMPLETE
        )

    async def send(self, data: bytes) -> None:
        """Send all of it. If cancelled, a part may have been sent: nothing may follow it.

        Raises:
            LinkLostError: the connection broke.
        """
        try:
            await self._stream.send(data)
        except (anyio.BrokenResourceError, ssl.SSLError) as error:
            raise self._broken(error) from error

    async def receive(self) -> list[Reply | RedisError]:
        """The replies that have arrived in full since the last call; perhaps none.

        Raises:
            LinkLostError: the connection broke or was closed.
            InvalidResponse: the data is not RESP.
        """
        try:
            data = await self._stream.receive(_RECEIVE_BYTES)
        except (anyio.EndOfStream, anyio.BrokenResourceError, ssl.SSLError) as error:
            raise self._broken(error) from error
        replies: list[Reply | RedisError] = []
        self._reader.feed(data)
        gets = self._reader.gets
        while (reply := gets()) is not _INCOMPLETE:
            replies.append(reply)
        return replies

    async def aclose(self) -> None:
        """Close it at once, without waiting for the peer."""
        await anyio.aclose_forcefully(self._stream)

    def _broken(self, error: Exception) -> LinkLostError:
        if isinstance(error, anyio.EndOfStream):
            return LinkLostError(f"{self._address} closed the connection")
        if isinstance(error, ssl.SSLError):
            return LinkLostError(f"{self._address}: {error}", "tls")
        return LinkLostError(f"{self._address}: {error.__cause__ or 'the connection broke'}")


async def connect(address: RedisAddress, *, name: str, timeout_s: float) -> RedisConnection:
    """Open a connection, authenticate, choose the database and give it its name.

    Args:
        name: what CLIENT LIST shows.
        timeout_s: deadline for all of it.

    Raises:
        RedisError: Redis cannot be reached or refuses us; `loss_reason` says why.
    """
    with anyio.move_on_after(timeout_s):
        connection = RedisConnection(await _open(address), address)
        try:
            await _introduce(connection, address, name)
        except LinkLostError as error:
            await connection.aclose()
            if address.tls is None or error.reason != "reset":
                raise
            # In TLS 1.3 a server that rejects the client certificate resets the connection.
            raise LinkLostError(f"{error} (does it want a certificate?)", "tls") from error
        except BaseException:
            await connection.aclose()
            raise
        return connection
    raise TimeoutError(f"{address}: no connection within {timeout_s:g} s")


async def _open(address: RedisAddress) -> ByteStream:
    try:
        if address.path is not None:
            return await anyio.connect_unix(address.path)
        context = None
        if address.tls is not None:
            context = await anyio.to_thread.run_sync(_context, address, address.tls)
        stream = await anyio.connect_tcp(address.host, address.port)
    except OSError as error:
        reason: LossReason = "refused" if _is_refusal(error) else "unreachable"
        raise LinkLostError(f"{address}: {error.__cause__ or error}", reason) from error
    if context is None:
        return stream
    try:
        # Redis closes without a TLS close_notify.
        return await TLSStream.wrap(
            stream, hostname=address.host, ssl_context=context, standard_compatible=False
        )
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
        await anyio.aclose_forcefully(stream)
        cause = error if isinstance(error, OSError) else "the handshake was cut off"
        raise LinkLostError(f"{address}: TLS: {cause}", "tls") from error
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


def _context(address: RedisAddress, options: TLSOptions) -> ssl.SSLContext:
    try:
        return options.context()
    except OSError as error:
        raise LinkLostError(f"{address}: TLS options: {error}", "tls") from error


def _is_refusal(error: BaseException | None) -> bool:
    """Whether one of the host's addresses refused the connection."""
    if isinstance(error, BaseExceptionGroup):
        return any(_is_refusal(each) for each in error.exceptions)
    return isinstance(error, ConnectionRefusedError) or (
        error is not None and _is_refusal(error.__cause__)
    )


async def _introduce(connection: RedisConnection, address: RedisAddress, name: str) -> None:
    commands = _introduction(address, name)
    with contextlib.suppress(LinkLostError):
        # Redis may have closed already; its error reply can still be read.
        await connection.send(b"".join(map(pack, commands)))
    awaited = iter(commands)
    answered = 0
    while answered < len(commands):
        for reply in await connection.receive():
            command = next(awaited, None)
            if command is None:
                raise InvalidResponse(f"{address}: unexpected reply")
            answered += 1
            if isinstance(reply, RedisError):
                _raise_refusal(address, command, reply)


def _introduction(address: RedisAddress, name: str) -> list[tuple[Argument, ...]]:
    commands: list[tuple[Argument, ...]] = []
    if address.username is not None:
        commands.append(("AUTH", address.username, address.password or ""))
    elif address.password is not None:
        commands.append(("AUTH", address.password))
    if address.db != 0:
        commands.append(("SELECT", address.db))
    commands.append(("CLIENT", "SETNAME", name))
    return commands


def _raise_refusal(address: RedisAddress, command: tuple[Argument, ...], error: RedisError) -> None:
    """Raise the exception for an error reply to an introductory command."""
    verb = command[0]
    if verb == "CLIENT" and isinstance(error, NoPermissionError):
        # The name is optional, and a user may lack the right to set it.
        return
    if loss_reason(error) is not None:
        raise error
    if verb == "AUTH":
        raise AuthenticationError(f"{address}: {error}")
    raise LinkLostError(f"{address}: {verb!s}: {error}", "refused")
