"""Mirror: a session as this server holds it in memory, kept consistent with the stored state."""

from collections.abc import Mapping, Sequence

from msgspec import Raw, Struct
from msgspec.structs import replace

from bandsync.model.session import Member, Session, Tip, present, tip
from bandsync.rooms.context import RoomContext
from bandsync.rules.actions import Actor, Command, Decision
from bandsync.rules.decide import decide
from bandsync.rules.reconcile import Adopt, Write, reconcile
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
from bandsync.wire.messages import encode

# Each unreadable session is logged once; this bounds the memory of what was logged.
_MAX_UNREADABLE = 10_000


class Outcome(Struct, frozen=True):
    """A decision that was committed.

    Attributes:
        events: the encoded events; none if the decision changed nothing.
    """

    decision: Decision
    events: Sequence[bytes] = ()


class Resynced(Struct, frozen=True):
    """Effect: mirror and stored state agree.

    Attributes:
        shown: the state to send as a snapshot; None if the mirror was up to date already.
        events: the encoded events that follow the snapshot.
    """

    shown: Session | None = None
    events: Sequence[bytes] = ()


class Applied(Struct, frozen=True):
    """Effect: a change that another server committed is in the mirror.

    Attributes:
        before: the mirror before the change.
        session: the mirror now.
        snapshot: the state to send before the events; None if the events follow ``before``.
        events: the encoded events of the change.
    """

    before: Session
    session: Session
    snapshot: Session | None
    events: Sequence[Raw]

    @property
    def members_changed(self) -> bool:
        """Whether any member record changed."""
        return self.before.members is not self.session.members

    @property
    def membership_changed(self) -> bool:
        """Whether a member came or left; one that left is still there, as a tombstone."""
        return _present_ids(self.before) != _present_ids(self.session)


class Gap(Struct, frozen=True):
    """Effect: a relay message is missing or malformed, so the session must be read again."""


GAP = Gap()


class Mirror:
    """One session as this server holds it in memory.

    Commands are decided on the mirror. A commit replaces the stored state only if that is still
    the state of the mirror (compare-and-set); after a conflict the two are reconciled. While Redis
    is lost the mirror goes on in memory, so nothing has to be exported from a dead Redis.

    The mirror sends nothing. It returns effects, and its room carries them out at once, with no
    ``await`` in between: otherwise a connection could miss a state or see versions go backwards.

    Callers of a coroutine hold the room's lock. ``own`` is defined in `bandsync.rules.reconcile`.

    Attributes:
        opened: whether the session has been read.
        session: the state; None before the first member joined.
        uncertain: a commit was interrupted and may have been carried out: catch up before the next.
        interrupted: the same, and no catch-up has been scheduled for it yet.
    """

    __slots__ = (
        "_context",
        "_era",
        "interrupted",
        "opened",
        "session",
        "session_id",
        "uncertain",
    )

    def __init__(self, session_id: str, context: RoomContext) -> None:
        self.session_id = session_id
        self.session: Session | None = None
        self.uncertain = False
        self.interrupted = False
        self.opened = False
        self._context = context
        self._era: Era | None = None

    @property
    def era(self) -> Era | None:
        """The era of Redis use in which the session is stored; None while it is in memory."""
        era = self._era
        return None if era is None or era.over else era

    @property
    def tip(self) -> Tip | None:
        """The identity of the mirrored state; None if there is none."""
        return None if self.session is None else tip(self.session)

    async def open(self, own: Mapping[str, Member]) -> Resynced | None:
        """Read the session for the first time.

        Returns:
            None if the session is in memory.
        """
        stores = self._context.stores
        self.session = stores.memory.find(self.session_id)
        resynced = None if stores.era is None else await self.move(stores.era, own)
        self.opened = True
        return resynced

    async def move(self, era: Era, own: Mapping[str, Member]) -> Resynced | None:
        """Move the session to Redis.

        Returns:
            None if it stays in memory.
        """
        if era.over:
            return None
        if era.relay is not None:
            # Subscribe before reading: a change in between would be missed otherwise.
            await era.relay.subscribe(self.session_id)
        resynced = await self._read(era, own)
        if resynced is not None:
            self._era = era
            self._context.stores.memory.discard(self.session_id)
            self._context.unreadable.pop(self.session_id, None)
        return resynced

    async def catch_up(self, own: Mapping[str, Member]) -> Resynced | None:
        """Read what others committed, and whether an interrupted commit was carried out.

        Returns:
            None if that was not possible, or if the session is in memory.
        """
        era = self.era
        resynced = None if era is None else await self._read(era, own)
        if resynced is not None or self.era is None:
            # In memory nothing can be read. A later merge brings a commit that was carried out.
            self.uncertain = False
        return resynced

    def apply(self, change: CommittedChange) -> Applied | Gap | None:
        """Apply a change of another server if it follows the mirrored state.

        Returns:
            None if the mirror has the change already.
        """
        session, known = self.session, self.tip
        if session is None or known is None or self.era is None:
            return GAP
        if change.event_id == known.event_id:
            return None
        if change.prev != known:
            same_epoch = change.prev is not None and change.prev.epoch == known.epoch
            return None if same_epoch and change.version <= known.version else GAP
        before_events = change.version - len(change.frames)
        if before_events < known.version:
            return GAP
        try:
            changed = patch_session(session, change)
        except UnreadableError:
            return GAP
        self.set_state(changed)
        # After a merge there are more versions than events, so the clients need the whole state.
        merged = before_events != known.version
        snapshot = replace(changed, version=before_events) if merged else None
        return Applied(session, changed, snapshot, change.frames)

    def decide(
        self,
        command: Command,
        connection_id: str,
        member_id: str = "",
        fresh_id: str = "",
        latencies_ms: Mapping[str, float] | None = None,
    ) -> Decision | Refusal:
        """Apply the rules to the mirrored state, without changing it."""
        context = self._context
        server = context.isolated if self.era is None else context.connected
        actor = Actor(server, connection_id, member_id, fresh_id, latencies_ms or {})
        return decide(self.session, command, actor, context.now())

    async def commit(
        self, era: Era | None, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unusable:
        """Store ``change`` in place of ``base``; on success it is the mirrored state.

        Args:
            era: the era of Redis use to store it in; None stores it in memory.
            base: the state that is believed to be stored.
            events: the encoded events of the change.

        Returns:
            See `bandsync.storage.base.Storage.commit`. After `Unusable` the session is in memory.
        """
        context = self._context
        storage: Storage = context.stores.memory
        if era is not None:
            storage = era.storage
        elif base is not None:
            # No other process writes to this memory, so there can be no conflict.
            context.stores.memory.keep(base)
        started = context.timer()
        self.uncertain = True
        try:
            result = await storage.commit(base, change, events)
            self.uncertain = False
        finally:
            self.interrupted = self.uncertain
        context.commit_seconds(context.timer() - started)
        if isinstance(result, Committed):
            self.set_state(result.session)
        elif isinstance(result, Conflict):
            context.counters.conflicts += 1
        else:
            self._fall_back(result)
        return result

    async def reconcile(
        self, era: Era, stored: Session | None, own: Mapping[str, Member]
    ) -> Resynced | None:
        """Merge mirror and stored state, and write the result back if it adds anything.

        Returns:
            None if Redis cannot be used for this session, or after too many conflicts.
        """
        context = self._context
        for _ in range(MAX_ATTEMPTS):
            known = self.tip
            match reconcile(self.session, stored, own, context.connected, context.now()):
                case None:
                    return Resynced()
                case Adopt(session=session, shown=shown, events=merged):
                    self.set_state(session)
                    if known == tip(session):
                        return Resynced()
                    return Resynced(shown or session, [encode(event) for event in merged])
                case Write(session=session, shown=shown, events=merged):
                    events = [encode(event) for event in merged]
                    result = await self.commit(era, stored, session, events)
            match result:
                case Committed():
                    context.counters.reconciled += 1
                    return Resynced(shown, events)
                case Conflict(stored=stored):
                    pass
                case _:
                    return None
        return None

    async def _read(self, era: Era, own: Mapping[str, Member]) -> Resynced | None:
        """Read the stored state and reconcile; see `reconcile`."""
        stored = await era.storage.get_session(self.session_id)
        if isinstance(stored, Unusable):
            self._fall_back(stored)
            return None
        return await self.reconcile(era, stored, own)

    def set_state(self, session: Session) -> None:
        """Make ``session`` the mirrored state."""
        self.session = session

    def _fall_back(self, why: Unusable) -> None:
        """Go on in memory; the stored state is left as it is."""
        self._era = None
        context = self._context
        known = context.unreadable
        if isinstance(why, Unreadable) and known.get(self.session_id) != why.detail:
            if len(known) >= _MAX_UNREADABLE:
                known.clear()
            known[self.session_id] = why.detail
            context.counters.unreadable += 1
            context.log.error("session.unreadable", session_id=self.session_id, reason=why.detail)


def _present_ids(session: Session) -> set[str]:
    return {member.member_id for member in present(session)}
