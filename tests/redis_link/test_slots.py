"""Slots and their masters. Pure."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import AskError, InvalidResponse, MovedError, ResponseError, TryAgainError

from bandsync.redis_link.cluster.slots import (
    Endpoint,
    Topology,
    read_topology,
    slot_of,
    slot_of_command,
)
from bandsync.redis_link.errors import again, loss_reason, reply_error

A, B, C = Endpoint("a", 1), Endpoint("b", 2), Endpoint("c", 3)
# As Redis 7 says it, and Redis 6.
SLOTS = [
    [5000, 9999, [b"b", 2, b"id", []], [b"replica", 9, b"id", []]],
    [0, 4999, [b"a", 1, b"id"]],
    [10_000, 16_382, [b"c", 3, b"id"]],
    [16_383, 16_383, [b"a", 1, b"id"]],
]


def test_topology_is_parsed() -> None:
    topology = read_topology(SLOTS, "asked")
    assert topology.masters == (A, B, C)
    assert topology.uncovered == 0
    owners = [topology.owner(slot) for slot in (0, 4999, 5000, 9999, 10_000, 16_382, 16_383)]
    assert owners == [A, A, B, B, C, C, A]


def test_node_without_a_host_has_the_queried_address() -> None:
    for host in (None, b""):
        topology = read_topology([[0, 16_383, [host, 7, b"id"]]], "asked")
        assert topology.masters == (Endpoint("asked", 7),)


def test_node_without_a_name_has_its_address() -> None:
    slots = [
        [0, 9, [b"?", 7, b"id", [b"ip", b"10.0.0.1"]]],
        [10, 19, [b"?", 7, b"id", [b"hostname", b""]]],
        [20, 29, [b"?", 7, b"id"]],
        [30, 39, [b"?", 7, b"id", [[b"junk"], b"junk", b"ip"]]],
        [40, 49, [b"b", 7, b"id", [b"ip", b"10.0.0.2"]]],
    ]
    topology = read_topology(slots, "asked")  # type: ignore[arg-type]
    assert [topology.owner(slot).host for slot in (0, 10, 20, 30, 40)] == [
        "10.0.0.1",
        "asked",
        "asked",
        "asked",
        "b",
    ]


def test_missing_slots_are_reported() -> None:
    assert read_topology([], "asked").uncovered == 16_384
    assert read_topology(SLOTS[1:], "asked").uncovered == 5000


@pytest.mark.parametrize(
    "junk",
    [
        None,
        b"OK",
        [b"x"],
        [[0, 1]],
        [[0, 16_384, [b"a", 1]]],
        [[-1, 5, [b"a", 1]]],
        [[9, 5, [b"a", 1]]],
        [[0, 5, [b"a", b"1"]]],
        [[0, 5, []]],
        [[0, 5, [b"a", 65_536]]],
    ],
)
def test_malformed_topology_is_refused(junk: object) -> None:
    with pytest.raises(InvalidResponse):
        read_topology(junk, "asked")  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 16_383), st.sampled_from([A, B, C, Endpoint("d", 4)])),
        max_size=20,
    )
)
def test_slots_move_one_by_one(moves: list[tuple[int, Endpoint]]) -> None:
    topology = read_topology(SLOTS, "asked")
    expected = [topology.owner(slot) for slot in range(16_384)]
    for slot, owner in moves:
        before = topology
        topology = topology.moved(slot, owner)
        expected[slot] = owner
        assert before is not topology
    assert [topology.owner(slot) for slot in range(16_384)] == expected
    assert set(topology.masters) >= set(expected)
    assert len(set(topology.masters)) == len(topology.masters)
    assert Topology().uncovered == 16_384


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("GET", "bandsync:session:{song}"), b"song"),
        (("HGETALL", b"{a}b"), b"a"),
        (("EVALSHA", "f00", 1, "{key}", "arg"), b"key"),
        (("EVAL", "return 1", 1, b"key", "arg"), b"key"),
        (("SPUBLISH", "events:{song}", "message"), b"song"),
        (("EVAL", "return 1", 0), None),
        (("PING",), None),
        (("TIME",), None),
        (("SCAN", 0, "MATCH", "x"), None),
        (("CLUSTER", "SLOTS"), None),
        (("COMMAND", "INFO", "SPUBLISH"), None),
    ],
)
def test_slot_of_a_command_is_that_of_its_key(
    command: tuple[object, ...], key: bytes | None
) -> None:
    slot = slot_of_command(command)  # type: ignore[arg-type]
    assert slot == (None if key is None else key_slot(key))


def test_key_and_channel_of_a_session_share_a_slot() -> None:
    assert slot_of("bandsync:session:{é}") == slot_of("bandsync:events:{é}".encode())


def test_redirections_are_parsed() -> None:
    moved = reply_error("MOVED 3999 10.0.0.1:6381")
    assert isinstance(moved, MovedError)
    assert (moved.slot_id, moved.host, moved.port) == (3999, "10.0.0.1", 6381)
    copied = again(moved)
    assert (copied.slot_id, copied.host, copied.port) == (3999, "10.0.0.1", 6381)
    assert "REDIS_CLUSTER" in str(copied)
    ask = reply_error("ASK 7 ::1:6381")
    assert isinstance(ask, AskError)
    assert not isinstance(ask, MovedError)
    assert (ask.slot_id, ask.host, ask.port) == (7, "::1", 6381)
    nameless = reply_error("MOVED 7 :6381")
    assert isinstance(nameless, MovedError)
    assert nameless.host == ""
    assert isinstance(reply_error("TRYAGAIN Multiple keys request"), TryAgainError)
    for error in (moved, ask, reply_error("TRYAGAIN x")):
        assert loss_reason(error) is None
    assert loss_reason(reply_error("CLUSTERDOWN Hash slot not served")) == "clusterdown"


@pytest.mark.parametrize(
    "junk",
    [
        "MOVED",
        "MOVED x",
        "ASK 7",
        "MOVED 7 there",
        "MOVED 7 a:b",
        "MOVED 16384 a:1",
        "ASK 7 a:65536",
    ],
)
def test_malformed_redirection_is_an_error(junk: str) -> None:
    error = reply_error(junk)
    assert type(error) is ResponseError
    assert str(error) == junk
