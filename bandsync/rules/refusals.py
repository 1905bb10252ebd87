"""Refusals that several rules share."""

from bandsync.wire.commands import (
    Refusal,
)

NOT_JOINED = Refusal("not_joined", "Join a session first, with `join_session`.")


NOT_LEADER = Refusal("not_leader", "Only the leader may do this; ask with `request_leader`.")


NOT_MEMBER = Refusal("not_member", "No member has this id; the `snapshot` lists them.")


UNAUTHORIZED = Refusal(
    "unauthorized", "Joining needs a valid `token` for this session; get a new one."
)


LEADER_PRESENT = Refusal(
    "leader_present", "Somebody leads; ask for the lead with `request_leader`."
)


CONFLICT = Refusal("conflict", "Too many changes were made at the same time; try again.")
