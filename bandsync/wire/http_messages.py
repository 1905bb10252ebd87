"""HTTP requests and responses as data, and the rule about origins."""

from collections.abc import Collection
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

# Longest request head; a longer one is answered with 431.
MAX_HEAD_BYTES = 16_384


class HttpRequest(Struct, frozen=True):
    """A request's head.

    Attributes:
        path: without the query.
        headers: by lower-case name; repeated headers joined by commas.
        query: the raw text after the question mark.
    """

    method: str
    path: str
    headers: dict[str, str]
    query: str = ""


class HttpResponse(Struct, frozen=True):
    """A response; ``body`` is sent with its length."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def json_response(
    status: int, document: object, headers: tuple[tuple[str, str], ...] = ()
) -> HttpResponse:
    """A response with ``document`` as JSON."""
    return HttpResponse(status, msgspec.json.encode(document), headers=headers)


def problem(status: int, error: str, message: str) -> HttpResponse:
    """An error as JSON: a code, and a sentence that says what to do about it."""
    return json_response(status, {"error": error, "message": message})


def is_upgrade(request: HttpRequest) -> bool:
    """Whether the client asks for a WebSocket (RFC 6455 section 4.2.1)."""
    connection = {part.strip().lower() for part in request.headers.get("connection", "").split(",")}
    return (
        request.method == "GET"
        and "upgrade" in connection
        and request.headers.get("upgrade", "").lower() == "websocket"
    )


def origin_allowed(request: HttpRequest, allowed: Collection[str]) -> bool:
    """Whether a page of the request's origin may connect.

    Args:
        allowed: origins besides the server's own, such as ``https://band.example``, or ``*``. A
            client that sends no origin is not a page and is always allowed.
    """
    origin = request.headers.get("origin")
    if origin is None:
        return True
    if "*" in allowed or origin.lower() in allowed:
        return True
    try:
        return urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()
    except ValueError:
        return False
