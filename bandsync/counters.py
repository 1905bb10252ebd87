"""What the server counts while it works; metrics read it when they are scraped."""

from collections import Counter


class Counters:
    """Plain numbers, because a delivery must not pay for a metric.

    Attributes:
        accepted: TCP connections taken.
        received: messages that came from clients.
        deliveries: frames of session events and ticks handed to a connection.
        dropped: volatile frames dropped for slow consumers.
        handshakes_refused: heads and upgrades turned away, by reason.
        closed: WebSocket connections the server closed, by close code.
        errors: ``error`` answers, by code.
        joins: members that joined or resumed, by which of the two.
    """

    __slots__ = (
        "accepted",
        "closed",
        "deliveries",
        "dropped",
        "errors",
        "handshakes_refused",
        "joins",
        "received",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.received = 0
        self.deliveries = 0
        self.dropped = 0
        self.handshakes_refused: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.joins: Counter[str] = Counter()
