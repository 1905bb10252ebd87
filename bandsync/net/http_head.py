"""The HTTP head of a connection: bounded, timed, taken apart by h11."""

from http import HTTPStatus

import h11
import trio
from msgspec import Struct

from bandsync.wire.http_messages import MAX_HEAD_BYTES, HttpRequest, HttpResponse, problem


class Head(Struct, frozen=True):
    """A request, and the bytes it was read from.

    Attributes:
        received: the head, and what came after it.
        size: of the head, bytes.
    """

    request: HttpRequest
    target: str
    received: bytes
    size: int

    @property
    def rest(self) -> bytes:
        """What came after the head."""
        return self.received[self.size :]

    @property
    def normal(self) -> bytes:
        """The head, with one header of each name: not every parser joins them itself."""
        lines = [f"{self.request.method} {self.target} HTTP/1.1"]
        lines += [f"{name}: {text}" for name, text in self.request.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class BadHeadError(Exception):
    """No request could be read; ``response`` says why."""

    def __init__(self, response: HttpResponse) -> None:
        super().__init__(response.status)
        self.response = response


async def read_head(stream: trio.abc.ReceiveStream, http: h11.Connection) -> Head | None:
    """Read one request's head. Who calls sets the deadline.

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
        # Never more than one byte over the limit: what follows the head is somebody else's.
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
    if response.status != HTTPStatus.NOT_MODIFIED:  # What these say would be of the 200.
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
    """After an answer: whether the connection can be used for another request."""
    try:
        http.next_event()
        if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
            return False  # A body, which nobody reads, or ``Connection: close``.
        http.start_next_cycle()
    except h11.ProtocolError:
        return False
    return True
