"""Reconciliation of mirror and stored state, rule by rule."""

import pytest
from msgspec.structs import replace

from bandsync.model.merge import merge, same_content
from bandsync.model.session import (
    TOMBSTONE_MS,
    Member,
    Session,
    after,
    find,
    leader_of,
    role_of,
)
from bandsync.rules.actions import Audit, Decision, Drop, Expire
from bandsync.rules.reconcile import (
    FORGETTABLE_MS,
    Adopt,
    Write,
    audit,
    reconcile,
    superseded,
)
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Pause,
    Play,
    SetRole,
    SetTempo,
    UpdateMessage,
)
from bandsync.wire.messages import MemberConnection, RoleChanged, UserJoined
from tests.support.states import NOW, Stage

ONE = ServerContext("one", "boot-one", 8, isolated=False)
TWO = ServerContext("two", "boot-two", 8, isolated=False)
ALONE = replace(ONE, isolated=True)
TWO_ALONE = replace(TWO, isolated=True)
AWAITING = replace(ALONE, awaited=True)


class Band(Stage):
    """Ann leads at server one, Bob follows at server two."""

    def __init__(self) -> None:
        super().__init__(ONE)
        self.join("Ann")
        self.now += 1
        self.here = TWO
        self.join("Bob")
        self.here = ONE

    def at(self, here: ServerContext, session: Session) -> None:
        """Go on at a server that holds this copy, a millisecond later."""
        self.here = here
        self.session = session
        self.now += 1

    @property
    def state(self) -> Session:
        assert self.session is not None
        return self.session

    def member(self, name: str) -> Member:
        return self.state.members[self.ids[name]]

    def own(self, *names: str) -> dict[str, Member]:
        """Connections as they are bound now."""
        return {self.ids[name]: self.member(name) for name in names}

    def name(self, member_id: str) -> str:
        return next(name for name, known in self.ids.items() if known == member_id)


@pytest.fixture
def band() -> Band:
    return Band()


def written(outcome: Adopt | Write | None) -> Write:
    assert isinstance(outcome, Write)
    return outcome


def test_no_mirror_and_nothing_stored_gives_nothing(band: Band) -> None:
    assert reconcile(None, None, {}, ONE, NOW) is None


def test_stored_state_is_adopted_without_a_mirror(band: Band) -> None:
    assert reconcile(None, band.state, {}, ONE, NOW) == Adopt(band.state)


def test_equal_tips_write_nothing(band: Band) -> None:
    assert reconcile(band.state, band.state, band.own("Ann"), ONE, band.now) == Adopt(band.state)
    assert reconcile(band.state, band.state, band.own("Bob"), TWO, band.now) == Adopt(band.state)


def test_newer_stored_state_is_adopted(band: Band) -> None:
    mirror = band.state
    own = band.own("Bob")
    band.do("Ann", UpdateMessage(message="from the top"))
    assert reconcile(mirror, band.state, own, TWO, band.now) == Adopt(band.state)


def test_role_changes_fill_the_skipped_versions(band: Band) -> None:
    mirror = band.state
    own = band.own("Bob")
    band.do("Ann", SetRole("leader", band.ids["Bob"]))
    handed = reconcile(mirror, band.state, own, TWO, band.now)
    # Two versions were skipped, and a snapshot needs one.
    assert handed == Adopt(band.state)
    band.do("Bob", UpdateMessage(message="my turn"))
    later = reconcile(mirror, band.state, own, TWO, band.now)
    assert isinstance(later, Adopt)
    assert later.session == band.state
    assert later.shown == replace(band.state, version=mirror.version + 1)
    heard = [(band.name(event.member_id), event.role, event.version) for event in later.events]
    first = mirror.version + 2
    assert heard == [("Ann", "follower", first), ("Bob", "leader", first + 1)]
    assert first + 1 == band.state.version


def test_older_version_is_not_adopted(band: Band) -> None:
    stored = band.state
    mirror = replace(stored, version=stored.version + 5, event_id="later")
    outcome = written(reconcile(mirror, stored, band.own("Ann"), ONE, band.now))
    assert same_content(outcome.session, stored)
    assert outcome.session.version == mirror.version + 1
    assert outcome.events == ()
    assert outcome.shown == outcome.session


def test_flushed_redis_with_the_same_version_is_merged(band: Band) -> None:
    mirror = band.state
    stranger = Stage(TWO, band.now + 10, "other-")
    stranger.join("Cid")
    stranger.do("Cid", UpdateMessage(message="a new life"))
    refilled = stranger.session
    assert refilled is not None
    assert refilled.version == mirror.version
    outcome = written(reconcile(mirror, refilled, band.own("Ann"), ONE, band.now + 20))
    assert outcome.session.epoch == mirror.epoch
    assert set(outcome.session.members) == {*mirror.members, *refilled.members}
    assert outcome.session.version > mirror.version


def test_absent_key_is_written_back(band: Band) -> None:
    outcome = written(reconcile(band.state, None, band.own("Ann"), ONE, band.now))
    assert same_content(outcome.session, band.state)
    assert outcome.session.version == band.state.version + 1
    assert outcome.session.chat == band.state.chat
    assert outcome.session.last_active_at == band.state.last_active_at


def test_older_dump_is_merged_without_loss(band: Band) -> None:
    dump = band.state
    band.do("Ann", UpdateMessage(message="kept"))
    band.do("Bob", ChatMessage(text="kept too"))
    outcome = written(reconcile(band.state, dump, band.own("Ann"), ONE, band.now))
    assert outcome.session.headline.value == "kept"
    assert [chat.text for chat in outcome.session.chat] == ["kept too"]


def test_dirty_room_without_members_is_written_back(band: Band) -> None:
    stored = band.state
    band.at(ALONE, stored)
    band.do("Ann", UpdateMessage(message="written in memory mode"))
    band.do("Ann", LeaveSession())
    outcome = written(reconcile(band.state, stored, {}, ONE, band.now))
    assert outcome.session.headline.value == "written in memory mode"
    assert not outcome.session.members[band.ids["Ann"]].present
    # Bob is eligible among all servers; in memory mode it was out of reach.
    leader = leader_of(outcome.session)
    assert leader is not None
    assert leader.display_name == "Bob"


def test_two_claims_of_one_term_are_settled_with_events(band: Band) -> None:
    band.here = TWO
    band.join("Cid")
    common = band.state
    band.at(ALONE, common)
    band.do("Ann", SetRole(role="leader", member_id=band.ids["Bob"]))
    handed = band.state
    band.at(TWO_ALONE, common)
    band.now += 500
    band.do("Cid", SetRole(role="leader"))
    claimed = band.state
    assert claimed.leader.rank.term == handed.leader.rank.term
    outcome = written(reconcile(handed, claimed, band.own("Ann"), ONE, band.now))
    assert [
        (band.name(event.member_id), event.role, event.previous_role, event.reason)
        for event in outcome.events
    ] == [
        ("Bob", "follower", "leader", "merged"),
        ("Cid", "leader", "follower", "merged"),
    ]
    first = max(handed.version, claimed.version) + 1
    assert outcome.shown.version == first
    assert [event.version for event in outcome.events] == [first + 1, first + 2]
    assert outcome.session.version == first + 2
    assert replace(outcome.session, version=first) == outcome.shown
    assert role_of(outcome.shown, band.ids["Cid"]) == "leader"


def test_leader_that_moved_in_a_partition_keeps_the_lead(band: Band) -> None:
    common = band.state
    old = band.own("Ann")
    # Server one is cut off; Ann comes back at server two, where its binding is older.
    band.at(TWO, common)
    band.now += 3000
    band.join("Ann", resume=True)
    moved = band.state
    # Server one notices later that Ann's old connection is silent.
    band.at(ALONE, common)
    band.now += 10_000
    band.connections["Ann"] = old[band.ids["Ann"]].connection_id
    band.do("Ann", Drop())
    alone = band.state
    outcome = written(reconcile(alone, moved, {}, ONE, band.now))
    assert same_content(outcome.session, moved)  # Written for its version alone.
    assert outcome.events == ()
    ann = find(moved, band.ids["Ann"])
    assert ann is not None
    assert (ann.connected, ann.boot_id) == (True, "boot-two")
    assert role_of(moved, ann.member_id) == "leader"
    assert superseded(moved, old) == [ann.member_id]


def test_late_zombie_commit_is_merged(band: Band) -> None:
    base = band.state
    band.do("Ann", UpdateMessage(message="sent, answer lost"))
    zombie = band.state
    # Decided again in memory mode, and gone on from there.
    band.at(ALONE, base)
    band.do("Ann", UpdateMessage(message="sent, answer lost"))
    band.do("Ann", UpdateMessage(message="newer"))
    outcome = written(reconcile(band.state, zombie, band.own("Ann"), ONE, band.now))
    assert outcome.session.headline.value == "newer"
    again = reconcile(outcome.session, outcome.session, band.own("Ann"), ONE, band.now + 5)
    assert again == Adopt(outcome.session)


def test_zombie_join_without_a_connection_starts_its_grace(band: Band) -> None:
    mirror = band.state
    band.join("Cid")  # Committed, but the answer and then the connection were lost.
    outcome = written(reconcile(mirror, band.state, band.own("Ann"), ONE, band.now))
    cid = outcome.session.members[band.ids["Cid"]]
    assert (cid.present, cid.connected) == (True, False)


def test_members_swept_in_a_partition_are_asserted_again(band: Band) -> None:
    own = band.own("Ann")
    common = band.state
    band.at(TWO, common)
    band.do("Ann", Drop())
    band.now += 10_000
    band.do("Ann", Expire("server_lost"))
    assert band.leader == "Bob"
    swept = band.state
    band.at(ONE, common)
    band.now -= 5000  # And our clock is behind.
    outcome = written(reconcile(common, swept, own, ONE, band.now))
    ann = outcome.session.members[band.ids["Ann"]]
    assert (ann.present, ann.connected, ann.boot_id) == (True, True, "boot-one")
    assert (ann.joined_at, ann.incarnation) == (own[ann.member_id].joined_at, 1)
    assert ann.time > swept.members[ann.member_id].time
    assert role_of(outcome.session, ann.member_id) == "follower"
    # This server's clients saw Ann as leader and need the event.
    assert [(band.name(event.member_id), event.role) for event in outcome.events] == [
        ("Ann", "follower"),
        ("Bob", "leader"),
    ]


def test_member_resumed_on_two_servers_stays_on_one(band: Band) -> None:
    common = band.state
    token = band.tokens["Bob"]
    band.at(ALONE, common)
    band.join("Bob", resume=True)
    at_one, mine = band.state, band.own("Bob")
    band.tokens["Bob"] = token
    band.at(TWO_ALONE, common)
    band.join("Bob", resume=True)
    at_two, yours = band.state, band.own("Bob")
    bob = band.ids["Bob"]
    assert at_one.members[bob].incarnation == at_two.members[bob].incarnation
    merged = merge(at_one, at_two)
    assert superseded(merged, mine) == [bob]
    assert superseded(merged, yours) == []
    assert audit(merged, yours, TWO, band.now) is merged
    # After the later one left, the connected member is asserted, not closed.
    band.at(TWO, merged)
    band.do("Bob", Drop())
    assert superseded(band.state, mine) == []
    asserted = audit(band.state, mine, ONE, band.now).members[bob]
    assert (asserted.connection_id, asserted.connected) == (mine[bob].connection_id, True)


def test_audit_of_a_correct_state_changes_nothing(band: Band) -> None:
    assert audit(band.state, band.own("Ann"), ONE, band.now) is band.state
    assert audit(band.state, band.own("Bob"), TWO, band.now) is band.state


def test_audit_disconnects_a_member_without_a_connection(band: Band) -> None:
    audited = audit(band.state, {}, ONE, band.now - 10_000)
    ann = audited.members[band.ids["Ann"]]
    assert (ann.present, ann.connected, ann.writer) == (True, False, "boot-one")
    assert ann.time == after(band.now - 10_000, band.member("Ann").time)
    assert audited.members[band.ids["Bob"]] is band.member("Bob")


def test_audit_asserts_an_unknown_own_member(band: Band) -> None:
    own = band.own("Ann")
    stranger = Stage(TWO, band.now, "other-")
    stranger.join("Cid")
    assert stranger.session is not None
    audited = audit(stranger.session, own, ONE, band.now)
    ann = audited.members[band.ids["Ann"]]
    assert replace(ann, time=0.0) == replace(own[ann.member_id], time=0.0)
    assert ann.time > own[ann.member_id].time


def test_connection_bound_again_is_not_superseded(band: Band) -> None:
    own = band.own("Ann")
    ann = band.ids["Ann"]
    again = replace(band.member("Ann"), incarnation=2, connected=False)
    session = replace(band.state, members={**band.state.members, ann: again})
    assert superseded(session, own) == []
    asserted = audit(session, own, ONE, band.now).members[ann]
    assert (asserted.incarnation, asserted.connected) == (2, True)


def test_change_outside_the_ring_rewrites_no_chat(band: Band) -> None:
    band.do("Ann", ChatMessage(text="one"))
    common = band.state
    band.do("Ann", ChatMessage(text="ours"))
    mirror = band.state
    band.at(TWO, common)
    band.do("Bob", ChatMessage(text="theirs"))
    outcome = written(reconcile(mirror, band.state, band.own("Ann"), ONE, band.now))
    assert [chat.text for chat in outcome.session.chat] == ["one", "ours", "theirs"]
    assert {chat for chat in outcome.session.chat if chat.text != "ours"} == set(band.state.chat)
    assert len({chat.slot for chat in outcome.session.chat}) == 3


def test_pruned_tombstones_are_not_written_back(band: Band) -> None:
    band.join("Cid")
    band.do("Cid", LeaveSession())
    mirror = band.state
    assert not band.member("Cid").present
    band.now += TOMBSTONE_MS + 100
    band.at(TWO, mirror)
    band.join("Dan")
    assert band.ids["Cid"] not in band.state.members
    for behind in (0.0, 1000.0):
        outcome = reconcile(mirror, band.state, band.own("Ann"), ONE, band.now - behind)
        assert outcome == Adopt(band.state)
    # A recent tombstone is written back: another server may still show its member.
    band.now -= TOMBSTONE_MS - FORGETTABLE_MS + 1000
    outcome = written(reconcile(mirror, band.state, band.own("Ann"), ONE, band.now))
    assert not outcome.session.members[band.ids["Cid"]].present


def away(band: Band, *left: str) -> tuple[Session, Session]:
    """Cid and Dan join at server two, which is then cut off from one for more than a minute.

    Returns:
        What server one still holds, and what two has stored by then; ``left`` have left.
    """
    band.here = TWO
    band.join("Cid")
    band.join("Dan")
    mirror = band.state
    band.at(TWO, mirror)
    for name in left:
        band.do(name, LeaveSession())
    band.now += TOMBSTONE_MS + 100
    # The next join prunes old tombstones.
    band.join("Eve")
    assert all(band.ids[name] not in band.state.members for name in left)
    return mirror, band.state


def test_member_that_left_in_a_long_partition_stays_removed(band: Band) -> None:
    mirror, stored = away(band, "Cid")
    outcome = reconcile(mirror, stored, band.own("Ann"), ONE, band.now)
    assert outcome == Adopt(stored)
    # The same with a change on this server meanwhile.
    band.at(ALONE, mirror)
    band.do("Ann", ChatMessage(text="hello?"))
    merged = written(reconcile(band.state, stored, band.own("Ann"), ONE, band.now)).session
    assert merged.members.keys() == stored.members.keys()
    assert [chat.text for chat in merged.chat] == ["hello?"]


def test_missing_member_is_asserted_by_its_own_server(band: Band) -> None:
    mirror, stored = away(band)
    own = {**band.own("Bob"), **band.own("Cid"), **band.own("Dan"), **band.own("Eve")}
    cid = band.ids["Cid"]
    members = {key: member for key, member in stored.members.items() if key != cid}
    stored = replace(stored, version=stored.version + 1, members=members)
    # Server one has no newer information.
    assert reconcile(mirror, stored, band.own("Ann"), ONE, band.now) == Adopt(stored)
    asserted = written(reconcile(band.state, stored, own, TWO, band.now)).session.members[cid]
    assert (asserted.present, asserted.connected, asserted.boot_id) == (True, True, "boot-two")
    assert asserted.connection_id == own[cid].connection_id


@pytest.mark.parametrize("loss", ["absent", "older", "another history"])
def test_data_loss_in_redis_removes_no_member(band: Band, loss: str) -> None:
    dump = band.state
    mirror, stored = away(band)
    missing = {"absent": None, "older": dump, "another history": None}[loss]
    if loss == "another history":
        stranger = Stage(TWO, band.now, "other-")
        stranger.join("Fay")
        assert stranger.session is not None
        missing = replace(stranger.session, version=stored.version + 100)
    outcome = written(reconcile(mirror, missing, band.own("Ann"), ONE, band.now))
    assert outcome.session.members.keys() >= mirror.members.keys()


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "in its grace"])
def test_forgotten_own_members_are_written_back(band: Band, connected: bool) -> None:
    if not connected:
        band.do("Ann", Drop())
    own = band.own("Ann") if connected else {}
    mirror, stored = away(band)
    ann = band.ids["Ann"]
    members = {key: member for key, member in stored.members.items() if key != ann}
    stored = replace(stored, version=stored.version + 1, members=members)
    put_back = written(reconcile(mirror, stored, own, ONE, band.now)).session.members[ann]
    assert (put_back.present, put_back.connected) == (True, connected)


class Newcomer(Stage):
    """Eve, who joins at server one while Redis is out of reach, in a session of its own."""

    def __init__(self, now: float) -> None:
        super().__init__(AWAITING, now, "new-")
        self.join("Eve")
        self.now += 1

    def meets(self, stored: Session | None) -> Session:
        """The merged session after Redis is back."""
        assert self.session is not None
        eve = self.ids["Eve"]
        own = {eve: self.session.members[eve]}
        return written(reconcile(self.session, stored, own, ONE, self.now)).session


def test_session_opened_in_an_outage_does_not_take_the_lead_of_the_stored_one(
    band: Band,
) -> None:
    band.do("Ann", SetTempo(tempo=90))
    band.do("Ann", Play())
    band.do("Ann", UpdateMessage(message="Verse"))
    eve = Newcomer(band.now + 5000)
    assert eve.leader == "Eve"
    eve.do("Eve", SetTempo(tempo=140))
    eve.do("Eve", Pause())
    eve.do("Eve", UpdateMessage(message="Chorus"))
    eve.do("Eve", ChatMessage(text="hi"))
    merged = eve.meets(band.state)
    assert merged.leader == band.state.leader
    assert merged.transport == band.state.transport
    assert merged.headline == band.state.headline
    assert role_of(merged, eve.ids["Eve"]) == "follower"
    assert merged.members.keys() == {*band.state.members, eve.ids["Eve"]}
    # Chat needs no leadership and is kept.
    assert [chat.text for chat in merged.chat] == ["hi"]


def test_session_opened_in_an_outage_keeps_its_leader_if_none_is_stored(band: Band) -> None:
    eve = Newcomer(NOW)
    eve.do("Eve", SetTempo(tempo=140))
    assert eve.session is not None
    merged = eve.meets(None)
    assert same_content(merged, eve.session)
    leader = leader_of(merged)
    assert leader is not None
    assert leader.display_name == "Eve"


def test_reconcile_elects_nobody_after_the_only_member_stepped_down(band: Band) -> None:
    stage = Stage(ALONE)
    stage.join("Ann")
    stage.do("Ann", SetRole(role="follower"))
    session = stage.session
    assert session is not None
    own = {stage.ids["Ann"]: session.members[stage.ids["Ann"]]}
    outcome = written(reconcile(session, None, own, ONE, stage.now))
    assert outcome.session.leader.member_id == ""
    assert outcome.events == ()


def test_stepped_down_member_is_not_elected_while_others_are_unreachable(band: Band) -> None:
    band.at(ALONE, band.state)
    band.do("Ann", SetRole(role="follower"))
    assert band.leader is None
    band.do("Ann", ChatMessage(text="still nobody"))
    assert band.leader is None


def test_audit_command_emits_events(band: Band) -> None:
    own = band.own("Ann")
    band.do("Ann", Drop())
    back = band.do("Ann", Audit(own))
    (event,) = back.events
    assert isinstance(event, MemberConnection)
    assert event.connected
    assert isinstance(band.do("Ann", Audit(own)), Decision)
    assert not band.do("Ann", Audit(own)).events

    (event,) = band.do("Ann", Audit({})).events
    assert isinstance(event, MemberConnection)
    assert not event.connected

    band.do("Ann", Expire("timeout"))
    assert band.leader == "Bob"
    (joined,) = band.do("Ann", Audit(own)).events
    assert isinstance(joined, UserJoined)
    assert (joined.member.role, joined.member_count) == ("follower", 2)


def test_audit_command_elects_a_leader(band: Band) -> None:
    own = band.own("Ann")
    band.do("Bob", LeaveSession())
    band.do("Ann", Drop())
    band.do("Ann", Expire("timeout"))
    assert band.leader is None
    joined, *roles = band.do("Ann", Audit(own)).events
    assert isinstance(joined, UserJoined)
    # The register still names Ann.
    assert joined.member.role == "leader"
    assert not roles
    stranger = Stage(TWO, band.now, "other-")
    stranger.join("Cid")
    stranger.do("Cid", LeaveSession())
    stranger.here = ONE
    joined, role = stranger.do("Cid", Audit(own)).events
    assert isinstance(joined, UserJoined)
    assert joined.member.role == "follower"
    assert isinstance(role, RoleChanged)
    assert (role.member_id, role.role, role.reason) == (band.ids["Ann"], "leader", "elected")


def test_drop_disconnects_a_member_of_another_server(band: Band) -> None:
    band.here = TWO
    (event,) = band.do("Ann", Drop()).events
    assert isinstance(event, MemberConnection)
    assert not event.connected
    assert band.member("Ann").writer == "boot-two"
