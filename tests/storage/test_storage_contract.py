"""The contract of a storage. One suite for every backend."""

from collections.abc import AsyncIterator, Sequence

import pytest
import trio
from msgspec.structs import replace

from bandsync.model.session import Session, find, present, tip
from bandsync.rules.actions import Actor, Bind, Command, Decision
from bandsync.rules.decide import decide
from bandsync.rules.draft import new_session
from bandsync.rules.refusals import CONFLICT
from bandsync.storage import operations
from bandsync.storage.base import Committed, Conflict, Storage
from bandsync.storage.memory import MemoryStorage
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Play,
    Refusal,
    SetTempo,
    UpdateMessage,
)
from bandsync.wire.messages import Snapshot
from tests.support.redis_storages import open_cluster, redis_storage, storage_over
from tests.support.states import HERE, NOW, Stage


@pytest.fixture(params=["memory", "fakeredis", "redis", "cluster"])
async def storage(request: pytest.FixtureRequest, nursery: trio.Nursery) -> AsyncIterator[Storage]:
    if request.param == "memory":
        yield MemoryStorage("boot-1", "for a test")
        return
    if request.param == "cluster":
        async with open_cluster(request.getfixturevalue("shared_cluster").url()) as link:
            yield storage_over(link)
        return
    if request.param == "fakeredis":
        url = request.getfixturevalue("fake_redis")
    else:
        url = request.getfixturevalue("shared_redis").url()
    async with redis_storage(url) as made:
        yield made


def bind(name: str) -> tuple[Bind, Actor]:
    return (
        Bind("song", "epoch-1", f"secret of {name}", name),
        Actor(HERE, f"connection of {name}", "", f"member-{name}"),
    )


async def joined(storage: Storage, name: str) -> Session:
    decision = await operations.add_member(storage, "song", *bind(name), NOW)
    assert isinstance(decision, Decision)
    assert isinstance(decision.reply, Snapshot)
    return decision.session


async def test_storage_is_empty_at_first(storage: Storage) -> None:
    assert await operations.get_session(storage, "song") is None
    assert await operations.list_sessions(storage) == []
    assert not await operations.delete_session(storage, "song")


async def test_create_get_list_delete(storage: Storage) -> None:
    session = new_session("song", "epoch-1", HERE, NOW)
    session = replace(session, version=1)
    created = await operations.create_session(storage, session)
    assert isinstance(created, Committed)
    assert created.session.event_id
    assert await operations.get_session(storage, "song") == created.session
    again = await operations.create_session(storage, session)
    assert again == Conflict(created.session)
    assert [session.session_id for session in await operations.list_sessions(storage)] == ["song"]
    assert await operations.delete_session(storage, "song")
    assert await operations.get_session(storage, "song") is None


async def test_commit_compares_tips(storage: Storage) -> None:
    session = await joined(storage, "Ann")
    actor = Actor(HERE, "connection of Ann", "member-Ann")
    one = decide(session, Play(), actor, NOW)
    two = decide(session, SetTempo(tempo=90), actor, NOW)
    assert isinstance(one, Decision)
    assert isinstance(two, Decision)
    first = await storage.commit(session, one.session, ())
    assert isinstance(first, Committed)
    late = await storage.commit(session, two.session, ())
    assert isinstance(late, Conflict)
    assert late.stored is not None
    assert tip(late.stored) == tip(first.session)
    # The same epoch and version do not make the same state.
    impostor = replace(first.session, event_id="another history")
    assert isinstance(await storage.commit(impostor, two.session, ()), Conflict)
    assert isinstance(await storage.commit(None, two.session, ()), Conflict)


async def test_commit_on_a_deleted_session_is_a_conflict(storage: Storage) -> None:
    session = await joined(storage, "Ann")
    await operations.delete_session(storage, "song")
    assert await storage.commit(session, session, ()) == Conflict(None)


async def test_operations_add_and_remove_members(storage: Storage) -> None:
    await joined(storage, "Ann")
    session = await joined(storage, "Bob")
    assert [member.display_name for member in present(session)] == ["Ann", "Bob"]
    removed = await operations.remove_member(storage, "song", "member-Ann", HERE, NOW)
    assert isinstance(removed, Decision)
    stored = await operations.get_session(storage, "song")
    assert stored is not None
    assert find(stored, "member-Ann") is None
    assert stored.leader.member_id == "member-Bob"
    for session_id, member_id in (("song", "member-Ann"), ("other", "member-Bob")):
        refused = await operations.remove_member(storage, session_id, member_id, HERE, NOW)
        assert isinstance(refused, Refusal)


class Raced(MemoryStorage):
    """Somebody else commits just before each of the next ``rivals`` commits."""

    rivals = 0

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict:
        if self.rivals and base is not None:
            self.rivals -= 1
            await super().commit(base, replace(base, version=base.version + 1), ())
        return await super().commit(base, change, events)


@pytest.mark.parametrize(("rivals", "wins"), [(0, True), (3, True), (100, False)])
async def test_conflicting_update_is_decided_again(rivals: int, wins: bool) -> None:
    storage = Raced("boot-1", "for a test")
    await joined(storage, "Ann")
    storage.rivals = rivals
    actor = Actor(HERE, "connection of Ann", "member-Ann")
    outcome = await operations.update_session(
        storage, "song", lambda base: decide(base, Play(), actor, NOW)
    )
    if not wins:
        assert outcome == CONFLICT
        return
    stored = await operations.get_session(storage, "song")
    assert isinstance(outcome, Decision)
    assert stored == outcome.session
    assert stored.version == 1 + rivals + 1


async def test_health_check_reports_the_storage(storage: Storage) -> None:
    await joined(storage, "Ann")
    health = await operations.health_check(storage)
    assert health.healthy
    assert health.total_sessions == 1
    assert health.storage_type == storage.storage_type


async def test_memory_expires_idle_sessions() -> None:
    storage = MemoryStorage("boot-1", "for a test")
    for number in range(6):
        session = new_session(f"s{number}", "e", HERE, NOW + number * 1000)
        await operations.create_session(storage, session)
    hosted = {"s0"}
    assert storage.expire(NOW + 10_000, 8500, hosted, 100) == ["s1"]
    assert storage.expire(NOW + 10_000, 60_000, hosted, 3) == ["s2"]
    assert storage.expire(NOW + 10_000, 60_000, hosted, 3) == []
    left = [session.session_id for session in await operations.list_sessions(storage)]
    assert left == ["s0", "s3", "s4", "s5"]
    assert storage.expire(NOW + 90_000, 60_000, hosted, 3) == ["s3", "s4", "s5"]


@pytest.mark.parametrize(
    "command", [ChatMessage(text="hi"), Play(), UpdateMessage(message="Verse")], ids=repr
)
async def test_memory_expires_blank_sessions_first(
    command: Command,
) -> None:
    storage = MemoryStorage("boot-1", "for a test")
    for number in range(6):
        band = Stage(now=NOW + number * 1000, prefix=f"{number}-")
        band.join("Ann")
        if number in {0, 1, 4}:
            band.now += 100
            band.do("Ann", command)
        band.do("Ann", LeaveSession())
        assert band.session is not None
        await operations.create_session(storage, replace(band.session, session_id=f"s{number}"))
    assert storage.expire(NOW + 10_000, 60_000, (), 4) == ["s2", "s3"]
    # The longest idle sessions among the rest.
    assert storage.expire(NOW + 10_000, 60_000, (), 2) == ["s5", "s0"]
    # Nothing is kept beyond its time, whatever was done in it.
    assert storage.expire(NOW + 61_500, 60_000, (), 2) == ["s1"]
    assert storage.ids() == ["s4"]
