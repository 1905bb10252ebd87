"""Every field of every message: right, wrong, missing, hostile."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandsync.wire.commands import (
    TYPES,
    LatencyProbe,
    PositionSync,
    Refusal,
    SetTempo,
    Undecodable,
    decode,
    echoed,
    kind_of,
    out_of_range,
)
from tests.support.states import NOW, Stage

NUMBERS = ["x", True, [], {}, None, "1"]
STRINGS = [1, 1.5, True, [], {}, None, "\ud800"]

# type: {field: (a right value, wrong ones)}; a field is required if its name ends with "!".
FIELDS: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "join_session": {
        "sessionId": ("A-z_0.9", [*STRINGS, "", "x" * 65, "a b", "a/b", "é", "a\n", "a\0"]),
        "displayName": ("🎸" * 64, [*STRINGS, "", "🎸" * 65]),
        "role": ("leader", [*STRINGS, "boss", "Leader"]),
        "resumeToken": ("what.ever", STRINGS),
        "token": ("what.ever", STRINGS),
        "ticks": (False, [0, 1, "true", None, [], {}]),
    },
    "leave_session": {},
    "play": {
        "positionMs": (86_400_000, [*NUMBERS, -0.001, 86_400_000.1, 10**400]),
        "startInMs": (10_000, [*NUMBERS, -1, 10_001]),
        "countInBeats": (32, [*NUMBERS, -1, 33, 1.5]),
    },
    "pause": {},
    "stop": {},
    "seek": {
        "positionMs!": (0, [*NUMBERS, -1, 1e308]),
        "at": ("bar", [*STRINGS, "later"]),
    },
    "set_tempo": {
        "tempoBpm!": (20, [*NUMBERS, 19.99, 300.01]),
        "tempo": (300.0, [*NUMBERS, 0, 301]),
        "beatsPerBar": (16, [*NUMBERS, 0, 17, 3.5]),
        "at": ("beat", [*STRINGS, ""]),
    },
    "position_sync": {
        "positionMs!": (5, [*NUMBERS, -1]),
        "timestamp!": (NOW, NUMBERS),
    },
    "set_role": {
        "role!": ("follower", [*STRINGS, "none"]),
        "memberId": ("m", STRINGS),
    },
    "request_leader": {},
    "deny_leader": {"memberId!": ("m", STRINGS)},
    "update_message": {"message!": ("", [*STRINGS, "x" * 501])},
    "chat_message": {"text!": ("🎺" * 1000, [*STRINGS, "", "🎺" * 1001])},
    "sync_request": {
        "version": (0, [*NUMBERS, -1, 1.5]),
        "epoch": ("e", STRINGS),
    },
    "latency_probe": {"timestamp!": (-1.5e300, NUMBERS)},
    "clock_sync": {"t0!": (2**63 - 1, [*NUMBERS, 10**400])},
    "sync_report": {"errorMs!": (0.5, [*NUMBERS, -1])},
    "heartbeat": {},
}
WRONG = [
    (kind, field.rstrip("!"), value)
    for kind, fields in FIELDS.items()
    for field, (_, wrong) in {**fields, "requestId": ("r", [*STRINGS, "x" * 65])}.items()
    for value in wrong
]


def right(kind: str) -> dict[str, Any]:
    return {"type": kind, **{name.rstrip("!"): good for name, (good, _) in FIELDS[kind].items()}}


def undecodable(message: dict[str, Any] | str | bytes) -> Undecodable:
    if isinstance(message, dict):
        message = json.dumps(message)
    if isinstance(message, str):
        message = message.encode()
    outcome = decode(message)
    assert isinstance(outcome, Undecodable), outcome
    return outcome


def test_table_covers_every_message() -> None:
    assert FIELDS.keys() == TYPES


@pytest.mark.parametrize("kind", FIELDS)
def test_valid_messages_decode(kind: str) -> None:
    message = {**right(kind), "requestId": "r" * 64, "unknown": {"ignored": [1]}}
    decoded = decode(json.dumps(message, ensure_ascii=False).encode())
    assert not isinstance(decoded, Undecodable), decoded
    assert kind_of(decoded) == kind
    least = {"type": kind} | {
        name.rstrip("!"): good for name, (good, _) in FIELDS[kind].items() if name.endswith("!")
    }
    assert not isinstance(decode(json.dumps(least).encode()), Undecodable)


@pytest.mark.parametrize(("kind", "field", "value"), WRONG)
def test_invalid_value_is_refused_with_its_field(kind: str, field: str, value: object) -> None:
    outcome = undecodable({**right(kind), "requestId": "r1", field: value})
    assert outcome.kind == kind
    assert outcome.refusal.code == "invalid_field"
    assert outcome.refusal.context == {"field": field}
    assert field in outcome.refusal.message
    assert outcome.request_id == ("r1" if field != "requestId" else outcome.request_id)


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, name[:-1]) for kind, fields in FIELDS.items() for name in fields if name.endswith("!")],
)
def test_missing_field_is_refused_with_its_name(kind: str, field: str) -> None:
    message = right(kind)
    del message[field]
    if field == "tempoBpm":
        del message["tempo"]
    assert undecodable(message).refusal.context == {"field": field}


def test_invalid_request_id_is_not_echoed() -> None:
    assert undecodable({"type": "play", "requestId": "x" * 65}).request_id != "x" * 65
    assert undecodable({"type": "nope", "requestId": "r9"}).request_id == "r9"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "{",
        "[]",
        "[1]",
        "null",
        "1",
        '"play"',
        "{'type':'play'}",
        "NaN",
        '{"type":"seek","positionMs":NaN}',
        '{"type":"seek","positionMs":-Infinity}',
        '{"type":"play"} {}',
        '{"type":"play",}',
        "\ufeff{}",
        "[" * 5000,
        '{"a":' * 5000,
        '{"type":"chat_message","text":"\n"}',
    ],
)
def test_payload_without_a_json_object_is_a_bad_message(text: str) -> None:
    assert undecodable(text).refusal.code == "bad_message"


@pytest.mark.parametrize("kind", ["", "PLAY", "play ", "scroll_tick", "\ud800", "x" * 10_000])
def test_unknown_type_is_refused(kind: str) -> None:
    assert undecodable({"type": kind}).refusal.code == "unknown_type"


@pytest.mark.parametrize("message", [{}, {"type": None}, {"type": 1}, {"type": ["play"]}])
def test_type_that_is_not_a_string_is_an_invalid_field(message: dict[str, Any]) -> None:
    outcome = undecodable(message)
    assert (outcome.refusal.code, outcome.refusal.context) == ("invalid_field", {"field": "type"})


def test_numbers_that_overflow_a_float_are_out_of_range() -> None:
    for number in ("1e999", "-1e999", "9" * 5000):
        text = '{"type":"latency_probe","timestamp":' + number + "}"
        assert undecodable(text).refusal.context == {"field": "timestamp"}


@pytest.mark.parametrize("number", [0, -1.5, 2**53 + 1, 2**64 - 1, -(2**63), 1e300])
def test_numbers_are_echoed_unchanged(number: float) -> None:
    assert echoed(number) == number
    assert type(echoed(number)) is type(number)


def test_integers_over_64_bits_are_echoed_as_floats() -> None:
    decoded = decode(b'{"type":"latency_probe","timestamp":12345678901234567890123}')
    assert isinstance(decoded, LatencyProbe)
    assert echoed(decoded.timestamp) == 1.2345678901234568e22


def test_timestamp_over_ten_seconds_away_is_refused() -> None:
    for distance, refused in ((9_999.0, False), (10_001.0, True), (-10_001.0, True)):
        message = PositionSync(position_ms=0, timestamp=NOW + distance)
        assert (out_of_range(message, NOW) is not None) is refused


def test_tempo_is_an_alias_of_tempo_bpm() -> None:
    assert SetTempo(tempo=90.0).new_tempo == 90.0
    assert SetTempo(tempo_bpm=80.0, tempo=90.0).new_tempo == 80.0


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))
)
def test_decoding_never_raises(payload: bytes) -> None:
    outcome = decode(payload)
    assert isinstance(outcome, Undecodable) or kind_of(outcome) in TYPES


@given(
    st.sampled_from(sorted(TYPES)),
    st.dictionaries(
        st.sampled_from(sorted({name.rstrip("!") for f in FIELDS.values() for name in f})), junk
    ),
)
def test_any_fields_decode_or_are_refused(kind: str, fields: dict[str, Any]) -> None:
    try:
        text = json.dumps({"type": kind, **fields})
    except ValueError:
        return
    outcome = decode(text.encode())
    if isinstance(outcome, Undecodable):
        assert outcome.refusal.code in {"invalid_field", "bad_message"}
        if outcome.refusal.code == "bad_message":
            assert "NaN" in text or "Infinity" in text or "\\ud" in text
        return
    stage = Stage()
    stage.join("Ann")
    stage.join("Bob")
    if kind in {"join_session", "latency_probe", "clock_sync", "heartbeat"}:
        return
    for name in ("Ann", "Bob"):
        before = stage.session
        decision = stage.attempt(name, outcome)  # type: ignore[arg-type]
        if isinstance(decision, Refusal):
            assert stage.session is before
    assert stage.session is not None
    transport = stage.session.transport.value
    assert all(map(math.isfinite, (transport.position_ms, transport.beat, transport.anchor_time)))
