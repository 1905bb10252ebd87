"""The merge: its laws on any sessions, and what it does to sessions that changed apart."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bandsync.model.merge import merge, same_content
from bandsync.model.session import (
    CHAT_RING,
    TOMBSTONE_MS,
    Chat,
    Epoch,
    HeadlineRegister,
    Leader,
    Member,
    Rank,
    Session,
    SessionSettings,
    SettingsRegister,
    Stamp,
    TransportRegister,
    leader_of,
)
from bandsync.model.transport import initial
from bandsync.rules.actions import Audit, Drop
from bandsync.rules.draft import new_session
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import ChatMessage, LeaveSession, Play, SetRole, UpdateMessage
from bandsync.wire.messages import encode
from bandsync.wire.snapshots import snapshot
from tests.support.states import NAMES, NOW, WHAT, Stage, step

HERES = [ServerContext(f"server-{n}", f"boot-{n}", 8, isolated=n != 0) for n in range(3)]

# Few values, so that copies often agree, differ in one thing, or have equal stamps.
times = st.sampled_from([NOW, NOW + 0.001, NOW + 1, NOW + 70_000])
boots = st.sampled_from([here.boot_id for here in HERES])
member_ids = st.sampled_from(["m1", "m2", "m3"])
ranks = st.builds(Rank, st.integers(1, 2), times, boots)
stamps = st.builds(Stamp, ranks, times, boots)
members = st.builds(
    Member,
    member_id=st.just(""),
    incarnation=st.integers(1, 2),
    time=times,
    writer=boots,
    present=st.booleans(),
    connection_id=st.sampled_from(["c1", "c2"]),
    server_id=st.just("server-0"),
    boot_id=boots,
    connected=st.booleans(),
    joined_at=times,
    connected_at=times,
    display_name=st.sampled_from(["Ann", "Бобби"]),
    token_hash=st.just("hash"),
)
chats = st.builds(
    Chat,
    message_id=st.integers(0, 70).map("chat-{:02}".format),
    member_id=member_ids,
    display_name=st.just("Ann"),
    text=st.sampled_from(["hi", "ho"]),
    sent_at=times,
    slot=st.just(0),
)


@st.composite
def rings(draw: st.DrawFn) -> tuple[Chat, ...]:
    most = draw(st.sampled_from([3, CHAT_RING]))
    least = draw(st.sampled_from([0, most]))
    drawn = draw(
        st.lists(chats, min_size=least, max_size=most, unique_by=lambda chat: chat.message_id)
    )
    slots = draw(st.permutations(range(CHAT_RING)))
    ring = sorted(drawn, key=lambda chat: (chat.sent_at, chat.message_id))
    return tuple(replace(chat, slot=slot) for chat, slot in zip(ring, slots, strict=False))


any_session = st.builds(
    Session,
    session_id=st.just("song"),
    epoch=st.builds(Epoch, times, st.sampled_from(["e1", "e2"])),
    version=st.integers(0, 3),
    event_id=st.sampled_from(["v1", "v2"]),
    leader=st.builds(Leader, ranks, st.one_of(st.just(""), member_ids)),
    transport=st.builds(
        TransportRegister, stamps, st.floats(0, 2).map(lambda at: initial(NOW + at))
    ),
    headline=st.builds(HeadlineRegister, stamps, st.sampled_from(["", "a", "ä"])),
    settings=st.builds(SettingsRegister, stamps, st.integers(1, 3).map(SessionSettings)),
    members=st.dictionaries(member_ids, members).map(
        lambda drawn: {key: replace(member, member_id=key) for key, member in drawn.items()}
    ),
    chat=rings(),
    last_active_at=times,
)


class Copies:
    """One band on servers that do not hear of each other: each has a copy of the session."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.copies: list[Session | None] = [None, None, None]

    def step(self, server: int, name: str, what: str, number: int, passed: float) -> None:
        stage = self.stage
        stage.now += passed
        stage.here = HERES[server]
        before = stage.session = self.copies[server]
        match what, before:
            case "merge", Session():
                other = self.copies[(server + number) % len(HERES)]
                stage.session = before if other is None else merge(other, before)
            case "copy", _:
                stage.session = self.copies[(server + number) % len(HERES)] or before
            case "audit", Session():
                stage.do(name, Audit(self.own(before, server, number)))
            case (("merge" | "audit"), _):
                return
            case _:
                step(stage, name, what, number)
        self.copies[server] = after = stage.session
        if before is not None and after is not None and what != "copy":
            inflates(before, after, stage.now)

    def own(self, session: Session, server: int, number: int) -> dict[str, Member]:
        """Connections at a server: those it should have, but one."""
        here = [
            member for member in session.members.values() if member.boot_id == HERES[server].boot_id
        ]
        return {member.member_id: member for member in here if member is not here[number:][:1]}

    @property
    def sessions(self) -> list[Session]:
        return [session for session in self.copies if session is not None]


def inflates(before: Session, after: Session, now: float) -> None:
    """A change is in what a merge with its own past gives; but for tombstones it pruned."""
    merged = merge(before, after)
    for member_id in merged.members.keys() - after.members.keys():
        stone = merged.members[member_id]
        assert not stone.present
        assert stone.time < now - TOMBSTONE_MS
        assert stone == before.members[member_id]
    pruned = {key: merged.members[key] for key in merged.members.keys() & after.members.keys()}
    assert same_content(replace(merged, members=pruned), after)
    assert [chat.slot for chat in merged.chat] == [chat.slot for chat in after.chat]


apart = st.lists(
    st.tuples(
        st.integers(0, len(HERES) - 1),
        st.sampled_from(NAMES),
        st.sampled_from([*WHAT, "chat", "merge", "merge", "copy", "audit"]),
        st.integers(0, 3),
        # The clocks of servers disagree.
        st.floats(-5_000, 20_000),
    ),
    max_size=30,
)


@st.composite
def histories(draw: st.DrawFn) -> Sequence[Session]:
    """Three copies of one session that a random history left."""
    copies = Copies()
    copies.step(0, "Ann", "join", 0, 0.0)
    if draw(st.booleans()):
        copies.copies = [copies.copies[0]] * len(HERES)
    for server, name, what, number, passed in draw(apart):
        copies.step(server, name, what, number, passed)
    return [session or copies.sessions[0] for session in copies.copies]


triples = st.one_of(st.tuples(any_session, any_session, any_session), histories())


def check_laws(a: Session, b: Session, c: Session) -> None:
    ab = merge(a, b)
    assert same_content(ab, merge(b, a))
    assert same_content(merge(ab, c), merge(a, merge(b, c)))
    for one in (a, b):
        assert merge(one, one) == one
        assert same_content(merge(ab, one), ab)
        assert same_content(merge(one, ab), ab)


@settings(max_examples=200, deadline=None)
@given(triples)
def test_merge_is_commutative_associative_and_idempotent(copies: Sequence[Session]) -> None:
    check_laws(*copies)


@settings(max_examples=100, deadline=None)
@given(triples)
def test_ring_slots_are_unique_and_stored_ones_stay(copies: Sequence[Session]) -> None:
    a, b, _ = copies
    merged = merge(a, b)
    slots = [chat.slot for chat in merged.chat]
    assert len(set(slots)) == len(slots) <= CHAT_RING
    assert set(slots) <= set(range(CHAT_RING))
    stored = {chat.message_id: chat.slot for chat in b.chat}
    for chat in merged.chat:
        assert chat.slot == stored.get(chat.message_id, chat.slot)
    assert [(chat.sent_at, chat.message_id) for chat in merged.chat] == sorted(
        (chat.sent_at, chat.message_id) for chat in merged.chat
    )


@settings(max_examples=100, deadline=None)
@given(triples)
def test_version_and_activity_are_the_maximum(copies: Sequence[Session]) -> None:
    a, b, _ = copies
    merged = merge(a, b)
    assert merged.version == max(a.version, b.version)
    assert merged.last_active_at == max(a.last_active_at, b.last_active_at)
    assert merged.event_id == b.event_id
    other = replace(
        a, version=a.version + 1, event_id="other", last_active_at=0.0, chat=reslotted(a)
    )
    assert same_content(a, other)


def reslotted(session: Session) -> tuple[Chat, ...]:
    return tuple(replace(chat, slot=CHAT_RING - 1 - chat.slot) for chat in session.chat)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_changes_under_the_winning_leader_survive(copies: Sequence[Session]) -> None:
    a, b, _ = copies
    merged = merge(a, b)
    for register in ("transport", "headline"):
        under_winner = [
            getattr(copy, register).stamp
            for copy in (a, b)
            if getattr(copy, register).stamp.rank == merged.leader.rank
        ]
        if under_winner:
            assert getattr(merged, register).stamp == max(under_winner)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_merge_keeps_sizes_bounded(copies: Sequence[Session]) -> None:
    a, b, c = copies
    merged = merge(merge(a, b), c)
    assert len(merged.chat) <= CHAT_RING
    assert len(merged.members) <= sum(len(copy.members) for copy in copies)
    assert len(encode(snapshot(merged, NOW))) <= sum(
        len(encode(snapshot(copy, NOW))) for copy in copies
    )


def apart_from(*names: str) -> Copies:
    """Copies of a session that ``names`` have joined, each at the server of its number."""
    copies = Copies()
    for server, name in enumerate(names):
        copies.step(server, name, "join", 0, 1.0)
        copies.copies = [copies.copies[server]] * len(HERES)
    return copies


def both(copies: Copies) -> Session:
    a, b = copies.copies[:2]
    assert a is not None
    assert b is not None
    merged = merge(a, b)
    assert same_content(merged, merge(b, a))
    return merged


def leader_name(session: Session) -> str | None:
    leader = leader_of(session)
    return None if leader is None else leader.display_name


def test_later_claim_of_one_term_wins_with_its_changes() -> None:
    copies = apart_from("Ann", "Bob", "Cid")
    copies.step(1, "Bob", "claim", 0, 1.0)
    copies.step(2, "Cid", "claim", 0, 1.0)
    copies.step(2, "Cid", "headline", 2, 1.0)
    # The loser of the claims writes last, twice.
    copies.step(1, "Bob", "headline", 1, 1.0)
    copies.step(1, "Bob", "headline", 3, 1.0)
    copies.copies[0] = copies.copies[2]
    merged = both(copies)
    assert leader_name(merged) == "Cid"
    assert merged.headline.value == "2"


def test_changes_of_different_registers_both_survive() -> None:
    copies = apart_from("Ann", "Bob")
    copies.step(0, "Ann", "play", 0, 1.0)
    copies.step(1, "Bob", "chat", 0, 1.0)
    copies.step(0, "Ann", "chat", 1, 1.0)
    copies.step(1, "Bob", "drop", 0, 1.0)
    merged = both(copies)
    assert merged.transport.value.next is not None or merged.transport.value.is_playing
    assert [chat.text for chat in merged.chat] == ["0", "1"]
    assert not merged.members[copies.stage.ids["Bob"]].connected


def test_tombstone_wins_against_an_older_record() -> None:
    copies = apart_from("Ann", "Bob")
    copies.step(1, "Bob", "leave", 0, 1.0)
    copies.step(0, "Ann", "headline", 0, 100.0)
    assert not both(copies).members[copies.stage.ids["Bob"]].present


def test_late_drop_of_the_old_connection_does_not_undo_a_resume() -> None:
    copies = apart_from("Ann", "Bob")
    old = copies.stage.connections["Bob"]
    copies.step(0, "Bob", "resume", 0, 1.0)
    new = copies.stage.connections["Bob"]
    copies.stage.connections["Bob"] = old
    copies.step(1, "Bob", "drop", 0, 5000.0)
    merged = both(copies).members[copies.stage.ids["Bob"]]
    assert (merged.connection_id, merged.connected) == (new, True)


def test_older_epoch_wins_with_the_members_of_both() -> None:
    copies = Copies()
    copies.step(0, "Ann", "join", 0, 0.0)
    copies.step(1, "Bob", "join", 0, 5.0)
    first, second = copies.copies[:2]
    assert first is not None
    assert second is not None
    merged = both(copies)
    assert merged.epoch == first.epoch
    assert set(merged.members) == {*first.members, *second.members}
    assert leader_name(merged) == "Bob"


def test_ring_keeps_the_last_fifty_messages_of_both() -> None:
    copies = apart_from("Ann", "Bob")
    for number in range(CHAT_RING):
        copies.step(number % 2, NAMES[number % 2], "chat", number % 4, 1.0)
    assert len(both(copies).chat) == CHAT_RING
    for number in range(CHAT_RING):
        copies.step(number % 2, NAMES[number % 2], "chat", number % 4, 1.0)
    a, b = copies.copies[:2]
    assert a is not None
    assert b is not None
    merged = both(copies)
    last = sorted({(chat.sent_at, chat.message_id) for chat in (*a.chat, *b.chat)})[-CHAT_RING:]
    assert [(chat.sent_at, chat.message_id) for chat in merged.chat] == last


def test_equal_stamps_are_ordered_by_content() -> None:
    session = new_session("song", "epoch", HERES[0], NOW)
    a = replace(session, headline=replace(session.headline, value="a"))
    b = replace(session, headline=replace(session.headline, value="b"))
    assert merge(a, b).headline.value == merge(b, a).headline.value == "b"


def test_equal_copies_share_the_stored_parts() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.do("Ann", ChatMessage(text="hi"))
    stored = stage.session
    assert stored is not None
    for command in (Play(), UpdateMessage(message="from the top"), SetRole(role="follower")):
        stage.do("Ann", command)
    ahead = stage.session
    assert ahead is not None
    merged = merge(ahead, stored)
    assert merged.chat is stored.chat
    assert merged.members is stored.members
    assert merged.settings is stored.settings
    assert merged.transport is ahead.transport
    stage.do("Ann", Drop())
    stage.join("Bob")
    stage.do("Bob", LeaveSession())
    assert stage.session is not None
    assert same_content(merge(stored, stage.session), stage.session)
