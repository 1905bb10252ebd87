"""The deciding server, as far as the rules depend on it."""

from typing import Literal

from msgspec import Struct


class ServerContext(Struct, frozen=True):
    """The deciding server, as far as the rules depend on it.

    Attributes:
        server_id: name of the server.
        boot_id: id of this process, new at every start.
        max_members: limit for the sessions it creates.
        leadership: ``open`` lets any member claim the lead at any time.
        isolated: True in memory mode: members on other servers are out of reach.
        awaited: True while Redis is expected back: tombstones are kept until it has them.
    """

    server_id: str
    boot_id: str
    max_members: int
    leadership: Literal["claim", "open"] = "claim"
    isolated: bool = True
    awaited: bool = False
