"""The effects that a mirror returns, without a room to carry them out. On virtual time."""

import structlog
import trio
from msgspec.structs import replace

from bandsync.counters import Counters
from bandsync.model.session import Session, tip
from bandsync.rooms.context import RoomContext
from bandsync.rooms.graces import Graces
from bandsync.rooms.mirror import GAP, Applied, Mirror, Resynced
from bandsync.rooms.timer_wheel import TimerWheel
from bandsync.rules.actions import Bind, Decision
from bandsync.storage.base import Committed
from bandsync.storage.channel_messages import CommittedChange, read_channel_message
from bandsync.storage.memory import MemoryStorage
from bandsync.wire.messages import encode
from tests.support.rooms import FaultyStorage, RecoverableStores, change_message
from tests.support.states import HERE, NOW


class MirrorInRedis:
    """A mirror in Redis with one member, Ann."""

    def __init__(self) -> None:
        self.remote = FaultyStorage()
        self.stores = RecoverableStores()
        self.era = self.stores.begin(self.remote)
        self.context = RoomContext(
            stores=self.stores,
            isolated=HERE,
            connected=replace(HERE, isolated=False),
            now=lambda: NOW,
            timer=trio.current_time,
            finish=lambda work, *args: None,
            graces=Graces(1.0, lambda work, *args: None),
            ticks=None,
            stats=TimerWheel(1.0, 1),
            close=lambda session_id, room: None,
            unreadable={},
            counters=Counters(),
            commit_seconds=lambda seconds: None,
            log=structlog.wrap_logger(structlog.testing.CapturingLogger()),
        )
        self.mirror = Mirror("song", self.context)

    async def open(self) -> Session:
        assert await self.mirror.open({}) == Resynced()
        decision = self.mirror.decide(Bind("song", "epoch", "secret", "Ann"), "c", "", "Ann")
        assert isinstance(decision, Decision)
        events = [encode(event) for event in decision.events]
        result = await self.mirror.commit(self.era, None, decision.session, events)
        assert isinstance(result, Committed)
        return result.session

    async def commit_elsewhere(self, text: str) -> CommittedChange:
        """Let another server change the message; returns what the relay brings of it."""
        base = self.remote.find("song")
        assert base is not None
        headline = replace(base.headline, value=text)
        changed = replace(base, version=base.version + 1, headline=headline)
        result = await MemoryStorage.commit(self.remote, base, changed, ())
        assert isinstance(result, Committed)
        change = read_channel_message(change_message(base, result.session, b"{}"))
        assert isinstance(change, CommittedChange)
        return change


async def test_commit_makes_the_change_the_mirrored_state() -> None:
    stored = MirrorInRedis()
    session = await stored.open()
    assert stored.mirror.session == session
    assert stored.mirror.tip == tip(session)
    assert not stored.mirror.uncertain


async def test_applied_change_returns_state_and_events() -> None:
    stored = MirrorInRedis()
    before = await stored.open()
    change = await stored.commit_elsewhere("Bridge")
    applied = stored.mirror.apply(change)
    assert isinstance(applied, Applied)
    assert (applied.before, applied.session) == (before, stored.mirror.session)
    assert (applied.snapshot, len(applied.events)) == (None, 1)
    assert (applied.members_changed, applied.membership_changed) == (False, False)
    # The same change again is known.
    assert stored.mirror.apply(change) is None


async def test_missing_change_is_a_gap() -> None:
    stored = MirrorInRedis()
    await stored.open()
    await stored.commit_elsewhere("Verse")
    assert stored.mirror.apply(await stored.commit_elsewhere("Bridge")) is GAP


async def test_catch_up_returns_the_state_to_show() -> None:
    stored = MirrorInRedis()
    session = await stored.open()
    own = dict(session.members)
    # Nothing is shown if nothing changed.
    assert await stored.mirror.catch_up(own) == Resynced()
    await stored.commit_elsewhere("Bridge")
    resynced = await stored.mirror.catch_up(own)
    assert resynced is not None
    assert resynced.shown == stored.mirror.session == stored.remote.find("song")


async def test_lost_redis_returns_no_effect_and_continues_in_memory() -> None:
    stored = MirrorInRedis()
    session = await stored.open()
    stored.remote.broken = True
    assert await stored.mirror.catch_up({}) is None
    assert stored.mirror.era is None
    assert stored.mirror.session == session
