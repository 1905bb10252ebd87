"""A client's view of a session against the snapshots of the rules themselves."""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from bandsync.client.inbound import UnknownMessage, decode
from bandsync.client.view import SessionView, Step, advance, instant_of_beat, view_of
from bandsync.model import transport as arithmetic
from bandsync.model.session import CHAT_RING, Session
from bandsync.model.transport import Transport
from bandsync.rules.actions import Decision
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import Play
from bandsync.wire.messages import (
    ChatSent,
    Event,
    LeaderRequested,
    MemberView,
    MessageUpdated,
    Outgoing,
    RoomStats,
    Snapshot,
    encode,
)
from bandsync.wire.snapshots import snapshot
from tests.support.states import HERE, NOW, Stage, step, steps

HERES = [HERE, replace(HERE, isolated=False), replace(HERE, leadership="open")]


def heard(message: Outgoing) -> Outgoing:
    """The message as a client gets it: over the wire."""
    decoded = decode(encode(message).decode())
    assert type(decoded) is type(message)
    return decoded


def shown(session: Session) -> SessionView:
    fresh = heard(snapshot(session, NOW))
    assert isinstance(fresh, Snapshot)
    return view_of(fresh)


def comparable(view: SessionView) -> SessionView:
    """The view without server ids: events do not name the server of a resumed member."""
    members = {id_: replace(member, server_id="") for id_, member in view.members.items()}
    return replace(view, members=members)


@example([("Ann", "leave", 0, 0.0)], HERE)
@example([("Ann", "down", 0, 0.0), ("Bob", "join", 0, 0.0)], HERE)
@given(steps, st.sampled_from(HERES))
def test_view_after_events_equals_a_fresh_snapshot(
    plan: list[tuple[str, str, int, float]], here: ServerContext
) -> None:
    stage = Stage(here)
    stage.join("Ann")
    assert stage.session is not None
    view = shown(stage.session)
    for name, what, number, passed in plan:
        stage.now += passed
        before = len(stage.events)
        step(stage, name, what, number)
        for event in stage.events[before:]:
            done = advance(view, heard(event))
            assert (done.stale, done.gap) == (False, False)
            view = done.view
            # A repeated event changes nothing.
            assert advance(view, heard(event)) == Step(view, stale=True)
        assert comparable(view) == comparable(shown(stage.session))


@given(steps, st.data())
def test_missed_version_is_detected_at_the_next(
    plan: list[tuple[str, str, int, float]], data: st.DataObject
) -> None:
    stage = Stage()
    stage.join("Zoe")
    assert stage.session is not None
    view = shown(stage.session)
    for name, what, number, passed in plan:
        stage.now += passed
        step(stage, name, what, number)
    if len(stage.events) < 3:
        return
    missed = data.draw(st.integers(1, len(stage.events) - 2))
    for number, event in enumerate(stage.events[1:], 1):
        if number == missed:
            continue
        done = advance(view, heard(event))
        assert done.gap == (number > missed)
        view = done.view
    assert view.version == missed
    # The snapshot heals it.
    done = advance(view, heard(snapshot(stage.session, stage.now)))
    assert done == Step(shown(stage.session))


def a_view(version: int = 7) -> SessionView:
    stage = Stage()
    you = stage.join("Ann")
    assert stage.session is not None
    member = MemberView(you.member_id, "Ann", "leader", NOW, True, "stage")
    return replace(shown(stage.session), version=version, members={you.member_id: member})


def test_snapshots_go_back_only_to_another_epoch() -> None:
    stage = Stage()
    stage.join("Ann")
    assert stage.session is not None
    fresh = snapshot(stage.session, NOW)
    view = replace(view_of(fresh), version=9)
    assert advance(view, fresh) == Step(view, stale=True)
    other = replace(fresh, epoch="another")
    assert advance(view, other) == Step(view_of(other))


def test_the_chat_is_bounded() -> None:
    view = a_view(0)
    for number in range(1, CHAT_RING + 4):
        said = ChatSent("song", number, NOW, f"m{number}", "x", "Ann", str(number), NOW + number)
        view = advance(view, said).view
    assert [chat.text for chat in view.chat] == [str(n) for n in range(4, CHAT_RING + 4)]


def test_messages_without_a_change_keep_the_view() -> None:
    view = a_view()
    asked = LeaderRequested("song", 7, NOW, "bob", "Bob")
    stats = RoomStats("song", NOW, 1, 1, False, 120, 0, None, 1, None, [])
    for message in (asked, stats, UnknownMessage("news", {"type": "news", "version": 7})):
        done = advance(view, message)
        assert done == Step(view)
        assert done.view is view


@pytest.mark.parametrize("version", [8, 20])
def test_unknown_change_is_a_gap(version: int) -> None:
    view = a_view()
    unknown = UnknownMessage("encore", {"type": "encore", "version": version})
    assert advance(view, unknown) == Step(view, gap=True)


def test_unknown_fields_and_types_decode() -> None:
    known = b'{"type":"message_updated","sessionId":"song","version":8,"serverTime":1.0'
    assert decode((known + b',"message":"Hi","by":"x","mood":"sunny"}').decode()) == MessageUpdated(
        "song", 8, 1.0, "Hi", "x"
    )
    encore = decode('{"type":"encore","version":8,"times":2}')
    assert isinstance(encore, UnknownMessage)
    assert (encore.type, encore.version, encore.fields["times"]) == ("encore", 8, 2)
    # A reason that we have never heard of.
    left = '{"type":"user_left","sessionId":"s","version":8,"serverTime":1,"memberId":"x",'
    bored = decode(left + '"memberCount":1,"reason":"bored"}')
    assert isinstance(bored, UnknownMessage)
    assert bored.version == 8
    assert decode('{"type":"encore","version":"8"}').version is None  # type: ignore[union-attr]


@given(st.text() | st.recursive(st.none() | st.integers(), st.lists).map(msgspec.json.encode))
def test_junk_is_no_message(junk: str | bytes) -> None:
    text = junk if isinstance(junk, str) else junk.decode()
    assert decode(text) is None


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "{}", '{"type":1}', '{"type":"\ud800"}'])
def test_malformed_text_is_no_message(text: str) -> None:
    assert decode(text) is None


tempi = st.floats(20, 300)


@given(st.floats(0, 10_000), st.floats(0, 500), tempi, st.none() | tempi, st.booleans())
def test_instant_of_beat_inverts_beat_at(
    waited: float, beat: float, tempo: float, then: float | None, seeks: bool
) -> None:
    transport = arithmetic.play(arithmetic.initial(NOW), NOW, 0.0, 0.0)
    transport = arithmetic.set_tempo(transport, NOW, tempo, None, "now")
    if then is not None:
        transport = arithmetic.set_tempo(transport, NOW + 1, then, None, "bar")
    if seeks:
        transport = arithmetic.seek(transport, NOW + 2, 60_000, "bar")
    after = NOW + waited
    found = instant_of_beat(transport, beat, after)
    if found is None:
        # It is behind us, or is jumped over.
        assert beat_at(transport, after) > beat or seeks
    else:
        assert found >= after
        assert beat_at(transport, found) == pytest.approx(beat, abs=1e-4)


def beat_at(transport: Transport, instant: float) -> float:
    return arithmetic.beat_at(arithmetic.in_force(transport, instant), instant)


def test_a_song_that_stands_reaches_no_beat_until_it_starts() -> None:
    stage = Stage()
    stage.join("Ann")
    assert stage.session is not None
    assert instant_of_beat(stage.session.transport.value, 0.0, NOW) is None
    done = stage.do("Ann", Play(start_in_ms=1000))
    assert isinstance(done, Decision)
    transport = done.session.transport.value
    assert instant_of_beat(transport, 0.0, NOW) == NOW + 1000
    assert instant_of_beat(transport, 2.0, NOW) == NOW + 2000


def test_events_are_events() -> None:
    # `stage.events` below counts on it: version n is at index n - 1.
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    assert all(isinstance(event, Event) for event in stage.events)
    assert [event.version for event in stage.events] == [1, 2]
