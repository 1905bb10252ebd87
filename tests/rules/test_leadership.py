"""Leadership: claims, elections, hand-over, stepping down."""

from bandsync.model.transport import in_force
from bandsync.rules.actions import Drop, Expire
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Play,
    Refusal,
    RequestLeader,
    SetRole,
)
from bandsync.wire.messages import (
    RoleChanged,
)
from tests.support.states import HERE, Stage, kinds


def test_first_member_leads() -> None:
    stage = Stage()
    assert stage.join("Ann").role == "leader"
    assert stage.join("Bob", lead=True).role == "follower"
    assert stage.session is not None
    assert stage.session.version == 2


def test_join_as_leader_claims_the_lead_of_a_leader_in_its_grace() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    stage.do("Ann", Drop())
    assert stage.join("Cid").role == "follower"
    assert stage.join("Dan", lead=True).role == "leader"
    assert stage.join("Ann", resume=True).role == "follower"


def test_claim_emits_the_old_leader_first() -> None:
    stage = Stage()
    ann = stage.join("Ann")
    bob = stage.join("Bob")
    refused = stage.attempt("Bob", SetRole(role="leader"))
    assert isinstance(refused, Refusal)
    assert refused.code == "leader_present"
    stage.do("Ann", Drop())
    claimed = stage.do("Bob", SetRole(role="leader"))
    assert [
        (event.member_id, event.role, event.previous_role, event.reason)
        for event in claimed.events
        if isinstance(event, RoleChanged)
    ] == [
        (ann.member_id, "follower", "leader", "claimed"),
        (bob.member_id, "leader", "follower", "claimed"),
    ]
    assert not stage.do("Bob", SetRole(role="leader")).events


def test_open_leadership_can_be_claimed_at_any_time() -> None:
    stage = Stage(ServerContext("stage", "boot-1", 8, "open"))
    stage.join("Ann")
    stage.join("Bob")
    stage.do("Bob", SetRole(role="leader"))
    assert stage.leader == "Bob"


def test_unreachable_leader_can_be_replaced_in_memory_mode() -> None:
    stage = Stage(ServerContext("far", "boot-far", 8))
    stage.join("Ann")
    stage.here = HERE
    stage.join("Bob")
    stage.do("Bob", SetRole(role="leader"))
    assert stage.leader == "Bob"
    stage.here = ServerContext("stage", "boot-1", 8, isolated=False)
    stage.join("Cid")
    refused = stage.attempt("Cid", SetRole(role="leader"))
    assert isinstance(refused, Refusal)


def test_leader_hands_over() -> None:
    stage = Stage()
    ann = stage.join("Ann")
    bob = stage.join("Bob")
    for name, command, code in [
        ("Bob", SetRole(role="leader", member_id=ann.member_id), "not_leader"),
        ("Bob", SetRole(role="follower", member_id=ann.member_id), "invalid_field"),
        ("Ann", SetRole(role="follower", member_id=bob.member_id), "invalid_field"),
        ("Ann", SetRole(role="leader", member_id="nobody"), "not_member"),
    ]:
        refused = stage.attempt(name, command)
        assert isinstance(refused, Refusal)
        assert refused.code == code
    handed = stage.do("Ann", SetRole(role="leader", member_id=bob.member_id))
    assert [event.reason for event in handed.events if isinstance(event, RoleChanged)] == [
        "handed_over"
    ] * 2
    assert stage.leader == "Bob"


def test_stepping_down_elects_the_longest_connected_other_member() -> None:
    stage = Stage()
    stage.join("Ann")
    for name in ("Bob", "Cid"):
        stage.now += 1000
        stage.join(name)
    stage.now += 1000
    stage.do("Bob", Drop())
    stage.join("Bob", resume=True)  # Its latest connection is younger than Cid's now.
    down = stage.do("Ann", SetRole(role="follower"))
    assert [
        (event.role, event.reason) for event in down.events if isinstance(event, RoleChanged)
    ] == [
        ("follower", "stepped_down"),
        ("leader", "elected"),
    ]
    assert stage.leader == "Cid"


def test_next_member_leads_after_the_only_one_stepped_down() -> None:
    stage = Stage()
    stage.join("Ann")
    down = stage.do("Ann", SetRole(role="follower"))
    assert kinds(down.events) == ["RoleChanged"]
    assert stage.leader is None
    stage.do("Ann", ChatMessage(text="still nobody leads"))
    assert stage.leader is None
    assert isinstance(stage.attempt("Ann", Play()), Refusal)
    assert stage.join("Bob").role == "leader"


def test_resumed_member_leads_a_leaderless_session() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    stage.do("Bob", Drop())
    stage.do("Ann", LeaveSession())
    assert stage.leader is None
    assert stage.join("Bob", resume=True).role == "leader"


def test_end_of_a_leaders_grace_elects_and_keeps_playing() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.now += 1
    stage.join("Bob")
    stage.do("Ann", Play(start_in_ms=0))
    stage.do("Ann", Drop())
    assert stage.leader == "Ann"
    ended = stage.do("Ann", Expire("timeout"))
    assert kinds(ended.events) == ["UserLeft", "RoleChanged"]
    assert stage.leader == "Bob"
    assert stage.session is not None
    assert in_force(stage.session.transport.value, stage.now + 5).is_playing


def test_request_in_a_leaderless_session_is_a_claim() -> None:
    stage = Stage()
    stage.join("Ann")
    stage.do("Ann", SetRole(role="follower"))
    stage.do("Ann", RequestLeader())
    assert stage.leader == "Ann"
