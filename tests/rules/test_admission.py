"""Admission: from a join message to the command, or the refusal."""

import jwt
import pytest

from bandsync.rules.actions import Bind
from bandsync.rules.admission import JoinContext, admit
from bandsync.rules.tokens import ResumeToken
from bandsync.wire.commands import JoinSession, Refusal
from bandsync.wire.messages import quality
from tests.support.states import NOW

SECRET = "a secret of thirty-two characters"
OWN = ResumeToken("member-1", 3, "own")
OTHER = ResumeToken("member-2", 1, "other")


def admitted(message: JoinSession, doorway: JoinContext) -> Bind:
    command = admit(message, doorway, epoch_id="e", secret="s", now=NOW)
    assert isinstance(command, Bind), command
    return command


def test_omitted_fields_get_defaults() -> None:
    command = admitted(JoinSession(), JoinContext("song"))
    assert command == Bind("song", "e", "s", "Musician")
    assert admitted(JoinSession(session_id="mine"), JoinContext("song")).session_id == "mine"


@pytest.mark.parametrize("path", ["", "a b", "x" * 65])
def test_missing_session_id_is_refused(path: str) -> None:
    refused = admit(JoinSession(), JoinContext(path), epoch_id="e", secret="s", now=NOW)
    assert isinstance(refused, Refusal)
    assert refused.context == {"field": "sessionId"}


def test_resume_tokens_are_tried_in_order() -> None:
    there = JoinContext("song", "song", OWN)
    assert admitted(JoinSession(), there).resume == (OWN,)
    assert admitted(JoinSession(resume_token=str(OTHER)), there).resume == (OTHER, OWN)
    assert admitted(JoinSession(resume_token="none"), there).resume == (OWN,)
    assert admitted(JoinSession(session_id="other"), there).resume == ()


def test_claims_override_the_message() -> None:
    claims = {"sub": "u", "session": "song", "exp": NOW / 1000 + 60}
    guarded = JoinContext("song", join_secret=SECRET)

    def join(**more: object) -> Bind | Refusal:
        token = jwt.encode({**claims, **more}, SECRET)
        message = JoinSession(token=token, display_name="Bob", role="leader")
        return admit(message, guarded, epoch_id="e", secret="s", now=NOW)

    said, claimed = join(), join(name="Ann", role="follower")
    assert isinstance(said, Bind)
    assert isinstance(claimed, Bind)
    assert (said.display_name, said.wants_lead) == ("Bob", True)
    assert (claimed.display_name, claimed.wants_lead) == ("Ann", False)
    for wrong in ({"exp": NOW / 1000}, {"nbf": NOW / 1000 + 1}, {"session": "x"}, {"role": "boss"}):
        refused = join(**wrong)
        assert isinstance(refused, Refusal), wrong
        assert refused.code == "unauthorized"


def test_expired_token_allows_only_a_resume() -> None:
    guarded = JoinContext("song", join_secret=SECRET)
    old = jwt.encode({"sub": "u", "session": "song", "exp": NOW / 1000 - 1}, SECRET)
    back = admitted(JoinSession(token=old, resume_token=str(OWN)), guarded)
    assert (back.resume, back.resume_only) == ((OWN,), True)
    good = jwt.encode({"sub": "u", "session": "song", "exp": NOW / 1000 + 1}, SECRET)
    assert not admitted(JoinSession(token=good, resume_token=str(OWN)), guarded).resume_only
    forged = jwt.encode({"sub": "u", "session": "song", "exp": NOW / 1000 - 1}, SECRET[::-1])
    for token in (forged, ""):
        message = JoinSession(token=token, resume_token=str(OWN))
        refused = admit(message, guarded, epoch_id="e", secret="s", now=NOW)
        assert isinstance(refused, Refusal)
        assert refused.code == "unauthorized"


@pytest.mark.parametrize(
    ("latency", "name"),
    [
        (None, "unknown"),
        (50, "excellent"),
        (50.1, "good"),
        (100, "good"),
        (100.1, "fair"),
        (200, "fair"),
        (200.1, "poor"),
    ],
)
def test_quality_names_a_round_trip(latency: float | None, name: str) -> None:
    assert quality(latency) == name
