"""HTTP heads: reading one within its limits, and the bytes of an answer. Parsed by h11."""

from http import HTTPStatus

import h11
import trio
from msgspec import Struct

from bandsync.wire.http_messages import MAX_HEAD_BYTES, HttpRequest, HttpResponse, problem

# Headers that trio-websocket reads, besides ``Sec-WebSocket-…``.
_UPGRADE_HEADERS = frozenset({"connection", "host", "upgrade"})


class Head(Struct, frozen=True):
    """A request, and the bytes that it was read from.

    Attributes:
        target: path and query, as they were sent.
        received: the head, and the bytes that followed it.
        size: of the head, bytes.
    """

    request: HttpRequest
    target: str
    received: bytes
    size: int

    @property
    def rest(self) -> bytes:
        """The bytes that followed the head."""
        return self.received[self.size :]

    @property
    def handshake(self) -> bytes:
        """The head of an upgrade, written anew for trio-websocket.

        trio-websocket accepts bytes only, and not those of every client: of two ``Connection``
        headers it reads the last one. So each name occurs once here. Headers that do not belong to
        the handshake (cookies, user agent) are left out: they would be kept as long as the
        connection.
        """
        lines = [f"{self.request.method} {self.target} HTTP/1.1"]
        lines += [
            f"{name}: {text}"
            for name, text in self.request.headers.items()
            if name in _UPGRADE_HEADERS or name.startswith("sec-websocket-")
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class BadHeadError(Exception):
    """The head is malformed or too large. ``response`` is the answer to send."""

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(response.status)
        self.response = response


async def read_head(stream: trio.abc.ReceiveStream, http: h11.Connection) -> Head | None:
    """Read the head of one request. The caller sets the deadline.

    Args:
        http: a connection whose previous exchange, if any, is complete.

    Returns:
        None if the peer closed before it sent a byte.

    Raises:
        BadHeadError: it is malformed or over `MAX_HEAD_BYTES`.
        trio.BrokenResourceError: the connection was reset, or closed in the middle.
    """
    raw, _ = http.trailing_data
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as error:
            raise _bad_head(error.error_status_hint) from None
        if isinstance(event, h11.Request):
            break
        if event is not h11.NEED_DATA:
            return None
        # Read at most one byte over the limit: bytes after the head belong to the WebSocket.
        if len(raw) > MAX_HEAD_BYTES:
            raise _bad_head(431)
        data = await stream.receive_some(MAX_HEAD_BYTES + 1 - len(raw))
        if not data and raw:
            raise trio.BrokenResourceError("closed in the middle of a head")
        raw += data
        http.receive_data(bytes(data))
    rest, _ = http.trailing_data
    if len(raw) - len(rest) > MAX_HEAD_BYTES:
        raise _bad_head(431)
    headers: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode("ascii"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    target = event.target.decode("ascii")
    path, _, query = target.partition("?")
    request = HttpRequest(event.method.decode("ascii"), path, headers, query)
    return Head(request, target, raw, len(raw) - len(rest))


def _bad_head(status: int) -> BadHeadError:
    if status == 431:
        message = f"A request's head has at most {MAX_HEAD_BYTES} bytes."
        return BadHeadError(problem(431, "head_too_large", message))
    return BadHeadError(problem(400, "bad_request", "This is no HTTP/1.1 request."))


def response_bytes(http: h11.Connection, response: HttpResponse, *, with_body: bool) -> bytes:
    """The bytes of an answer, for the state that ``http`` is in."""
    headers = list(response.headers)
    if response.status != HTTPStatus.NOT_MODIFIED:  # Here they would describe the 200.
        headers += [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
        ]
    reason = HTTPStatus(response.status).phrase
    parts = [http.send(h11.Response(status_code=response.status, headers=headers, reason=reason))]
    if with_body:
        parts.append(http.send(h11.Data(data=response.body)))
    parts.append(http.send(h11.EndOfMessage()))
    return b"".join(part for part in parts if part)


def next_exchange(http: h11.Connection) -> bool:
    """Whether another request can follow on the connection, after an answer."""
    try:
        http.next_event()
        if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
            return False  # A request body, which is never read, or ``Connection: close``.
        http.start_next_cycle()
    except h11.ProtocolError:
        return False
    return True
