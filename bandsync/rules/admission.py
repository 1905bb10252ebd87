"""Admission: from a ``join_session`` message to the `Bind` command that the rules decide on."""

from msgspec import UNSET, Struct

from bandsync.rules.actions import Bind
from bandsync.rules.refusals import UNAUTHORIZED
from bandsync.rules.tokens import ResumeToken, expired, parse_resume_token, verify_join_token
from bandsync.wire.commands import JoinSession, Refusal, invalid_field, is_session_id

DEFAULT_DISPLAY_NAME = "Musician"


class JoinContext(Struct, frozen=True):
    """The state of a connection that sends ``join_session``.

    Attributes:
        path_session: session id in the path of its upgrade, the default of the message's.
        joined_session: the session it is in already; empty if in none.
        own_token: latest resume token of its member there.
        join_secret: key that join tokens are signed with; None when joining needs no token.
    """

    path_session: str
    joined_session: str = ""
    own_token: ResumeToken | None = None
    join_secret: str | None = None


def admit(
    message: JoinSession, context: JoinContext, *, epoch_id: str, secret: str, now: float
) -> Bind | Refusal:
    """The `Bind` command for ``message``, or the refusal.

    Claims of the join token override fields of the message. A connection that joins its own
    session again stays the same member, unless the message has a resume token of another. An
    expired join token allows a resume, not a new member.

    Args:
        context: the connection.
        epoch_id: drawn for this message: see `Bind`.
        secret: drawn for this message: see `Bind`.
        now: session clock, milliseconds.
    """
    session_id = context.path_session if message.session_id is UNSET else message.session_id
    if not is_session_id(session_id):
        return invalid_field("sessionId")
    name = DEFAULT_DISPLAY_NAME if message.display_name is UNSET else message.display_name
    role = message.role
    given = None if message.resume_token is UNSET else parse_resume_token(message.resume_token)
    own = context.own_token if context.joined_session == session_id else None
    resume = tuple(token for token in (given, own) if token is not None)
    resume_only = False
    if context.join_secret is not None:
        token = "" if message.token is UNSET else message.token
        claims = verify_join_token(token, context.join_secret, session_id, now)
        if claims is None:
            return UNAUTHORIZED
        # A member that lost its network in mid-song may resume with an expired token.
        resume_only = expired(claims, now)
        if resume_only and not resume:
            return UNAUTHORIZED
        name = claims.name or name
        role = claims.role or role
    return Bind(
        session_id=session_id,
        epoch_id=epoch_id,
        secret=secret,
        display_name=name,
        wants_lead=role == "leader",
        resume=resume,
        resume_only=resume_only,
    )
