"""Absence periods of the failure detector and the graces after them. On virtual time."""

from collections.abc import Callable

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from bandsync.model.session import find, tip
from bandsync.rooms.failure_detector import FailureDetector
from bandsync.rules.actions import Drop
from bandsync.rules.tokens import ResumeToken
from bandsync.storage.base import (
    Presence,
)
from bandsync.storage.channel_messages import write_change
from bandsync.storage.records import changed_fields
from bandsync.wire.messages import MemberConnection, encode
from tests.support.rooms import GRACE_S, OTHER, HubHarness, RecordingPeer, assert_versions_in_order
from tests.support.states import NOW


class DetectorHarness(HubHarness):
    """Ann is here, Cid is on the server ``hall``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        nursery.start_soon(FailureDetector(self.hub).run)

    async def meet(self) -> RecordingPeer:
        ann, _ = await self.join("Ann")
        await self.commit_elsewhere(self.bind("Cid"), "Cid", "far away")
        self.show()
        await self.hub.compare(self.era)
        return ann

    def show(self, boot_id: str = OTHER.boot_id, *session_ids: str) -> None:
        """Write the presence entry of ``hall`` with this boot id and these sessions."""
        sessions = list(session_ids or ("song",))
        self.remote.servers["hall"] = Presence(boot_id, NOW, "http://hall", sessions, 1)

    def hide(self) -> None:
        """Delete the presence entry of ``hall``."""
        self.remote.servers.clear()

    async def drop_remotely(self, name: str) -> bytes:
        """Let ``hall`` disconnect a member as lost; returns the relay message."""
        base = self.stored()
        member = base.members[f"member {name}"]
        after = await self.commit_elsewhere(Drop(), name, member.connection_id)
        fields, gone = changed_fields(base, after)
        event = MemberConnection("song", after.version, self.hub.now(), member.member_id, False)
        return write_change(tip(base), tip(after), "hall", fields, gone, [encode(event)])

    @property
    def cid(self) -> bool | None:
        """Whether Cid is connected; None if it is gone."""
        member = find(self.stored(), "member Cid")
        return None if member is None else member.connected


@pytest.fixture
async def watched(nursery: trio.Nursery, autojump_clock: MockClock) -> DetectorHarness:
    return DetectorHarness(nursery)


async def test_members_of_failed_server_leave_after_grace(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    await trio.sleep(60)
    assert watched.cid is True
    watched.hide()
    await trio.sleep(9.5)
    assert watched.cid is True
    await trio.sleep(4.6)
    assert watched.cid is False
    (drop,) = ann.received("member_connection")
    assert (drop["memberId"], drop["connected"]) == ("member Cid", False)
    assert ann.received("user_left") == []
    await trio.sleep(GRACE_S)
    assert watched.cid is None
    (left,) = ann.received("user_left")
    assert (left["memberId"], left["reason"]) == ("member Cid", "server_lost")
    assert_versions_in_order(ann)
    # The detector leaves the members of its own server alone.
    assert ann.closed is None
    assert find(watched.stored(), "member Ann") is not None


@pytest.mark.parametrize(
    "show",
    [lambda stage: stage.show("boot-3"), lambda stage: stage.show(OTHER.boot_id, "another song")],
    ids=["another process", "another session"],
)
async def test_entry_of_other_process_or_session_is_no_heartbeat(
    watched: DetectorHarness, show: Callable[[DetectorHarness], None], autojump_clock: MockClock
) -> None:
    await watched.meet()
    show(watched)
    await trio.sleep(15)
    assert watched.cid is False


async def test_interrupted_absence_starts_again(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    for _ in range(5):
        watched.hide()
        await trio.sleep(8)
        watched.show()
        await trio.sleep(3)
    assert watched.cid is True
    assert ann.received("member_connection") == []


async def test_absence_during_outage_is_not_counted(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    await watched.meet()
    watched.hide()
    await trio.sleep(8)
    watched.lose()
    await trio.sleep(60)
    await watched.recover()
    await trio.sleep(8)
    assert watched.cid is True
    await trio.sleep(6)
    assert watched.cid is False


async def test_reasserted_member_gets_a_full_grace_when_it_drops(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    room = watched.hub.rooms["song"]
    for _ in range(2):
        # The other server detected a failure of ours and disconnected its member.
        watched.hub.receive("song", await watched.drop_remotely("Ann"))
        await watched.hub.finished()
        assert watched.stored().members["member Ann"].connected
        await trio.sleep(GRACE_S * 0.4)
    watched.hub.dropped(room, ann, "timeout")
    await trio.sleep(GRACE_S - 0.1)
    assert find(watched.stored(), "member Ann") is not None
    await trio.sleep(0.2)
    assert find(watched.stored(), "member Ann") is None


async def test_members_of_live_server_get_no_grace_here(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    session = watched.stored()
    gone = replace(session.members["member Cid"], connected=False, time=NOW + 1000)
    changed = replace(
        session,
        version=session.version + 1,
        event_id="theirs",
        members={**session.members, "member Cid": gone},
    )
    watched.remote.keep(changed)
    await watched.hub.compare(watched.era)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is False
    assert ann.received("user_left") == []
    # Its server dies during the grace.
    watched.hide()
    await trio.sleep(15 + GRACE_S)
    assert watched.cid is None
    assert ann.received("user_left")[-1]["reason"] == "server_lost"


async def test_member_resuming_within_grace_stays(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    watched.hide()
    await trio.sleep(15)
    assert watched.cid is False
    token = ResumeToken("member Cid", 1, "secret of Cid")
    resumed = replace(watched.bind("Cid"), resume=(token,))
    await watched.commit_elsewhere(resumed, "Cid", "farther away", "unused")
    watched.show()
    await watched.hub.compare(watched.era)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is True
    assert ann.received("user_left") == []


async def test_member_of_failed_server_can_resume_here(
    watched: DetectorHarness, autojump_clock: MockClock
) -> None:
    ann = await watched.meet()
    watched.hide()
    await trio.sleep(15)
    cid, room = await watched.join("Cid", resume=1)
    await trio.sleep(5 * GRACE_S)
    assert watched.cid is True
    assert room.peers.keys() == {"member Ann", "member Cid"}
    assert ann.received("user_left") == []
    assert cid.closed is None
