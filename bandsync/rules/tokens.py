"""Resume tokens, which restore a member, and join tokens, which authorise a join."""

import hashlib
import hmac
from typing import Annotated

import jwt
import msgspec
from msgspec import Meta, Struct

from bandsync.model.session import Role
from bandsync.wire.commands import DisplayName


class ResumeToken(Struct, frozen=True):
    """Proof that a connection belongs to a member: ``memberId.incarnation.secret``.

    The incarnation changes with every binding; the secret does not. The previous token is
    therefore accepted too: the reply with the new one may be lost with the network. Likewise a
    server with an older state of the session accepts a newer token.
    """

    member_id: str
    incarnation: int
    secret: str

    def __str__(self) -> str:
        return f"{self.member_id}.{self.incarnation}.{self.secret}"


# More bindings than a member ever has, and far below 2**53, where JSON numbers become inexact.
_MAX_INCARNATION = 2**40


def parse_resume_token(text: str) -> ResumeToken | None:
    """The token in ``text``; None if it is malformed."""
    parts = text.split(".")
    if len(parts) != 3 or not text.isascii():
        return None
    member_id, incarnation, secret = parts
    if not incarnation.isdecimal() or len(incarnation) > 13:
        return None
    if int(incarnation) > _MAX_INCARNATION:
        return None
    return ResumeToken(member_id, int(incarnation), secret)


def hash_secret(secret: str) -> str:
    """The stored form of a resume token's secret: its SHA-256, hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def proves(token: ResumeToken, token_hash: str) -> bool:
    """Whether the token's secret matches the stored hash; compared in constant time."""
    return hmac.compare_digest(hash_secret(token.secret), token_hash)


class JoinClaims(Struct, frozen=True):
    """Claims of a join token; ``role`` and ``name`` override the fields of the message.

    Instants are in seconds since the Unix epoch, as in RFC 7519.
    """

    sub: Annotated[str, Meta(min_length=1)]
    session: str
    exp: float
    nbf: float = 0.0
    role: Role | None = None
    name: DisplayName | None = None


def verify_join_token(token: str, secret: str, session_id: str, now: float) -> JoinClaims | None:
    """The claims of a JSON Web Token (RFC 7519, HS256), which may have expired: see `expired`.

    Returns:
        None if the token is not signed with ``secret``, lacks a claim, is not valid yet at ``now``
        (milliseconds) or is for another session.
    """
    try:
        payload = jwt.decode(
            token,
            secret,
            algorithms=["HS256"],
            # The session clock decides, not the wall clock that PyJWT reads.
            options={
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
                "verify_aud": False,
            },
        )
        claims = msgspec.convert(payload, JoinClaims)
    except (jwt.InvalidTokenError, msgspec.ValidationError):
        return None
    if claims.session != session_id or now < claims.nbf * 1000:
        return None
    return claims


def expired(claims: JoinClaims, now: float) -> bool:
    """Whether the token has expired at ``now`` (milliseconds)."""
    return now >= claims.exp * 1000
