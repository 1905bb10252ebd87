"""A mirror: the session as this server holds it, and how it stays true to what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import trio
from msgspec import Struct

from bandsync.model.session import Session, Tip, tip
from bandsync.rooms.context import Audience, RoomContext
from bandsync.rules.actions import Actor, Command, Decision
from bandsync.rules.decide import decide
from bandsync.rules.reconcile import Adopt, Write, reconcile
from bandsync.rules.refusals import CONFLICT
from bandsync.storage.base import (
    MAX_ATTEMPTS,
    Committed,
    Conflict,
    Storage,
    Unreadable,
    Unusable,
)
from bandsync.storage.channel_messages import CommittedChange
from bandsync.storage.era import Era
from bandsync.storage.records import UnreadableError, patch_session
from bandsync.wire.commands import Refusal
from bandsync.wire.frames import text_frame
from bandsync.wire.messages import RoleChanged, encode

# Told in the log once each, as far as this goes.
_MAX_UNREADABLE = 10_000
# How often the relay is asked for what was faster, and how long after the first time again.
_LOOKS = 5
_LOOK_S = 0.001


class Outcome(Struct, frozen=True):
    """A committed decision, and the frames of its events."""

    decision: Decision
    frames: bytes = b""


class Mirror:
    """One session, as this server holds it. Whoever calls a coroutine of it holds its room's lock.

    Attributes:
        opened: whether it has been read.
        session: None before the first member joined.
        uncertain: a commit was interrupted: it may have been carried out.
    """

    __slots__ = (
        "_audience",
        "_era",
        "_house",
        "opened",
        "session",
        "session_id",
        "uncertain",
    )

    def __init__(self, session_id: str, house: RoomContext, audience: Audience) -> None:
        self.session_id = session_id
        self.session: Session | None = None
        self.uncertain = False
        self._house = house
        self._audience = audience
        self._era: Era | None = None
        self.opened = False

    @property
    def era(self) -> Era | None:
        """The era of Redis in which the session is stored; None in memory."""
        era = self._era
        return None if era is None or era.over else era

    @property
    def tip(self) -> Tip | None:
        """What identifies the state that is mirrored; None if there is none."""
        return None if self.session is None else tip(self.session)

    async def open(self) -> None:
        """Read the session, once."""
        if self.opened:
            return
        stores = self._house.stores
        self.session = stores.memory.find(self.session_id)
        if self.session is not None:
            self._audience.changed(self.session)
        if stores.era is not None:
            await self.move(stores.era)
        self.opened = True

    def hear(self, change: CommittedChange) -> Literal["news", "known", "gap"]:
        """Take over what another server committed, if it follows on what is known here."""
        session, known = self.session, self.tip
        if session is None or known is None or self.era is None:
            return "gap"
        if change.event_id == known.event_id:
            return "known"
        if change.prev != known:
            same = change.prev is not None and change.prev.epoch == known.epoch
            return "known" if same and change.version <= known.version else "gap"
        if len(change.frames) > change.version - known.version:
            return "gap"
        try:
            self._take(patch_session(session, change))
        except UnreadableError:
            return "gap"
        return "news"

    async def move(self, era: Era) -> bool:
        """Bring the session to Redis; False if it stays in memory."""
        if era.over:
            return False
        if era.relay is not None:
            # Before it is read, so that nothing falls in between.
            await era.relay.subscribe(self.session_id)
        if not await self._read(era):
            return False
        self._era = era
        self._house.stores.memory.discard(self.session_id)
        self._house.unreadable.pop(self.session_id, None)
        return True

    async def catch_up(self) -> None:
        """Take over what others wrote, and what became of a commit that was interrupted."""
        era = self.era
        if era is None or await self._read(era) or self.era is None:
            # In memory there is nothing to learn; a merge will bring what was carried out.
            self.uncertain = False

    async def change(
        self,
        command: Command,
        connection_id: str,
        member_id: str = "",
        fresh_id: str = "",
        latencies_ms: Mapping[str, float] | None = None,
    ) -> Outcome | Refusal:
        """Decide and commit. What was committed is the mirror afterwards."""
        house = self._house
        if self.uncertain:
            await self.catch_up()
        patient = True
        for _ in range(MAX_ATTEMPTS):
            era = self.era
            here = house.isolated if era is None else house.connected
            actor = Actor(here, connection_id, member_id, fresh_id, latencies_ms or {})
            decision = decide(self.session, command, actor, house.now())
            if isinstance(decision, Refusal):
                return decision
            if not decision.events:
                return Outcome(decision)
            events = [encode(event) for event in decision.events]
            result = await self._commit(era, self.session, decision.session, events)
            match result:
                case Committed(session=session):
                    self._take(session)
                    return Outcome(decision, b"".join([text_frame(event) for event in events]))
                case Conflict(stored=stored):
                    house.counters.conflicts += 1
                    if era is None:
                        continue
                    # Waiting in vain each time, we would lose every race to who need not wait.
                    patient = patient and await self._heard(era, stored)
                    if not patient:
                        await self._reconcile(era, stored)
                case unusable:
                    # Decided again, on the mirror, in memory.
                    self._leave(unusable)
        return CONFLICT

    async def _commit(
        self, era: Era | None, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unusable:
        house = self._house
        storage: Storage = house.stores.memory
        if era is not None:
            storage = era.storage
        elif base is not None:
            # Nobody else writes to the memory of this process.
            house.stores.memory.keep(base)
        started = house.timer()
        self.uncertain = True
        try:
            result = await storage.commit(base, change, events)
            self.uncertain = False
        finally:
            if self.uncertain:
                house.finish(self._audience.catch_up)
        house.commit_seconds(house.timer() - started)
        return result

    async def _read(self, era: Era) -> bool:
        """Read what is stored and reconcile; False if Redis cannot be used for this session."""
        stored = await era.storage.get_session(self.session_id)
        if isinstance(stored, Unusable):
            self._leave(stored)
            return False
        return await self._reconcile(era, stored)

    async def _heard(self, era: Era, stored: Session | None) -> bool:
        """Whether the relay brings what was faster: then nobody must be shown the whole.

        It was published before our commit was refused, so it is here or about to be. A stored state
        that is not ahead of us is none that was faster: it has been set back, and nothing will
        come.
        """
        refused = self.session
        if era.relay is None or stored is None:
            return False
        for look in range(_LOOKS):
            self._audience.listen()
            session = self.session
            if session is None or session.epoch != stored.epoch:
                return False
            if session.version >= stored.version:
                return session is not refused
            await trio.sleep(_LOOK_S * 2**look)
        return False

    async def _reconcile(self, era: Era, stored: Session | None) -> bool:
        """Bring mirror and stored state together; False if that did not work out this time."""
        house = self._house
        for _ in range(MAX_ATTEMPTS):
            plan = reconcile(
                self.session, stored, self._audience.own(), house.connected, house.now()
            )
            match plan:
                case None:
                    return True
                case Adopt(session=session, shown=shown, events=events):
                    self._jump(session, shown or session, events)
                    return True
                case Write(session=session, shown=shown, events=events):
                    frames = [encode(event) for event in events]
                    result = await self._commit(era, stored, session, frames)
            match result:
                case Committed(session=session):
                    house.counters.reconciled += 1
                    self._jump(session, shown, events)
                    return True
                case Conflict(stored=stored):
                    house.counters.conflicts += 1
                case unusable:
                    self._leave(unusable)
                    return False
        return False

    def _take(self, session: Session) -> None:
        self.session = session
        self._audience.changed(session)

    def _jump(self, session: Session, shown: Session, events: Sequence[RoleChanged]) -> None:
        """Take a state that did not come from our mirror, and show it if it is news."""
        known = self.tip
        self._take(session)
        if known != tip(session):
            self._audience.jumped(shown, events)

    def _leave(self, why: Unusable) -> None:
        """Go on in memory, and leave what is stored as it is."""
        self._era = None
        house = self._house
        known = house.unreadable
        if isinstance(why, Unreadable) and known.get(self.session_id) != why.detail:
            if len(known) >= _MAX_UNREADABLE:
                known.clear()
            known[self.session_id] = why.detail
            house.counters.unreadable += 1
            house.log.error("session.unreadable", session_id=self.session_id, reason=why.detail)
