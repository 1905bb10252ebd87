"""Who may join as whom: from a ``join_session`` to the `Bind` that the rules decide on."""

from msgspec import UNSET, Struct

from bandsync.rules.actions import Bind
from bandsync.rules.refusals import UNAUTHORIZED
from bandsync.rules.tokens import ResumeToken, expired, parse_resume_token, verify_join_token
from bandsync.wire.commands import JoinSession, Refusal, invalid_field, is_session_id

DEFAULT_DISPLAY_NAME = "Musician"


class JoinContext(Struct, frozen=True):
    """What is known of a connection that asks to join.

    Attributes:
        path_session: the session id in the path of its upgrade, the default for the message's.
        joined_session: the session it is in already; empty if in none.
        own_token: the latest resume token of the member it is there.
        join_secret: what join tokens are signed with; None when joining needs none.
    """

    path_session: str
    joined_session: str = ""
    own_token: ResumeToken | None = None
    join_secret: str | None = None


def admit(
    message: JoinSession, doorway: JoinContext, *, epoch_id: str, secret: str, now: float
) -> Bind | Refusal:
    """What ``message`` asks for, if it may.

    A claim of the join token goes before what the message says. Who asks again for the session it
    is in stays the member it is, unless the message proves it another. A join token that has
    expired lets nobody in, but back.

    Args:
        epoch_id: drawn for this message, as is ``secret``: see `Bind`.
        now: session clock, milliseconds.
    """
    session_id = doorway.path_session if message.session_id is UNSET else message.session_id
    if not is_session_id(session_id):
        return invalid_field("sessionId")
    name = DEFAULT_DISPLAY_NAME if message.display_name is UNSET else message.display_name
    role = message.role
    given = None if message.resume_token is UNSET else parse_resume_token(message.resume_token)
    own = doorway.own_token if doorway.joined_session == session_id else None
    resume = tuple(token for token in (given, own) if token is not None)
    resume_only = False
    if doorway.join_secret is not None:
        token = "" if message.token is UNSET else message.token
        claims = verify_join_token(token, doorway.join_secret, session_id, now)
        if claims is None:
            return UNAUTHORIZED
        # Who plays is not thrown out in mid-song for having lost the network once.
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
