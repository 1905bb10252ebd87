"""Access control of the operators' pages: requests carry ``ADMIN_TOKEN``."""

import base64
import binascii
import hmac

from bandsync.wire.http_messages import HttpRequest, HttpResponse, problem

# A browser that receives this challenge prompts for the token (RFC 7617).
_BASIC = 'Basic realm="BandSync operators", charset="UTF-8"'


def is_admitted(request: HttpRequest, token: str) -> bool:
    """Whether a request carries the token, as Bearer or as the Basic password of any user."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    given = credentials.strip().encode("latin-1")
    match scheme.lower():
        case "bearer":
            pass
        case "basic":
            given = _password(given)
        case _:
            return False
    return hmac.compare_digest(given, token.encode())


def unauthorized(*, ask: bool) -> HttpResponse:
    """The answer to a request without the token.

    Args:
        ask: whether a browser prompts for it.
    """
    answer = problem(401, "unauthorized", "Send `Authorization: Bearer` with the ADMIN_TOKEN.")
    challenges = ("Bearer", _BASIC) if ask else ("Bearer",)
    headers = tuple(("WWW-Authenticate", challenge) for challenge in challenges)
    return HttpResponse(answer.status, answer.body, answer.content_type, headers)


def _password(credentials: bytes) -> bytes:
    """The password of Basic credentials; empty if they are malformed."""
    try:
        decoded = base64.b64decode(credentials, validate=True)
    except binascii.Error:
        return b""
    return decoded.partition(b":")[2]
