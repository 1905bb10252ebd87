"""Leadership: elections, claims, and the leader register of a session."""

from msgspec.structs import replace

from bandsync.model.session import Leader, Member, Rank, Session, after, leader_of
from bandsync.rules.server_context import ServerContext


def longest_connected(session: Session, boot_id: str | None, without: str = "") -> Member | None:
    """The connected member whose latest connection is the oldest.

    Args:
        boot_id: consider only members of this server process; None for all.
        without: a member id to leave out.
    """
    return min(
        (
            member
            for member in session.members.values()
            if member.connected
            and member.member_id != without
            and (boot_id is None or member.boot_id == boot_id)
        ),
        key=lambda member: (member.connected_at, member.joined_at, member.member_id),
        default=None,
    )


def led_by(session: Session, member_id: str, now: float, boot_id: str) -> Session:
    """``session`` with another leader: a new term, written by the server process ``boot_id``."""
    rank = session.leader.rank
    new = Rank(rank.term + 1, after(now, rank.time), boot_id)
    return replace(session, leader=Leader(new, member_id))


def settle(session: Session, now: float, boot_id: str, reachable: str | None) -> Session:
    """``session`` with a leader, if a member can be elected.

    Exception: after the only connected member stepped down, it is not elected again.

    Args:
        boot_id: the server process that writes.
        reachable: elect a member of this server process only; None for any.

    Returns:
        The same object when there is a leader or no candidate.
    """
    if leader_of(session) is not None:
        return session
    candidate = longest_connected(session, reachable)
    if candidate is None:
        return session
    if not session.leader.member_id:
        others = longest_connected(session, reachable, without=candidate.member_id)
        if others is None:
            return session
    return led_by(session, candidate.member_id, now, boot_id)


def claimable(session: Session, server: ServerContext) -> bool:
    """Whether a member may claim the lead from the current leader.

    The lead is free when there is no leader, when it is disconnected, with open leadership, or in
    memory mode when it is on a server out of reach.
    """
    leader = leader_of(session)
    if leader is None or not leader.connected or server.leadership == "open":
        return True
    return server.isolated and leader.boot_id != server.boot_id
