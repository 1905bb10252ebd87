"""PROTOCOL.md: its tables match the message definitions, the limits and the codes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from msgspec import Struct, structs

from bandsync.model.session import CHAT_RING, SessionSettings
from bandsync.model.transport import At, Segment, Transport
from bandsync.net.dispatch import MAX_BAD_MESSAGES_PER_MINUTE
from bandsync.rules import decide
from bandsync.rules.admission import DEFAULT_DISPLAY_NAME
from bandsync.settings import OPTIONS
from bandsync.storage.base import Presence
from bandsync.storage.channel_messages import CommittedChange, ConnectionStats, DirectMessage
from bandsync.wire import messages
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.commands import (
    MAX_REQUEST_ID,
    MAX_TIMESTAMP_DISTANCE_MS,
    ClientMessage,
    JoinSession,
    Play,
    Seek,
    SetTempo,
    is_session_id,
)
from bandsync.wire.http_messages import MAX_HEAD_BYTES
from bandsync.wire.messages import (
    ChatView,
    ConnectionLimits,
    Event,
    MemberStats,
    MemberView,
    Outgoing,
    TransportEvent,
    You,
)
from bandsync.wire.rate_limits import OTHER_RATE_PER_SECOND, RATES_PER_SECOND

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "bandsync" / "wire" / "PROTOCOL.md").read_text()


def rows(title: str, table: int = 0) -> list[list[str]]:
    """The cells of a table under a heading, without its first two lines."""
    section = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT)
    assert section is not None, title
    tables = re.findall(r"(?m)(?:^\|.*\|\n)+", section[1])
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in tables[table].strip().splitlines()[2:]
    ]


def names(cell: str) -> list[str]:
    """The texts in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def fields(struct: type[Struct], *, without: str = "") -> set[str]:
    """The fields as the document writes them: optional ones end with a question mark."""
    return {
        each.encode_name + ("" if each.required else "?")
        for each in structs.fields(struct)
        if each.encode_name != without
    }


def type_of(struct: type[Struct]) -> str:
    return str(struct.__struct_config__.tag)


def outgoing(base_type: type[Outgoing] = Outgoing) -> Iterator[type[Outgoing]]:
    """All messages that a server sends."""
    for each in base_type.__subclasses__():
        if each not in {Event, TransportEvent}:
            yield each
        yield from outgoing(each)


def test_client_messages_have_the_documented_fields() -> None:
    documented = {names(row[0])[0]: set(names(row[1])) for row in rows("Client to server")}
    defined = {
        type_of(struct): fields(struct, without="requestId") for struct in get_args(ClientMessage)
    }
    assert documented == defined


def test_server_messages_have_the_documented_fields() -> None:
    documented = {names(row[0])[0]: set(names(row[1])) for row in rows("Server to client")}
    assert documented == {type_of(struct): fields(struct) for struct in outgoing()}


def test_kinds_tell_events_from_other_messages() -> None:
    events = {names(row[0])[0] for row in rows("Server to client") if row[2] == "event"}
    assert events == {type_of(struct) for struct in outgoing() if issubclass(struct, Event)}


@pytest.mark.parametrize(
    ("title", "struct"),
    [
        ("`transport`", Transport),
        ("`next`", Segment),
        ("`member`", MemberView),
        ("`chat` entry", ChatView),
        ("`settings`", SessionSettings),
        ("`you`", You),
        ("`limits`", ConnectionLimits),
        ("`room_stats` entry", MemberStats),
    ],
)
def test_structures_have_the_documented_fields(title: str, struct: type[Struct]) -> None:
    (cell,) = [row[1] for row in rows("Structures") if row[0] == title]
    # A structure that the server sends has all of its fields.
    assert set(names(cell)) == {name.rstrip("?") for name in fields(struct)}


def test_reasons_are_documented() -> None:
    text = {names(row[0])[0]: row[3] for row in rows("Server to client")}
    assert set(get_args(messages.LeaveReason)) == set(names(text["user_left"])) - {"reason"}
    assert set(get_args(messages.RoleReason)) == set(names(text["role_changed"])) - {"reason"}
    for quality in get_args(messages.Quality):
        assert f"`{quality}`" in DOCUMENT


def documented_range(field: str) -> str:
    (cell,) = [row[1] for row in rows("Client to server", 1) if field in names(row[0])]
    return cell


def limits_of(kind: str, field: str) -> dict[str, Any]:
    """The constraints of a field, as JSON schema writes them."""
    (struct,) = [each for each in get_args(ClientMessage) if type_of(each) == kind]
    schema = msgspec.json.schema(struct)
    found: dict[str, Any] = schema["$defs"][struct.__name__]["properties"][field]
    return found


@pytest.mark.parametrize(
    ("kind", "field", "low", "high"),
    [
        ("play", "positionMs", "minimum", "maximum"),
        ("seek", "positionMs", "minimum", "maximum"),
        ("play", "startInMs", "minimum", "maximum"),
        ("play", "countInBeats", "minimum", "maximum"),
        ("set_tempo", "tempoBpm", "minimum", "maximum"),
        ("set_tempo", "tempo", "minimum", "maximum"),
        ("set_tempo", "beatsPerBar", "minimum", "maximum"),
        ("chat_message", "text", "minLength", "maxLength"),
        ("join_session", "displayName", "minLength", "maxLength"),
    ],
)
def test_ranges_are_those_of_the_messages(kind: str, field: str, low: str, high: str) -> None:
    limits = limits_of(kind, field)
    assert f"{limits[low]:.0f} … {limits[high]:.0f}" in documented_range(field)


def test_other_limits_are_documented() -> None:
    assert f"at most {limits_of('update_message', 'message')['maxLength']} " in documented_range(
        "message"
    )
    assert f"at most {MAX_TIMESTAMP_DISTANCE_MS:.0f} from" in DOCUMENT
    assert f"a string of at most {MAX_REQUEST_ID} characters" in DOCUMENT
    assert f"over {decide.LEADER_RESYNC_MS:.0f} ms re-anchors" in DOCUMENT
    assert f"over {decide.FOLLOWER_DRIFT_MS:.0f} ms is answered" in DOCUMENT


def test_session_id_has_the_documented_length() -> None:
    match = re.match(r"1 to (\d+) of ", documented_range("sessionId"))
    assert match is not None
    longest = int(match[1])
    for length, valid in (0, False), (1, True), (longest, True), (longest + 1, False):
        assert is_session_id("a" * length) is valid


@pytest.mark.parametrize(
    ("kind", "field"), [("sync_report", "errorMs"), ("sync_request", "version")]
)
def test_minima_are_those_of_the_messages(kind: str, field: str) -> None:
    limits = limits_of(kind, field)
    assert "maximum" not in limits
    assert f"{limits['minimum']:.0f} or more" in documented_range(field)


def test_defaults_are_documented() -> None:
    def default(struct: type[Struct], field: str) -> object:
        (found,) = [each.default for each in structs.fields(struct) if each.name == field]
        return found

    assert f"default `{DEFAULT_DISPLAY_NAME}`" in documented_range("displayName")
    assert f"default {default(Play, 'count_in_beats')}" in documented_range("countInBeats")
    for struct in (Seek, SetTempo):
        assert f"`{default(struct, 'at')}` (default)" in documented_range("at")
    assert f"`ticks` (default `{str(default(JoinSession, 'ticks')).lower()}`)" in DOCUMENT


def test_values_of_at_are_documented() -> None:
    assert set(get_args(At)) == set(names(documented_range("at")))


def test_qualities_begin_at_the_documented_round_trips() -> None:
    match = re.search(
        r"`excellent` up to (\d+) ms .*`good` up to (\d+), `fair` up to (\d+)", DOCUMENT
    )
    assert match is not None
    steps = ("excellent", "good"), ("good", "fair"), ("fair", "poor")
    for bound, step in zip(map(float, match.groups()), steps, strict=True):
        assert (messages.quality(bound), messages.quality(bound + 0.001)) == step


def test_abuse_limit_is_documented() -> None:
    (meaning,) = [row[1] for row in rows("Errors") if names(row[0]) == ["bad_message"]]
    assert f"the {MAX_BAD_MESSAGES_PER_MINUTE}th within a minute" in meaning


def test_redis_messages_have_the_documented_fields() -> None:
    content = {names(row[0])[0]: set(names(row[2])) for row in rows("Redis")}
    built = fields(CommittedChange) | fields(DirectMessage) | fields(ConnectionStats)
    assert content["events:{ID}"] == built | {"epoch"}  # `prev` is a tip: epoch, version, eventId
    assert content["server:SERVERID"] == {name.rstrip("?") for name in fields(Presence)}


def test_rates_are_documented() -> None:
    table = {(names(row[0]) or ["*"])[0]: float(row[1]) for row in rows("Rate limits and bounds")}
    assert table.pop("*") == OTHER_RATE_PER_SECOND
    assert table == RATES_PER_SECOND


def test_bounds_are_the_defaults_of_their_settings() -> None:
    defaults = {option.name: option.default for option in OPTIONS}
    for title, value, setting in rows("Rate limits and bounds", 1):
        number = value.split()[0]
        if names(setting):
            assert number == defaults[names(setting)[0]], title
        else:
            assert (
                int(number) == {"HTTP head": MAX_HEAD_BYTES, "chat messages kept": CHAT_RING}[title]
            )


def test_error_codes_are_documented() -> None:
    documented = {names(row[0])[0] for row in rows("Errors")}
    sources = [
        path.read_text()
        for package in ("wire", "rules", "net", "rooms", "storage")
        for path in (ROOT / "bandsync" / package).rglob("*.py")
    ]
    built = {code for text in sources for code in re.findall(r'Refusal\(\s*"(\w+)"', text)}
    assert documented == built


def test_close_codes_are_documented() -> None:
    table = {
        names(name)[0]: (int(code), reconnect == "yes")
        for code, name, reconnect, _ in rows("Close codes")
    }
    assert table == {code.name: (code.value, code.reconnect) for code in CloseCode}
