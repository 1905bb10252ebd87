"""PROTOCOL.md: its tables match the message definitions, the limits and the codes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from msgspec import Struct, structs

from bandsync.model.session import CHAT_RING, SessionSettings
from bandsync.model.transport import Segment, Transport
from bandsync.rules import decide
from bandsync.settings import OPTIONS
from bandsync.wire import messages
from bandsync.wire.close_codes import CloseCode
from bandsync.wire.commands import MAX_REQUEST_ID, MAX_TIMESTAMP_DISTANCE_MS, ClientMessage
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
            assert int(number) in {MAX_HEAD_BYTES, CHAT_RING}, title


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
