"""The exceptions of the client; `ClientError` is the root of all.

```
ClientError
├── CommandRefused   the server refused a command; nothing has changed
├── NotConnected     there is no connection at the moment; nothing was sent
├── ConnectionLost   no reply arrived; the command may or may not have been applied
└── Ended            the client has stopped for good; `connect` raises it
    ├── JoinRefused  the server refused the join, and a retry would not help
    ├── Superseded   the same member has resumed elsewhere
    └── Unreachable  there was no connection within the time limit
```

Invalid arguments, such as a malformed address, raise `ValueError`.
"""

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """The root of all exceptions of the client."""


class CommandRefused(ClientError):  # noqa: N818  # names of the tree above read as sentences
    """The server refused a command; nothing has changed, and the connection stays open.

    Attributes:
        code: the error code: ``not_leader``, ``invalid_field``, … (`PROTOCOL.md` lists all).
        message: a sentence that says what to do about it.
        context: details, such as the invalid ``field``; often empty.
    """

    def __init__(self, code: str, message: str, context: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.context: Mapping[str, Any] = context or {}


class NotConnected(ClientError):  # noqa: N818
    """There is no connection at the moment, or the client has ended; nothing was sent."""

    def __init__(
        self, message: str = "there is no connection at the moment; nothing was sent"
    ) -> None:
        super().__init__(message)


class ConnectionLost(ClientError):  # noqa: N818
    """No reply to a command arrived: it may or may not have been applied.

    After the resume, the session shows which.
    """

    def __init__(
        self, message: str = "no reply arrived: the command may or may not have been applied"
    ) -> None:
        super().__init__(message)


class Ended(ClientError):  # noqa: N818
    """The client has stopped and does not reconnect: only a person can help."""


class JoinRefused(Ended):
    """The server refused the join, and a retry would not help.

    Attributes:
        code: ``unauthorized``, ``session_full``, ``invalid_field``, … (`PROTOCOL.md` lists all);
            ``policy`` when the connection was closed with 1008, or the first handshake was refused
            with 401 or 403; ``unsupported_protocol`` when the server speaks another version.
        message: a sentence that says what to do about it.
        context: details; often empty.
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
    """There was no connection within the time limit; ``__cause__`` is the latest failure.

    Attributes:
        close_code: close code of the latest connection; 1006 without one.
    """

    def __init__(self, why: str, close_code: int = 1006) -> None:
        super().__init__(f"no connection: {why}")
        self.close_code = close_code
