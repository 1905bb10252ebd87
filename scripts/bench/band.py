"""A band under load: what its members do, and whether they are all told the same."""

import random
from collections.abc import Callable, Sequence

from scripts.bench.epoll_ws import Address, Loop
from scripts.bench.oracle import CHAT_RING, Truth
from scripts.bench.phone import Phone
from scripts.bench.processes import wall_ms
from scripts.bench.score import Score

_NOTES = "the bridge comes twice, then straight into the last verse, and mind the pick-up "
# So often does each thing happen in a band, seconds between two on average.
_LEADING_S = 2.0
_TALKING_S = 3.0
_CLOCK_S = 5.0
_CUT_S = 20.0
_DOZE_S = 30.0
_SWAP_S = 30.0
_HAND_OVER_S = 30.0
_ASKING_S = 45.0
_CHECKING_S = 30.0
_HIBERNATE_S = 120.0
# A sleeper that has asked for so much does not take it, and is let go with 1013 after 10 s.
_QUESTIONS = 18
_AGAIN_S = 1.2
_HIBERNATION_S = 14.0


class Band:
    """Some phones in one session.

    Args:
        servers: its members take turns on them, and come back to any.
        chance: decides what happens; the same numbers, the same wishes.
        pace: how much livelier than usual it is.

    Attributes:
        truth: what its members were told.
    """

    def __init__(
        self,
        loop: Loop,
        score: Score,
        name: str,
        number: int,
        members: int,
        servers: Sequence[Address],
        *,
        chance: random.Random,
        pace: float = 1.0,
    ) -> None:
        self.loop = loop
        self.score = score
        self.chance = chance
        self.name = name
        self._number = number
        self._servers = servers
        self._pace = pace
        self._busy = False
        self._closed = False
        self._clock: tuple[float, float] = (float("inf"), 0.0)
        self._names = 0
        self._seen: set[Phone] = set()
        self.truth = Truth(name, score, lambda: sum(phone.here for phone in self.phones))
        self.phones = [self._new(place, members) for place in range(members)]

    # What the driver wants of it.

    def gather(self, seconds: float) -> None:
        """Let its members come, the first at once, all within ``seconds``."""
        for phone in self.phones:
            wait_s = self.chance.uniform(0.0, seconds) if phone.place else 0.0
            self.loop.after(wait_s, lambda phone=phone: self._arrive(phone))

    def begin(self, filling_s: float) -> None:
        """Behave like a band from now on.

        Args:
            filling_s: fill the session's memory of chat in that time; 0 to leave it to the band.
        """
        self._busy = True
        for _ in range(CHAT_RING if filling_s else 0):
            self.loop.after(self.chance.uniform(0.0, filling_s), self._talk)
        for every_s, action in (
            (_LEADING_S, self._lead),
            (_TALKING_S, self._talk),
            (_CLOCK_S, self._sync_clock),
            (_CUT_S, self._cut),
            (_DOZE_S, self._doze),
            (_SWAP_S, self._swap),
            (_HAND_OVER_S, self._hand_over),
            (_ASKING_S, self._ask_for_lead),
            (_CHECKING_S, self._check),
            (_HIBERNATE_S, self._hibernate),
        ):
            self._next(every_s / self._pace, action)

    def calm(self) -> None:
        """Do nothing more: who sleeps wakes up, who was cut comes back, nobody else comes."""
        self._busy = False
        self._closed = True
        for phone in self.phones:
            phone.wake()

    def complete(self) -> bool:
        """Whether all that ever came are here and awake."""
        return all(phone.away or (phone.here and not phone.asleep) for phone in self.phones)

    def look(self) -> None:
        """Let everybody ask for the whole session."""
        self.truth.look()
        for phone in self.phones:
            phone.ask("sync_request")

    def looked(self) -> bool:
        """Whether everybody that is here has been answered."""
        return all(self.truth.looked(phone) for phone in self.phones if phone.here)

    def leave(self) -> None:
        """Everybody leaves."""
        for phone in self.phones:
            phone.leave()

    def gone(self) -> bool:
        """Whether no line is open any more."""
        return all(phone.line is None for phone in self._seen)

    def sweep(self, now: float) -> None:
        """Look after the deadlines of the phones, and forget those that have left."""
        for phone in list(self._seen):
            phone.overdue(now)
        here = set(self.phones)
        self._seen = {phone for phone in self._seen if phone in here or phone.line is not None}

    def cut_off(self) -> None:
        """End all lines at once."""
        for phone in self._seen:
            phone.away = True
            phone.forget()

    # What its phones want of it.

    def target(self) -> str:
        """What is asked for in a handshake."""
        return f"/ws/{self.name}"

    def where(self, phone: Phone) -> Address:
        """The server to go to."""
        if phone.member_id:
            return self.chance.choice(self._servers)
        return self._servers[(self._number + phone.place) % len(self._servers)]

    def clock_ahead_ms(self) -> float:
        """The session clock minus this machine's."""
        return self._clock[1]

    def clock_sample(self, round_trip_ms: float, ahead_ms: float) -> None:
        """An exchange was made; the shortest is kept."""
        self._clock = min(self._clock, (round_trip_ms, ahead_ms))

    def asked_for_lead(self, phone: Phone, member_id: str) -> None:
        """The leader's phone is asked to hand over, and refuses as often as not."""
        if self.chance.random() < 0.5:
            phone.ask("deny_leader", memberId=member_id)
        else:
            phone.ask("set_role", role="leader", memberId=member_id)

    # What happens in it.

    def _next(self, every_s: float, action: Callable[[], None]) -> None:
        def happen() -> None:
            if self._busy:
                action()
                self._next(every_s, action)

        self.loop.after(self.chance.expovariate(1 / every_s), happen)

    def _lead(self) -> None:
        leader = self._leader()
        if leader is None:
            return
        wish = self.chance.random()
        if not self.truth.playing and wish < 0.8:
            leader.ask("play", countInBeats=self.chance.choice((0, 0, 4)))
        elif wish < 0.35:
            tempo = round(self.chance.uniform(60, 180), 1)
            leader.ask("set_tempo", tempoBpm=tempo, at=self.chance.choice(("now", "beat", "bar")))
        elif wish < 0.7:
            at = self.chance.choice(("now", "beat", "bar"))
            leader.ask("seek", positionMs=self.chance.randrange(300_000), at=at)
        elif wish < 0.85:
            leader.ask("update_message", message=self._words(20, 80))
        else:
            leader.ask("pause" if self.truth.playing else "stop")

    def _talk(self) -> None:
        phone = self._anybody()
        if phone is not None:
            phone.ask("chat_message", text=self._words(10, 200))

    def _sync_clock(self) -> None:
        phone = self.phones[0]
        if not phone.asleep:
            phone.ask("clock_sync", t0=wall_ms())

    def _cut(self) -> None:
        phone = self._anybody()
        if phone is not None:
            phone.cut(self.chance.uniform(0.2, 3.0))

    def _doze(self) -> None:
        self._sleeper(self.chance.uniform(1.0, 6.0))

    def _hibernate(self) -> None:
        phone = self._sleeper(_HIBERNATION_S)
        if phone is not None:
            self.score.counts["hibernations"] += 1
            self._wonder(phone)
            self.loop.after(_AGAIN_S, lambda: self._wonder(phone))

    def _wonder(self, phone: Phone) -> None:
        for _ in range(_QUESTIONS if phone.asleep else 0):
            phone.ask("sync_request")

    def _swap(self) -> None:
        """Somebody leaves, and somebody else comes in a while."""
        phone = self._anybody()
        if phone is None:
            return
        self.score.counts["leaves"] += 1
        phone.leave()
        other = self._new(phone.place, len(self.phones))
        self.phones[phone.place] = other
        self.loop.after(self.chance.uniform(0.5, 3.0), lambda: self._arrive(other))

    def _hand_over(self) -> None:
        leader, other = self._leader(), self._anybody()
        if leader is not None and other is not None and other is not leader:
            leader.ask("set_role", role="leader", memberId=other.member_id)

    def _ask_for_lead(self) -> None:
        phone = self._anybody()
        if phone is not None and not phone.leads:
            phone.ask("request_leader")

    def _check(self) -> None:
        phone = self._anybody()
        if phone is not None:
            phone.ask("sync_request", version=phone.version, epoch=phone.epoch)

    def _arrive(self, phone: Phone) -> None:
        if not self._closed:
            phone.connect()

    def _leader(self) -> Phone | None:
        return next((each for each in self.phones if each.leads and not each.asleep), None)

    def _anybody(self) -> Phone | None:
        present = [phone for phone in self.phones if phone.here and not phone.asleep]
        return self.chance.choice(present) if present else None

    def _sleeper(self, seconds: float) -> Phone | None:
        slow = [each for each in self.phones if each.slow and each.here and not each.asleep]
        if not slow:
            return None
        phone = self.chance.choice(slow)
        phone.sleep(seconds)
        return phone

    def _new(self, place: int, members: int) -> Phone:
        self._names += 1
        phone = Phone(
            self,
            f"{self.name} {self._names}",
            place,
            slow=members > 1 and place == members - 1,
            watches=place == 0,
        )
        self._seen.add(phone)
        return phone

    def _words(self, least: int, most: int) -> str:
        self._names += 1
        text = f"{self._names}: {_NOTES * 3}"
        return text[: self.chance.randint(least, most)]
