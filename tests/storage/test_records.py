"""Sessions as the fields of a Redis hash: what is written, and what is not believed."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from msgspec import Raw
from msgspec.structs import replace

from bandsync.model.session import CHAT_RING, TOMBSTONE_MS, Session, tip
from bandsync.rules.actions import Command, Drop
from bandsync.storage.base import Presence, Unreadable
from bandsync.storage.channel_messages import (
    CommittedChange,
    read_channel_message,
    write_change,
    write_direct_message,
)
from bandsync.storage.records import (
    FORMAT,
    UnreadableError,
    changed_fields,
    patch_session,
    read_presence,
    read_session,
    read_tip,
    write_presence,
)
from bandsync.wire.commands import (
    ChatMessage,
    LeaveSession,
    Pause,
    Play,
    Seek,
    SetRole,
    SetTempo,
    Stop,
    UpdateMessage,
)
from tests.support.states import NOW, Stage, step, steps

TIP = {"epoch", "version", "eventId"}

Fields = dict[str, bytes]


def stored(session: Session, base: Session | None = None, under: Fields | None = None) -> Fields:
    """The hash after ``session`` was written over ``base``, which was stored as ``under``."""
    fields, gone = changed_fields(base, session)
    after = (under or {}) | fields
    for name in gone:
        del after[name]
    return after | {
        "epoch": session.epoch.id.encode(),
        "version": str(session.version).encode(),
        "eventId": session.event_id.encode(),
    }


def told(before: Session, after: Session) -> CommittedChange:
    """Apply the published change, as another server does."""
    fields, gone = changed_fields(before, after)
    change = read_channel_message(write_change(tip(before), tip(after), "hall", fields, gone, ()))
    assert isinstance(change, CommittedChange)
    return change


def a_band() -> Stage:
    """Ann leads a song that plays, Bob follows and Cid has left; each has said something."""
    stage = Stage()
    for name in ("Ann", "Bob", "Cid"):
        stage.join(name)
        stage.do(name, ChatMessage(text=f"I am {name} ♪"))
    stage.do("Ann", Play(position_ms=1000.0))
    stage.do("Ann", SetTempo(tempo=90, at="bar"))
    stage.do("Ann", UpdateMessage(message='"Verse"\n♭5'))
    stage.do("Cid", LeaveSession())
    return stage


def readable() -> Fields:
    session = a_band().session
    assert session is not None
    return stored(session)


@given(steps)
@settings(max_examples=150, deadline=None)
def test_any_session_is_read_as_it_was_written(
    script: list[tuple[str, str, int, float]],
) -> None:
    stage = Stage()
    fields: Fields = {}
    for name, what, number, passed in script:
        stage.now += passed
        before = stage.session
        step(stage, name, what, number)
        if stage.session is None:
            continue
        fields = stored(stage.session, before, fields)
        assert read_session("song", fields) == stage.session
        assert fields == stored(stage.session)
        if before is not None and before.version < stage.session.version:
            assert patch_session(before, told(before, stage.session)) == stage.session


def test_hash_has_the_fields_of_the_protocol() -> None:
    stage = a_band()
    session = stage.session
    assert session is not None
    fields = stored(session)
    members = {f"member:{stage.ids[name]}" for name in ("Ann", "Bob", "Cid")}
    assert set(fields) == {*TIP, "head", *members, "chat:0", "chat:1", "chat:2"}
    assert fields["epoch"].decode() == session.epoch.id
    assert fields["version"] == b"%d" % session.version
    assert fields["eventId"].decode() == session.event_id
    for name in fields.keys() - TIP:
        assert isinstance(json.loads(fields[name]), dict)


def test_stored_fields_contain_no_resume_secret() -> None:
    stage = a_band()
    assert stage.session is not None
    everything = b"".join(stored(stage.session).values()).decode()
    for token in stage.tokens.values():
        assert token.rpartition(".")[2] not in everything


@pytest.mark.parametrize(
    ("name", "command", "touched"),
    [
        ("Ann", UpdateMessage(message="Chorus"), set()),
        ("Ann", Play(), set()),
        ("Ann", Pause(), set()),
        ("Ann", Stop(), set()),
        ("Ann", Seek(position_ms=5), set()),
        ("Ann", SetTempo(tempo=77), set()),
        ("Ann", SetRole(role="follower"), set()),
        ("Bob", ChatMessage(text="hi"), {"chat:3"}),
        ("Bob", Drop(), {"member:Bob"}),
        ("Bob", LeaveSession(), {"member:Bob"}),
        ("Ann", LeaveSession(), {"member:Ann"}),
    ],
    ids=repr,
)
def test_only_changed_fields_are_written(name: str, command: Command, touched: set[str]) -> None:
    stage = a_band()
    before = stage.session
    stage.do(name, command)
    assert stage.session is not None
    fields, gone = changed_fields(before, stage.session)
    for known, member_id in stage.ids.items():
        touched = {field.replace(f"member:{known}", f"member:{member_id}") for field in touched}
    assert set(fields) == {"head", *touched}
    assert gone == []


def test_full_ring_is_written_one_slot_at_a_time() -> None:
    stage = a_band()
    for number in range(CHAT_RING - 3):
        stage.do("Ann", ChatMessage(text=str(number)))
    before = stage.session
    stage.do("Bob", ChatMessage(text="one more"))
    assert stage.session is not None
    fields, gone = changed_fields(before, stage.session)
    assert (set(fields), gone) == ({"head", "chat:0"}, [])
    assert len(read_session("song", stored(stage.session)).chat) == CHAT_RING


def test_removed_parts_are_deleted_from_the_hash() -> None:
    stage = a_band()
    before = stage.session
    assert before is not None
    cid = stage.ids["Cid"]
    stage.now += TOMBSTONE_MS + 1
    stage.do("Bob", LeaveSession())
    assert stage.session is not None
    after = replace(stage.session, chat=before.chat[1:])
    fields, gone = changed_fields(before, after)
    assert set(gone) == {f"member:{cid}", "chat:0"}
    assert set(fields) == {"head", f"member:{stage.ids['Bob']}"}


def test_foreign_fields_are_tolerated_and_kept() -> None:
    stage = a_band()
    before = stage.session
    assert before is not None
    foreign = {"note": b"\xff by hand", "heading": b"{", "members": b"", "": b"", "chat": b"0"}
    fields = stored(before) | foreign
    assert read_session("song", fields) == before
    stage.do("Ann", ChatMessage(text="hi"))
    stage.do("Bob", LeaveSession())
    assert stage.session is not None
    written, gone = changed_fields(before, stage.session)
    assert not foreign.keys() & {*written, *gone}


def test_unknown_keys_of_a_value_are_tolerated() -> None:
    fields = readable()
    session = read_session("song", fields)
    for name in fields.keys() - TIP:
        fields[name] = edited(fields[name], ("colour",), "blue")
    assert read_session("song", fields) == session


def edited(value: bytes, path: tuple[str, ...], new: object) -> bytes:
    """A JSON object with one key of it, or of an object within, changed."""
    document: Any = json.loads(value)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return json.dumps(document).encode()


def first(prefix: str) -> Callable[[Fields], str]:
    return lambda fields: min(name for name in fields if name.startswith(prefix))


@pytest.mark.parametrize("name", ["epoch", "version", "eventId", "head"])
def test_hash_without_a_part_is_unreadable(name: str) -> None:
    fields = readable()
    del fields[name]
    with pytest.raises(UnreadableError, match=name):
        read_session("song", fields)


@pytest.mark.parametrize(
    "version",
    [
        *(b"", b"x", b"1.0", b"1e3", b"0", b"-1", b"9007199254740992", b"9" * 10_000, b"\xff"),
        # Python would take these for numbers; as texts they are not what is compared.
        *(b"007", b"+7", b" 7", b"7\n", b"1_000"),
    ],
)
def test_version_that_is_not_decimal_is_unreadable(version: bytes) -> None:
    fields = readable() | {"version": version}
    with pytest.raises(UnreadableError, match="version"):
        read_session("song", fields)
    with pytest.raises(UnreadableError, match="version"):
        read_tip(b"epoch", version, b"event")


@pytest.mark.parametrize("name", ["epoch", "eventId"])
def test_tip_that_is_not_text_is_unreadable(name: str) -> None:
    with pytest.raises(UnreadableError, match=name):
        read_session("song", readable() | {name: b"\xff\xfe"})


@pytest.mark.parametrize("kind", ["head", "member:", "chat:"])
@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"{", b"\x00", b"\xff", b'"\xff"', b"null", b"7", b"[]", b"{}", b'{"a":1}'),
        *(b"[" * 100_000, b'{"format":' + b"9" * 5000 + b"}"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_value_with_other_or_no_json_is_unreadable(kind: str, value: bytes) -> None:
    fields = readable()
    name = first(kind)(fields)
    fields[name] = value
    with pytest.raises(UnreadableError, match=f"^{name}: "):
        read_session("song", fields)


# As only an enemy nests.
DEEP = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize("kind", ["head", "member:", "chat:"])
def test_deeply_nested_unknown_value_is_unreadable(kind: str) -> None:
    fields = readable()
    name = first(kind)(fields)
    fields[name] = fields[name][:-1] + b',"colour":' + DEEP + b"}"
    with pytest.raises(UnreadableError, match=f"^{name}: "):
        read_session("song", fields)
    session = a_band().session
    assert session is not None
    delta = {name: Raw(fields[name])}
    change = CommittedChange(tip(session), session.version + 1, "event", "hall", delta, [])
    with pytest.raises(UnreadableError, match=f"^{name}: "):
        patch_session(session, change)


MESSAGE = b'{"prev":null,"version":1,"eventId":"x","serverId":"hall","delta":{%s},"frames":[%s]%s}'


@pytest.mark.parametrize(
    "parts",
    [(b'"head":' + DEEP, b"", b""), (b"", DEEP, b""), (b"", b"", b',"colour":' + DEEP)],
    ids=["delta", "frames", "elsewhere"],
)
def test_deeply_nested_message_is_ignored(parts: tuple[bytes, ...]) -> None:
    assert read_channel_message(MESSAGE % (b"", b"", b"")) is not None
    assert read_channel_message(MESSAGE % parts) is None


def test_deeply_nested_direct_message_is_ignored() -> None:
    whisper = write_direct_message("member", b'{"type":"leader_denied"}')
    assert read_channel_message(whisper) is not None
    assert read_channel_message(whisper[:-1] + b',"colour":' + DEEP + b"}") is None
    assert read_channel_message(write_direct_message("member", DEEP)) is None


def test_deeply_nested_presence_is_unreadable() -> None:
    entry = Presence("boot-1", NOW, "http://here", ["song"], 1)
    value = write_presence(entry)
    assert read_presence(value) == entry
    for poisoned in (value[:-1] + b',"colour":' + DEEP + b"}", DEEP):
        assert isinstance(read_presence(poisoned), Unreadable)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("head", ("leader", "rank", "term")),
        ("head", ("transport", "stamp", "rank", "term")),
        ("member:", ("incarnation",)),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "number", ["9" * 4300, str(2**53), "-1"], ids=["4300 digits", "2^53", "-1"]
)
def test_impossible_count_is_unreadable(kind: str, path: tuple[str, ...], number: str) -> None:
    fields = readable()
    name = first(kind)(fields)
    # Python writes no number of so many digits.
    fields[name] = edited(fields[name], path, "number").replace(b'"number"', number.encode())
    with pytest.raises(UnreadableError, match=f"^{name}: "):
        read_session("song", fields)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("head", ("format",), FORMAT + 1),
        ("head", ("format",), "1"),
        ("head", ("createdAt",), None),
        ("head", ("leader", "rank"), "first"),
        ("head", ("leader", "rank", "term"), 1.5),
        ("head", ("leader", "memberId"), None),
        ("head", ("message", "value"), 7),
        ("head", ("settings", "value", "maxMembers"), 0),
        ("head", ("transport", "value", "isPlaying"), 1),
        ("head", ("transport", "value", "tempoBpm"), 19.9),
        ("head", ("transport", "value", "tempoBpm"), 300.1),
        ("head", ("transport", "value", "tempoBpm"), -120),
        ("head", ("transport", "value", "positionMs"), -1),
        ("head", ("transport", "value", "positionMs"), 86_400_001),
        ("head", ("transport", "value", "beatsPerBar"), 0),
        ("head", ("transport", "value", "next", "tempoBpm"), 0),
        ("head", ("transport", "value", "next", "positionMs"), -1),
        ("head", ("transport", "value", "next"), "bar"),
        ("member:", ("memberId",), "another"),
        ("member:", ("incarnation",), "1"),
        ("member:", ("connected",), "yes"),
        ("member:", ("displayName",), None),
        ("chat:", ("slot",), 7),
        ("chat:", ("slot",), -1),
        ("chat:", ("text",), None),
        ("chat:", ("sentAt",), "now"),
    ],
    ids=repr,
)
def test_value_out_of_range_is_unreadable(kind: str, path: tuple[str, ...], value: object) -> None:
    fields = readable()
    name = first(kind)(fields)
    fields[name] = edited(fields[name], path, value)
    with pytest.raises(UnreadableError, match=f"^{re.escape(name)}: "):
        read_session("song", fields)


@pytest.mark.parametrize("segment", [(), ("next",)], ids=["now", "next"])
@pytest.mark.parametrize("key", ["anchorTime", "beat"])
@pytest.mark.parametrize("value", [1e308, -1e308])
def test_transport_with_overflowing_numbers_is_unreadable(
    segment: tuple[str, ...], key: str, value: float
) -> None:
    fields = readable()
    fields["head"] = edited(fields["head"], ("transport", "value", *segment, key), value)
    with pytest.raises(UnreadableError, match=r"^head: "):
        read_session("song", fields)


@pytest.mark.parametrize(
    ("source", "target"),
    [("chat:0", "chat:50"), ("chat:0", "chat:00"), ("chat:0", "chat:x"), ("chat:0", "chat:")],
)
def test_chat_in_an_invalid_slot_is_unreadable(source: str, target: str) -> None:
    fields = readable()
    fields[target] = fields.pop(source)
    with pytest.raises(UnreadableError, match=f"^{target}: "):
        read_session("song", fields)


def test_newer_format_is_reported_as_such() -> None:
    fields = readable() | {"head": b'{"format": 2, "leader": "elsewhere"}'}
    with pytest.raises(UnreadableError, match="newer version"):
        read_session("song", fields)


@pytest.mark.parametrize(
    "delta",
    [
        {"chat:0": 7},
        {"chat:50": {}},
        {"member:Ann": []},
        {"head": {"format": FORMAT + 1}},
        {"head": {}},
        {"epoch": 7},
    ],
    ids=repr,
)
def test_unreadable_change_is_not_applied(delta: dict[str, object]) -> None:
    session = a_band().session
    assert session is not None
    raw = {name: Raw(json.dumps(value).encode()) for name, value in delta.items()}
    change = CommittedChange(tip(session), session.version + 1, "event", "hall", raw, [])
    with pytest.raises(UnreadableError):
        patch_session(session, change)


def test_deletion_of_an_absent_field_changes_nothing() -> None:
    session = a_band().session
    assert session is not None
    gone = dict.fromkeys(("chat:x", "chat:", "chat:00", "member:", "note"), Raw(b"null"))
    change = CommittedChange(tip(session), session.version + 1, "event", "hall", gone, [])
    after = replace(session, version=session.version + 1, event_id="event")
    assert patch_session(session, change) == after


@pytest.mark.parametrize("version", [-1, 0, 5, 2**53])
def test_change_without_progress_is_not_applied(version: int) -> None:
    session = a_band().session
    assert session is not None
    assert session.version > 5
    change = CommittedChange(tip(session), version, "event", "hall", {}, [])
    with pytest.raises(UnreadableError):
        patch_session(session, change)
