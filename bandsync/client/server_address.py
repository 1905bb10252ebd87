"""The address of a session on a server, and how to connect to it."""

import re
import ssl
from collections.abc import Awaitable, Callable
from urllib.parse import quote, urlsplit

import trio
from msgspec import Struct

from bandsync.wire.commands import is_session_id

_PORTS = {"ws": 80, "wss": 443}
# Characters of a path (RFC 3986 section 3.3), and % for what is already encoded.
_IN_PATHS = "/%:@!$&'()*+,;=~"
# Characters of a host; % is for the zones of IPv6.
_HOST = re.compile(r"[-\w.:%]+")

OpenStream = Callable[[], Awaitable[trio.abc.Stream]]


class ServerAddress(Struct, frozen=True):
    """Everything that a handshake needs.

    Attributes:
        host: value of the ``Host`` header.
        path: path of the request.
        open_stream: connects, TLS handshake included.
    """

    host: str
    path: str
    open_stream: OpenStream


def address_of(
    url: str,
    session_id: str,
    ssl_context: ssl.SSLContext | None = None,
    open_stream: OpenStream | None = None,
) -> ServerAddress:
    """The address of a session on a server.

    Args:
        url: ``ws://host:port`` or ``wss://…``, with the path of a proxy if there is one.
            Characters that a request line cannot contain are percent-encoded.
        ssl_context: for ``wss``; None for the system's certificate authorities.
        open_stream: used instead of TCP.

    Raises:
        ValueError: the URL or the session id is invalid.
    """
    parts = urlsplit(url)
    host = _ascii(parts.hostname or "")
    if "@" in parts.netloc:
        # Do not quote the URL: it may contain a password.
        raise ValueError("the address of a server has neither user nor password")
    is_server = parts.scheme in _PORTS and bool(host) and parts.port != 0
    if not is_server or parts.query or parts.fragment:
        raise ValueError(
            f"{url!r} is not an address of a server: ws://host:port or wss://host:port"
        )
    if not is_session_id(session_id):
        raise ValueError(f"{session_id!r} is not a session id: 1 to 64 of A-Z a-z 0-9 . _ -")
    secure = parts.scheme == "wss"
    if ssl_context is not None and not secure:
        raise ValueError("an ssl_context is for wss:// addresses")
    default = _PORTS[parts.scheme]
    port = default if parts.port is None else parts.port
    if secure and ssl_context is None and open_stream is None:
        # Create it once: loading the certificate authorities takes long enough to disturb a beat.
        ssl_context = ssl.create_default_context()
    bracketed = f"[{host}]" if ":" in host else host

    async def tcp() -> trio.abc.Stream:
        if not secure:
            return await trio.open_tcp_stream(host, port)
        stream = await trio.open_ssl_over_tcp_stream(
            host, port, ssl_context=ssl_context, https_compatible=True
        )
        try:
            # Handshake now: a certificate error is then reported as such, not as a broken
            # connection at the first message.
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    return ServerAddress(
        host=bracketed if port == default else f"{bracketed}:{port}",
        path=f"{quote(parts.path.rstrip('/'), safe=_IN_PATHS)}/ws/{session_id}",
        open_stream=open_stream or tcp,
    )


def _ascii(host: str) -> str:
    """The host in ASCII, as DNS and TLS use it; empty if it is invalid."""
    if not _HOST.fullmatch(host):
        return ""
    try:
        # IPv6 addresses are not encoded.
        return host if ":" in host else host.encode("idna").decode()
    except UnicodeError:
        return ""
