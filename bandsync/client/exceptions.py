"""What can go wrong, as exceptions; `ClientError` is the root of all that this package raises.

```
ClientError
├── CommandRefused   the server said no to a command; nothing has changed
├── NotConnected     there is no connection just now; nothing was sent
├── ConnectionLost   the answer did not come; the change may or may not have happened
└── Ended            the client has given up its place; `connect` raises it
    ├── JoinRefused  the server does not let us in, and trying again would not help
    ├── Superseded   the same member has resumed elsewhere
    └── Unreachable  there was no connection for as long as was allowed
```

Arguments that can never be right (an address that is none) are a `ValueError`.
"""

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """The root."""


class CommandRefused(ClientError):  # noqa: N818  # names of the tree above read as sentences
    """The server said no to a command; nothing has changed, and the connection stays open.

    Attributes:
        code: which refusal it is: ``not_leader``, ``invalid_field``, … (protocol.md section 6).
        message: a sentence that says what to do about it.
        context: more about it, such as the ``field`` that was wrong; often empty.
    """

    def __init__(self, code: str, message: str, context: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.context: Mapping[str, Any] = context or {}


class NotConnected(ClientError):  # noqa: N818
    """There is no connection just now, or no more; nothing was sent."""

    def __init__(self, message: str = "there is no connection just now; nothing was sent") -> None:
        super().__init__(message)


class ConnectionLost(ClientError):  # noqa: N818
    """The answer to a command did not come: the change may or may not have happened.

    After the resume the session shows which.
    """

    def __init__(self, message: str = "no answer came: it may or may not have happened") -> None:
        super().__init__(message)


class Ended(ClientError):  # noqa: N818
    """The client has given up its place and will not come back: only a person can help."""


class JoinRefused(Ended):
    """The server does not let us in, and trying again would not help.

    Attributes:
        code: ``unauthorized``, ``session_full``, ``invalid_field``, … (protocol.md section 6);
            ``policy`` when the connection was closed with 1008 or the first handshake answered
            with 401 or 403; ``unsupported_protocol`` when the server speaks a version that we do
            not.
        message: a sentence that says what to do about it.
        context: more about it; often empty.
    """

    def __init__(self, code: str, message: str, context: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.context: Mapping[str, Any] = context or {}


class Superseded(Ended):
    """The same member has resumed elsewhere (close code 4001)."""

    def __init__(self) -> None:
        super().__init__("the same member has resumed elsewhere")


class Unreachable(Ended):
    """There was no connection for as long as was allowed; the cause is the latest failure.

    Attributes:
        close_code: that of the latest connection; 1006 if it had none, or there was none.
    """

    def __init__(self, why: str, close_code: int = 1006) -> None:
        super().__init__(f"no connection: {why}")
        self.close_code = close_code
