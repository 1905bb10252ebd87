"""Commands about roles: set_role, request_leader, deny_leader."""

from msgspec import UNSET

from bandsync.model.session import Member, find, leader_of
from bandsync.rules.actions import Decision
from bandsync.rules.draft import Draft
from bandsync.rules.leadership import claimable
from bandsync.rules.refusals import LEADER_PRESENT, NOT_LEADER, NOT_MEMBER
from bandsync.rules.server_context import ServerContext
from bandsync.wire.commands import (
    DenyLeader,
    Refusal,
    SetRole,
    invalid_field,
)
from bandsync.wire.messages import (
    LeaderDenied,
    LeaderRequested,
)


def set_role(
    draft: Draft, command: SetRole, member: Member, server: ServerContext
) -> Refusal | None:
    """Claim the lead, hand it over, or step down; the refusal if the state does not allow it."""
    own = member.member_id
    leads = draft.session.leader.member_id == own
    target = own if command.member_id is UNSET else command.member_id
    if target != own:
        if command.role == "follower":
            return invalid_field("role")
        if not leads:
            return NOT_LEADER
        if find(draft.session, target) is None:
            return NOT_MEMBER
        draft.hand(target, "handed_over")
    elif command.role == "leader" and not leads:
        if not claimable(draft.session, server):
            return LEADER_PRESENT
        draft.hand(own, "claimed")
    elif command.role == "follower" and leads:
        elected = draft.elect(without=own)
        if not elected:
            draft.lead("")
        draft.change_role(own, "follower", "stepped_down")
        if elected:
            draft.change_role(draft.session.leader.member_id, "leader", "elected")
    return None


def request_leader(draft: Draft, member: Member) -> Decision:
    """Notify the leader that ``member`` requests the lead; without a leader, claim it."""
    leader = leader_of(draft.session)
    if leader is None:
        # There is no leader to notify: the request is a claim.
        draft.hand(member.member_id, "claimed")
        return Decision(*draft.done())
    session = draft.session
    if leader.member_id == member.member_id:
        return Decision(session)
    request = LeaderRequested(
        session.session_id, session.version, draft.now, member.member_id, member.display_name
    )
    return Decision(session, private=((leader.member_id, request),))


def deny_leader(draft: Draft, command: DenyLeader, member: Member) -> Decision | Refusal:
    """Notify the requester that the leader refused."""
    session = draft.session
    if session.leader.member_id != member.member_id:
        return NOT_LEADER
    if find(session, command.member_id) is None:
        return NOT_MEMBER
    denial = LeaderDenied(
        session.session_id, session.version, draft.now, member.member_id, member.display_name
    )
    return Decision(session, private=((command.member_id, denial),))
