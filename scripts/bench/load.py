"""What the clients of a fleet do: join, give commands, talk, note how late the ticks are."""

import gc
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

from scripts.bench.fleet import ACK, Client, Fleet, masked
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

    def watch(self, clients: Iterable[Client]) -> None:
        """Note the ages of all ticks of ``clients`` from now on."""
        for client in clients:
            client.on_text = self._note

    def take(self) -> list[float]:
        """Those noted since the last time."""
        taken, self.values = self.values, []
        return taken

    def _note(self, data: bytes, start: int, end: int) -> None:
        if data.startswith(TICK, start):
            at = data.index(b'"serverTime":', start, end) + 13
            self.values.append(wall_ms() - float(data[at : data.index(b",", at, end)]))


class ClosedLoop:
    """Keeps two commands of every leader outstanding.

    Args:
        frames: what the leaders send, in turn.
        answered: which of them a received frame ``data[start:end]`` answers, None for none; -1
            for whichever was sent first.
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

    def add(self, leader: Client, hearer: Client | None = None) -> None:
        """Let ``leader`` take part; the answers come to ``hearer``, if it is another."""
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

        (hearer or leader).on_text = receive
        self._loops.append(send)

    def start(self) -> None:
        """Send the first commands."""
        self._running = True
        for send in self._loops:
            send()
            send()

    def stop(self, fleet: Fleet) -> None:
        """Send no more, and wait for the answers to what was sent."""
        self._running = False
        fleet.run_until(lambda: self.outstanding == 0)


class Chatter:
    """Lets every leader send long chat messages at an even pace.

    Args:
        per_second: messages of each leader.
    """

    def __init__(self, fleet: Fleet, leaders: Sequence[Client], per_second: float) -> None:
        # Four bytes a character: the longest chat message there is.
        self.frame = masked({"type": "chat_message", "text": "\N{GUITAR}" * 1000})
        self._fleet = fleet
        self._leaders = cycle(leaders)
        self._interval_s = 1 / (per_second * len(leaders))

    def run_until(self, ended: Callable[[], bool]) -> None:
        """Send and receive until then."""
        due = began = now_s()
        for leader in self._leaders:
            if ended():
                return
            if due - began > _SLOW_LIMIT_S:
                raise BenchError("nobody was too slow: send more")
            leader.send(self.frame)
            due += self._interval_s
            # Late or not, what came is received.
            self._fleet.run_for(max(due - now_s(), _LEAST_POLL_S))


def after(seconds: float) -> Callable[[], bool]:
    """Whether so much time has passed since this call."""
    end = now_s() + seconds
    return lambda: now_s() >= end


def join(
    fleet: Fleet, sessions: int, members: int, *, slow: bool = False, ticks: bool = True
) -> list[Client]:
    """Fill the sessions, whose members take turns on the servers; the first of each leads.

    Args:
        slow: give the last member of each session a small receive buffer.
        ticks: whether they want ticks.

    Returns:
        The leaders.
    """
    # Not by their snapshots: a member also gets one when servers joined others at the same time.
    greeting = masked({"type": "join_session", "requestId": "join", "ticks": ticks})
    leaders = fleet.open(range(sessions), greeting)
    fleet.run_until(lambda: fleet.kinds[ACK] == sessions)
    for place in range(1, members):
        small = 16_384 if slow and place == members - 1 else None
        fleet.open(range(sessions), greeting, place=place, receive_buffer=small)
    fleet.run_until(lambda: fleet.kinds[ACK] == sessions * members)
    return leaders


def settle() -> None:
    """Let nothing but the measured code use the generator's time."""
    gc.collect()
    gc.freeze()
    gc.disable()


def capture(fleet: Fleet, client: Client, start: bytes) -> bytes:
    """The payload of the next frame of ``client`` that begins with ``start``."""
    found: list[bytes] = []

    def look(data: bytes, begin: int, end: int) -> None:
        if data.startswith(start, begin):
            found.append(data[begin:end])

    client.on_text = look
    fleet.run_until(lambda: bool(found))
    client.on_text = None
    return found[0]
