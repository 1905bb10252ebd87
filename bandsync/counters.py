"""Counters of the server; metrics read them at a scrape."""

from collections import Counter


class Counters:
    """Plain integers: incrementing a Prometheus metric for every delivery costs too much.

    Attributes:
        accepted: TCP connections accepted, or received from another worker by handoff.
        passed_on: connections handed off to another worker.
        received: messages from clients.
        deliveries: frames of session events and ticks handed to a connection.
        dropped: volatile frames dropped for slow consumers.
        handshakes_refused: HTTP heads and upgrades refused, by reason.
        closed: WebSocket connections closed by the server, by close code.
        slow_consumers: connections closed because their client was slow.
        errors: ``error`` answers, by code.
        joins: members that joined or resumed, by which of the two.
        conflicts: commits refused by compare-and-set because another server was faster.
        relay_losses: subscriptions lost while Redis was in use.
        relayed: changes of other servers sent to members here.
        reconciled: merges written back to Redis.
        unreadable: stored sessions or messages that could not be decoded.
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
