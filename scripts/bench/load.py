"""Actions of a fleet's clients: join, commands in a closed loop, chat, tick latencies."""

import gc
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

from scripts.bench.fleet import ACK, Fleet, FleetClient, masked
from scripts.bench.processes import BenchError, now_s, wall_ms

WARM_UP_S = 2.0
SETTLE_S = 0.5
TICK = b'{"type":"scroll_tick"'

_SLOW_LIMIT_S = 60.0
_LEAST_POLL_S = 0.0002


class Latencies:
    """Ages of the ticks that some clients receive, milliseconds."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def watch(self, clients: Iterable[FleetClient]) -> None:
        """Record the age of each tick of ``clients`` from now on."""
        for client in clients:
            client.on_text = self._note

    def take(self) -> list[float]:
        """Return the ages recorded since the previous call."""
        taken, self.values = self.values, []
        return taken

    def _note(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(TICK, start):
            at = data.index(b'"serverTime":', start, end) + 13
            self.values.append(wall_ms() - float(data[at : data.index(b",", at, end)]))


class ClosedLoop:
    """Keeps two commands of every leader in flight.

    Args:
        frames: the commands, sent in turn.
        answered: maps a received frame ``data[start:end]`` to the index of the answered command;
            None for none, -1 for the oldest one.

    Attributes:
        outstanding: number of commands without a reply.
        answers: number of replies so far.
    """

    def __init__(
        self, frames: Sequence[bytes], answered: Callable[[bytes, int, int], int | None]
    ) -> None:
        self._frames = frames
        self._answered = answered
        self._running = False
        self._loops: list[Callable[[], None]] = []
        self.outstanding = 0
        self.answers = 0

    def add(self, leader: FleetClient, receiver: FleetClient | None = None) -> None:
        """Let ``leader`` take part. Replies arrive at ``receiver`` if it is given."""
        waiting: list[int] = []
        following = 0

        def send() -> None:
            nonlocal following
            waiting.append(following)
            leader.send(self._frames[following])
            following = (following + 1) % len(self._frames)
            self.outstanding += 1

        def receive(data: bytes, start: int, end: int) -> None:
            answered = self._answered(data, start, end)
            if answered is None:
                return
            waiting.remove(waiting[0] if answered < 0 else answered)
            self.outstanding -= 1
            self.answers += 1
            if self._running:
                send()

        (receiver or leader).on_text = receive
        self._loops.append(send)

    def start(self) -> None:
        """Send the first commands."""
        self._running = True
        for send in self._loops:
            send()
            send()

    def stop(self, fleet: Fleet) -> None:
        """Send no more commands, and wait for the outstanding replies."""
        self._running = False
        fleet.run_until(lambda: self.outstanding == 0)


class ChatSender:
    """Lets every leader send long chat messages at a constant rate.

    Args:
        fleet: the leaders' fleet.
        leaders: the senders.
        per_second: messages of each leader.
    """

    def __init__(self, fleet: Fleet, leaders: Sequence[FleetClient], per_second: float) -> None:
        # Four bytes per character: the longest allowed chat message.
        self.frame = masked({"type": "chat_message", "text": "\N{GUITAR}" * 1000})
        self._fleet = fleet
        self._leaders = cycle(leaders)
        self._interval_s = 1 / (per_second * len(leaders))

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Send and receive until ``ended``."""
        due = began = now_s()
        for leader in self._leaders:
            if ended():
                return
            if due - began > _SLOW_LIMIT_S:
                raise BenchError("no consumer was too slow: send more")
            leader.send(self.frame)
            due += self._interval_s
            # Receive even when sending is late.
            self._fleet.run_for(max(due - now_s(), _LEAST_POLL_S))


def after(seconds: float) -> Callable[[], bool]:
    """A function that returns whether this time has passed since now."""
    end = now_s() + seconds
    return lambda: now_s() >= end


def join(
    fleet: Fleet, sessions: int, members: int, *, slow: bool = False, ticks: bool = True
) -> list[FleetClient]:
    """Fill the sessions. Members take turns on the servers. The first member of each session leads.

    Args:
        fleet: opens the connections.
        sessions: number of sessions.
        members: of each session.
        slow: give the last member of each session a small receive buffer.
        ticks: whether the members request ticks.

    Returns:
        The leaders.
    """
    # Count acknowledgements, not snapshots: joins on two servers at once cause further snapshots.
    greeting = masked({"type": "join_session", "requestId": "join", "ticks": ticks})
    leaders = fleet.open(range(sessions), greeting)
    fleet.run_until(lambda: fleet.kinds[ACK] == sessions)
    for place in range(1, members):
        small = 16_384 if slow and place == members - 1 else None
        fleet.open(range(sessions), greeting, place=place, receive_buffer=small)
    fleet.run_until(lambda: fleet.kinds[ACK] == sessions * members)
    return leaders


def disable_garbage_collection() -> None:
    """Spend the generator's time on the measurement only."""
    gc.collect()
    gc.freeze()
    gc.disable()


def capture(fleet: Fleet, client: FleetClient, start: bytes) -> bytes:
    """The payload of the next frame of ``client`` that begins with ``start``."""
    found: list[bytes] = []

    def look(data: bytes, begin: int, end: int) -> None:
        if data.startswith(start, begin):
            found.append(data[begin:end])

    client.on_text = look
    fleet.run_until(lambda: bool(found))
    client.on_text = None
    return found[0]
