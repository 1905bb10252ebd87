"""The rules of a session, by property and by example."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from bandsync.model.session import (
    CHAT_RING,
    MAX_TOMBSTONES,
    TOMBSTONE_MS,
    Session,
    find,
    leader_of,
    present,
)
from bandsync.rules.actions import Actor, Bind, Decision, Drop, Expire
from bandsync.rules.decide import decide
from bandsync.rules.server_context import ServerContext
from bandsync.rules.tokens import ResumeToken, parse_resume_token
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Play,
    PositionSync,
    Refusal,
    Seek,
    SetTempo,
    Stop,
    SyncRequest,
)
from bandsync.wire.messages import (
    MemberConnection,
    Played,
    Snapshot,
    SyncResponse,
    TempoChanged,
    UserLeft,
    encode,
)
from tests.support.states import NOW, Stage, kinds, step, steps


def registers(session: Session) -> dict[str, tuple[object, object]]:
    """Order and content of each register, as a merge compares them."""
    found: dict[str, tuple[object, object]] = {
        "leader": (session.leader.rank, session.leader.member_id),
        "transport": (session.transport.stamp, session.transport.value),
        "headline": (session.headline.stamp, session.headline.value),
        "settings": (session.settings.stamp, session.settings.value),
    }
    for member in session.members.values():
        order = (member.incarnation, member.time, member.writer)
        found[f"member {member.member_id}"] = (order, member)
    return found


@settings(max_examples=300, deadline=None)
@given(steps, st.booleans(), st.sampled_from(["claim", "open"]))
def test_invariants_hold_for_any_commands(
    script: list[tuple[str, str, int, float]], isolated: bool, leadership: str
) -> None:
    stage = Stage(ServerContext("stage", "boot-1", 3, leadership, isolated))
    vacated = False
    for name, what, number, passed in script:
        stage.now += passed
        before = stage.session
        decision = step(stage, name, what, number)
        after = stage.session
        if after is None:
            continue

        # Versions count changes, and each event has its own.
        if isinstance(decision, Decision):
            first = before.version if before else 0
            versions = [event.version for event in decision.events]
            assert versions == list(range(first + 1, after.version + 1))
            assert (decision.session is before) == (not decision.events)
        elif isinstance(decision, Refusal):
            assert after is before

        # Exactly one leader while a member is connected, unless the only member stepped down.
        connected = [member for member in present(after) if member.connected]
        if after.leader.member_id == "":
            vacated = True
        if connected and len(connected) > 1:
            assert leader_of(after) is not None
        elif connected and leader_of(after) is None:
            assert after.leader.member_id == ""
            assert vacated

        assert sum(1 for _ in present(after)) <= after.settings.value.max_members
        assert len(after.chat) <= CHAT_RING

        # Stamps never go backwards, and content never changes without a later stamp.
        if before is not None:
            assert after.epoch == before.epoch
            assert after.last_active_at >= before.last_active_at
            if after.leader != before.leader:
                assert after.leader.rank.time > before.leader.rank.time
            new = registers(after)
            for register, (order, content) in registers(before).items():
                if register not in new:
                    member = before.members[register.removeprefix("member ")]
                    assert not member.present
                    assert member.time < stage.now - TOMBSTONE_MS  # Never so many as to be capped.
                elif new[register] != (order, content):
                    assert new[register][0] > order, register
            sent = [(chat.sent_at, chat.message_id) for chat in after.chat]
            assert sent == sorted(sent)
            assert len({chat.slot for chat in after.chat}) == len(after.chat)


def test_second_decision_is_idempotent() -> None:
    stage = Stage()
    stage.join("Ann")
    assert stage.session is not None
    actor = stage.actor("Ann")
    once = decide(stage.session, ChatMessage(text="hi"), actor, NOW)
    assert isinstance(once, Decision)
    again = decide(once.session, ChatMessage(text="hi"), actor, NOW)
    assert isinstance(again, Decision)
    assert again.session is once.session


def test_drop_and_expire_of_an_old_connection_do_nothing() -> None:
    stage = Stage()
    stage.join("Ann")
    old = stage.connections["Ann"]
    stage.join("Ann", resume=True)
    new = stage.connections["Ann"]
    stage.connections["Ann"] = old
    assert not stage.do("Ann", Drop()).events
    assert not stage.do("Ann", Expire("timeout")).events
    refused = stage.attempt("Ann", Play())
    assert isinstance(refused, Refusal)
    assert refused.code == "not_joined"
    stage.connections["Ann"] = new
    assert kinds(stage.do("Ann", Drop()).events) == ["MemberConnection"]


def test_resume_binds_and_increments_the_incarnation() -> None:
    stage = Stage()
    ann = stage.join("Ann")
    again = stage.join("Ann", resume=True)
    assert stage.session is not None
    member = find(stage.session, ann.member_id)
    assert member is not None
    assert member.incarnation == 2
    assert again.resume_token.startswith(f"{ann.member_id}.2.")
    assert again.resumed
    # A server with an older state takes the incarnation from the token.
    stage.tokens["Ann"] = again.resume_token.replace(".2.", ".40.")
    assert f"{ann.member_id}.41." in stage.join("Ann", resume=True).resume_token


def test_resume_after_the_grace_joins_anew() -> None:
    stage = Stage()
    ann = stage.join("Ann")
    stage.do("Ann", Drop())
    stage.do("Ann", Expire("timeout"))
    again = stage.join("Ann", resume=True)
    assert not again.resumed
    assert again.member_id != ann.member_id


def test_connection_that_resumes_as_another_member_replaces_its_own() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    stage.join("Cid")
    token = parse_resume_token(stage.tokens["Bob"])
    assert token is not None
    bind = Bind("song", "e", "s", "Cid", resume=(token,))
    decision = decide(stage.session, bind, stage.actor("Cid"), NOW)
    assert isinstance(decision, Decision)
    replaced = decision.events[1]
    assert isinstance(replaced, UserLeft)
    assert (replaced.member_id, replaced.reason) == (stage.ids["Cid"], "replaced")


def test_members_of_a_full_session_can_resume() -> None:
    stage = Stage(ServerContext("stage", "boot-1", 2))
    stage.join("Ann")
    stage.join("Bob")
    refused = stage.attempt_join("Cid")
    assert isinstance(refused, Refusal)
    assert refused.code == "session_full"
    stage.do("Bob", Drop())
    assert isinstance(stage.attempt_join("Cid"), Refusal)  # A place in its grace is taken.
    assert stage.join("Bob", resume=True).resumed


def test_resume_only_refuses_a_new_member() -> None:
    stage = Stage()
    stage.join("Ann")
    token = parse_resume_token(stage.tokens["Ann"])
    assert token is not None
    back = Bind("song", "e", "s", "Ann", resume=(token,), resume_only=True)
    decision = decide(stage.session, back, stage.actor("Ann"), NOW)
    assert isinstance(decision, Decision)
    assert isinstance(decision.reply, Snapshot)
    wrong = ResumeToken(token.member_id, token.incarnation, "guessed")
    for attempt in (replace(back, resume=(wrong,)), replace(back, session_id="other", resume=())):
        refused = decide(stage.session, attempt, stage.actor("Cid"), NOW)
        assert isinstance(refused, Refusal)
        assert refused.code == "unauthorized"
    # Nor does it create a session.
    assert isinstance(decide(None, back, stage.actor("Ann"), NOW), Refusal)


@pytest.mark.parametrize(
    ("latencies", "lead"),
    [({}, 0.0), ({"Bob": 120.0}, 120.0), ({"Ann": 30.0, "Bob": 900.0}, 400.0)],
)
def test_lead_of_a_start_covers_the_slowest_member(
    latencies: dict[str, float], lead: float
) -> None:
    stage = Stage()
    stage.join("Ann")
    alone = stage.do("Ann", Play(), latencies_ms={stage.ids["Ann"]: 500.0})
    assert isinstance(alone.events[0], Played)
    assert alone.events[0].transport.next is None
    stage.do("Ann", Stop())
    stage.join("Bob")
    by_id = {stage.ids[name]: latency for name, latency in latencies.items()}
    played = stage.do("Ann", Play(count_in_beats=2), latencies_ms=by_id).events[0]
    assert isinstance(played, Played)
    assert played.transport.next is not None
    assert played.transport.next.anchor_time == NOW + lead + 1000
    # The lead before the count-in is not counted.
    assert played.count_in_beats == 2
    assert b"countInBeats" not in encode(alone.events[0])


def test_tempo_event_has_both_tempi() -> None:
    stage = Stage()
    stage.join("Ann")
    (event,) = stage.do("Ann", SetTempo(tempo_bpm=90.0, tempo=50.0, beats_per_bar=3)).events
    assert isinstance(event, TempoChanged)
    assert (event.old_tempo_bpm, event.new_tempo_bpm) == (120.0, 90.0)
    assert event.transport.beats_per_bar == 3


@pytest.mark.parametrize(
    ("difference", "moves"), [(20.0, False), (20.5, True), (-20.0, False), (-21.0, True)]
)
def test_leader_re_anchors_beyond_20_ms(difference: float, moves: bool) -> None:
    stage = Stage()
    stage.join("Ann")
    stage.do("Ann", Play(position_ms=10_000))
    stage.now += 5000
    report = PositionSync(position_ms=13_000 + difference, timestamp=NOW + 3000)
    decision = stage.do("Ann", report)
    assert bool(decision.events) is moves
    if moves:
        assert stage.session is not None
        segment = stage.session.transport.value
        assert segment.position_ms == pytest.approx(15_000 + difference)
        assert segment.beat == pytest.approx(30 + difference * 120 / 60_000)


def test_report_that_crossed_a_seek_is_ignored() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.do("Ann", Play(position_ms=0))
    stage.now += 5000
    stage.do("Ann", Seek(position_ms=60_000))
    stage.now += 30
    assert not stage.do("Ann", PositionSync(position_ms=4990, timestamp=NOW + 4990)).events


def test_sync_request_gets_a_snapshot_when_behind() -> None:
    stage = Stage()
    stage.join("Ann")
    assert stage.session is not None
    epoch = stage.session.epoch.id
    for request, reply in [
        (SyncRequest(version=1), SyncResponse),
        (SyncRequest(version=1, epoch=epoch), SyncResponse),
        (SyncRequest(version=1, epoch="another life"), Snapshot),
        (SyncRequest(version=2), Snapshot),
        (SyncRequest(), Snapshot),
    ]:
        assert type(stage.do("Ann", request).reply) is reply


def test_chat_keeps_the_last_fifty() -> None:
    stage = Stage()
    stage.join("Ann")
    for number in range(CHAT_RING + 7):
        stage.do("Ann", ChatMessage(text=str(number)))
    assert stage.session is not None
    assert [chat.text for chat in stage.session.chat] == [str(n) for n in range(7, CHAT_RING + 7)]
    assert sorted(chat.slot for chat in stage.session.chat) == list(range(CHAT_RING))


def test_chat_stays_in_order_when_the_clock_steps_back() -> None:
    stage = Stage()
    stage.join("Ann")
    for text in ("first", "second", "third"):
        stage.now -= 1000
        stage.do("Ann", ChatMessage(text=text))
    assert stage.session is not None
    ring = [(chat.sent_at, chat.text) for chat in stage.session.chat]
    assert [text for _, text in sorted(ring)] == ["first", "second", "third"]
    assert len({sent_at for sent_at, _ in ring}) == 3


def test_snapshot_shows_the_current_position() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.do("Ann", Play(position_ms=10_000))
    stage.now += 2500
    stage.do("Ann", SetTempo(tempo=90, at="bar"))
    reply = stage.do("Ann", SyncRequest()).reply
    assert isinstance(reply, Snapshot)
    assert (reply.position, reply.tempo, reply.is_playing) == (12_500, 120.0, True)
    stage.now += 5000
    reply = stage.do("Ann", SyncRequest()).reply
    assert isinstance(reply, Snapshot)
    assert (reply.position, reply.tempo, reply.tempo_bpm) == (17_500, 90.0, 90.0)


def test_old_tombstones_are_pruned() -> None:
    stage = Stage()
    stage.join("Ann")
    bob = stage.join("Bob").member_id
    stage.do("Bob", LeaveSession())
    assert stage.session is not None
    assert not stage.session.members[bob].present
    stage.now += TOMBSTONE_MS + 1
    stage.join("Cid")
    assert bob not in stage.session.members


def test_number_of_tombstones_is_bounded() -> None:
    stage = Stage()
    stage.join("Ann")
    for number in range(MAX_TOMBSTONES + 10):
        stage.now += 1
        stage.join(f"Guest {number}")
        stage.do(f"Guest {number}", LeaveSession())
    assert stage.session is not None
    assert len(stage.session.members) == 1 + MAX_TOMBSTONES
    assert stage.ids[f"Guest {MAX_TOMBSTONES + 9}"] in stage.session.members
    assert stage.ids["Guest 0"] not in stage.session.members


def test_second_decision_of_a_join_is_idempotent() -> None:
    stage = Stage(ServerContext("stage", "boot-1", 1))
    bind = Bind("song", "e", "secret", "Ann")
    actor = Actor(stage.here, "connection", "", "member")
    once = decide(None, bind, actor, NOW)
    assert isinstance(once, Decision)
    again = decide(once.session, bind, actor, NOW - 50)
    assert isinstance(again, Decision)
    assert again.session is once.session
    assert isinstance(again.reply, Snapshot)
    assert isinstance(once.reply, Snapshot)
    assert again.reply.you == once.reply.you


def test_join_and_drop_emit_their_events() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    (dropped,) = stage.do("Bob", Drop()).events
    assert isinstance(dropped, MemberConnection)
    assert not dropped.connected
    (left,) = stage.do("Bob", Expire("slow_consumer")).events
    assert isinstance(left, UserLeft)
    assert (left.reason, left.member_count) == ("slow_consumer", 1)
