"""What the server counts while it works; metrics read it when they are scraped."""

from collections import Counter


class Counters:
    """Plain numbers, because a delivery must not pay for a metric.

    Attributes:
        accepted: TCP connections taken, from the kernel or another worker.
        passed_on: those of them that another worker has now.
        received: messages that came from clients.
        deliveries: frames of session events and ticks handed to a connection.
        dropped: volatile frames dropped for slow consumers.
        handshakes_refused: heads and upgrades turned away, by reason.
        closed: WebSocket connections the server closed, by close code.
        slow_consumers: those of them that were closed because their client was slow.
        errors: ``error`` answers, by code.
        joins: members that joined or resumed, by which of the two.
        conflicts: commits that others were faster than.
        relay_losses: subscriptions that were lost while Redis was not.
        relayed: changes of other servers that were passed on.
        reconciled: merges that had to be written back to Redis.
        unreadable: times that something stored could not be read.
        failovers: losses of Redis, by reason.
    """

    __slots__ = (
        "accepted",
        "closed",
        "conflicts",
        "deliveries",
        "dropped",
        "errors",
        "failovers",
        "handshakes_refused",
        "joins",
        "passed_on",
        "received",
        "reconciled",
        "relay_losses",
        "relayed",
        "slow_consumers",
        "unreadable",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.passed_on = 0
        self.received = 0
        self.deliveries = 0
        self.dropped = 0
        self.conflicts = 0
        self.reconciled = 0
        self.relay_losses = 0
        self.relayed = 0
        self.slow_consumers = 0
        self.unreadable = 0
        self.failovers: Counter[str] = Counter()
        self.handshakes_refused: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.joins: Counter[str] = Counter()
