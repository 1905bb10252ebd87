"""The deadlines that all connections to Redis share."""

from msgspec import Struct


class Timeouts(Struct, frozen=True):
    """How long Redis may take, in seconds.

    Attributes:
        connect_s: to open a connection: TCP, TLS, authentication and database together.
        command_s: age of a command without a reply, counted from when it was sent.
        silence_s: time without any data from Redis while a reply is outstanding.
        health_interval_s: time between two health checks.
    """

    connect_s: float
    command_s: float
    silence_s: float
    health_interval_s: float
