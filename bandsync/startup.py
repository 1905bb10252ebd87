"""The start of a server on this machine: sockets, TLS, name, Redis access, first storage mode.

Every failure that an operator can correct is a `StartError`; its message says what to change.
"""

import socket
import ssl

import trio
from msgspec import Struct

from bandsync.net.listener import open_listeners
from bandsync.settings import Settings
from bandsync.storage.manager import StorageManager
from bandsync.storage.redis_connector import RedisConnector


class StartError(Exception):
    """The server cannot start; the message says what to change."""


class ListenPlacement(Struct, frozen=True):
    """The place of this process in its worker group, and the sockets it listens on.

    Attributes:
        worker: number of this process among the workers that share the port, from 1.
        group: random name that only the workers of this group know; None without other workers.
        shared: listening sockets on `PORT`, which all workers share.
        own: listening sockets on this worker's port of `WORKER_PORTS`; empty without that setting.
    """

    worker: int
    group: str | None
    shared: list[socket.socket]
    own: list[socket.socket]


def redis_connector(settings: Settings, server_id: str) -> RedisConnector | None:
    """The factory of Redis connections; None if Redis is disabled.

    Raises:
        StartError: `REDIS_URL` cannot be parsed.
    """
    if not settings.redis_enabled:
        return None
    try:
        return RedisConnector(settings, server_id)
    except ValueError as error:
        raise StartError(f"REDIS_URL=(not shown): {error}") from error


async def wait_until_settled(manager: StorageManager, settings: Settings, server_id: str) -> None:
    """Wait for a usable Redis, with a deadline: without it the server starts in memory mode.

    Raises:
        StartError: Redis is required and cannot be used, or another server has the same name.
    """
    patience_ms = settings.redis_health_timeout_ms
    # Workers with separate sessions in memory would split every band.
    required = settings.redis_required or settings.workers > 1
    if required:
        patience_ms += settings.redis_connect_timeout
    while True:
        with trio.move_on_after(patience_ms / 1000):
            await manager.settled.wait()
        # It takes longer to find out that an entry under our name is stale.
        if not manager.claiming:
            break
    if manager.name_taken is not None:
        raise StartError(
            f"SERVER_ID={server_id!r}: {manager.name_taken}; give each server a name of its own"
        )
    if required and manager.storage_type != "redis":
        asked, instead = "REDIS_REQUIRED=true", "REDIS_REQUIRED=false"
        if settings.workers > 1:
            asked, instead = f"WORKERS={settings.workers} share their sessions", "WORKERS=1"
        raise StartError(
            f"{asked}: Redis cannot be used: {manager.reason}. "
            f"Start Redis, correct the REDIS_ settings, or set {instead}"
        )


async def open_placement(settings: Settings, worker: int, group: str | None) -> ListenPlacement:
    """Listen on the shared port, and on this worker's own port if there is one.

    Args:
        worker: number of this process in its group, from 1.
        group: see `ListenPlacement`.

    Raises:
        StartError: an address cannot be used.
    """
    shared = await listen(settings, "PORT", settings.port, shared=settings.workers > 1)
    if settings.worker_ports is None:
        return ListenPlacement(worker, group, shared, [])
    try:
        own = await listen(settings, "WORKER_PORTS", settings.worker_ports + worker - 1)
    except BaseException:
        for listener in shared:
            listener.close()
        raise
    return ListenPlacement(worker, group, shared, own)


async def listen(
    settings: Settings, name: str, port: int, *, shared: bool = False
) -> list[socket.socket]:
    """Open listening sockets on ``port``.

    Args:
        name: the setting that names the port, for the error message.
        shared: see `open_listeners`.

    Raises:
        StartError: the address cannot be used.
    """
    try:
        return await open_listeners(settings.host, port, shared=shared)
    except OSError as error:
        raise StartError(
            f"HOST={settings.host!r} {name}={port}: cannot listen there: {error}"
        ) from error


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context of the server; None if it serves plain HTTP.

    Raises:
        StartError: the certificate or its key cannot be read.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            f"TLS_CERT={settings.tls_cert!r} TLS_KEY={settings.tls_key!r}: "
            f"must be a PEM certificate chain and its key: {error}"
        ) from error
    return context


def server_name(settings: Settings, port: int) -> str:
    """The id of this server: `SERVER_ID`, by default host name and port."""
    return settings.server_id or f"{socket.gethostname()}-{port}"


def url_of(settings: Settings, port: int) -> str:
    """The address to open in a browser."""
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"
