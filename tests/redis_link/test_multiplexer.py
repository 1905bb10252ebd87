import random
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
import trustme
from msgspec.structs import replace
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from bandsync.redis_link.errors import LinkLostError, UnusableError, loss_reason, reply_error
from bandsync.redis_link.link import Link
from bandsync.redis_link.redis_address import RedisAddress, TLSOptions, parse_address
from bandsync.redis_link.script import Script
from scripts.testbed.fault_proxy import FaultProxy
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.redis_storages import PATIENT
from tests.support.scripted_redis import ADDRESS, ScriptedRedis, start
from tests.support.servers import PATIENCE_S


@pytest.fixture(scope="module")
def guarded(redis_binary: None) -> Iterator[RedisServer]:
    with RedisServer(password="p@ss:word/1") as server:
        server.cli("ACL", "SETUSER", "player", "on", ">gu:itar", "~*", "&*", "+@all")
        server.cli("ACL", "SETUSER", "shy", "on", ">quiet", "~*", "+ping", "+select")
        yield server


@pytest.fixture
async def proxy(shared_redis: RedisServer, nursery: trio.Nursery) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(shared_redis.port)
    await nursery.start(proxy.run)
    yield proxy
    nursery.cancel_scope.cancel()


def link_to(
    target: str | RedisAddress,
    *,
    name: str = "bandsync-test",
    max_queued: int = 10_000,
    **deadlines: float,
) -> Link:
    address = parse_address(target) if isinstance(target, str) else target
    timeouts = replace(PATIENT, **deadlines)
    return Link(address, name=name, timeouts=timeouts, max_queued=max_queued)


async def why_not(target: str | RedisAddress, **changes: Any) -> RedisError:
    """The error with which a link does not come up."""
    link = link_to(target, **changes)
    with trio.fail_after(PATIENCE_S), pytest.raises(RedisError) as raised:
        await link.run()
    assert not link.usable
    with pytest.raises(type(raised.value), match=re.escape(str(raised.value))):
        await link.execute("PING")
    return raised.value


def proxied(proxy: FaultProxy) -> RedisAddress:
    return RedisAddress(host=HOST, port=proxy.port)


# Errors


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        ("WRONGTYPE Operation against a key", ResponseError, None),
        ("ERR unknown command", ResponseError, None),
        ("NOSCRIPT No matching script.", NoScriptError, None),
        ("READONLY You can't write", ReadOnlyError, "readonly"),
        ("LOADING Redis is loading", BusyLoadingError, "loading"),
        ("MASTERDOWN Link with MASTER is down", ResponseError, "masterdown"),
        ("OOM command not allowed", OutOfMemoryError, "oom"),
        ("MISCONF Redis is configured to", UnusableError, "misconf"),
        ("NOREPLICAS Not enough good replicas", UnusableError, "readonly"),
        ("BUSY Redis is busy running a script", UnusableError, "overloaded"),
        ("NOAUTH Authentication required.", AuthenticationError, "auth"),
        ("WRONGPASS invalid username", AuthenticationError, "auth"),
        ("DENIED Redis is running in protected mode", AuthenticationError, "auth"),
        ("NOPERM this user", NoPermissionError, "auth"),
        ("ERR max number of clients reached", LinkLostError, "refused"),
        (
            "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: "
            "-OOM command not allowed when used memory > 'maxmemory'.",
            OutOfMemoryError,
            "oom",
        ),
        (
            "ERR Error running script (call to f_ab): @user_script:1: @user_script: 1: "
            "-READONLY You can't write against a read only replica.",
            ReadOnlyError,
            "readonly",
        ),
        (
            "ERR Error running script (call to f_ab): @user_script:1: user said -OOM ",
            ResponseError,
            None,
        ),
    ],
)
def test_error_replies(reply: str, kind: type[RedisError], reason: str | None) -> None:
    error = reply_error(reply)
    assert isinstance(error, kind)
    assert str(error) == reply
    assert loss_reason(error) == reason


def test_other_errors_say_nothing_about_the_link() -> None:
    assert loss_reason(ValueError()) is None
    assert loss_reason(KeyboardInterrupt()) is None


# Addresses


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("redis://", RedisAddress(), "redis://localhost:6379/0"),
        ("redis://r:7/3", RedisAddress(host="r", port=7, db=3), "redis://r:7/3"),
        ("redis://r?db=4", RedisAddress(host="r", db=4), "redis://r:6379/4"),
        (
            "redis://me:p%40s%2F%3As@[::1]:7/",
            RedisAddress(host="::1", port=7, username="me", password="p@s/:s"),
            "redis://[::1]:7/0",
        ),
        ("redis://:pw@r", RedisAddress(host="r", password="pw"), "redis://r:6379/0"),
        (
            "unix:///run/r.sock?db=2&password=pw",
            RedisAddress(path="/run/r.sock", db=2, password="pw"),
            "unix:///run/r.sock?db=2",
        ),
        ("rediss://r", RedisAddress(host="r", tls=TLSOptions()), "rediss://r:6379/0"),
        (
            "rediss://r?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_ca_certs=/ca",
            RedisAddress(
                host="r",
                tls=TLSOptions(cert_reqs="none", check_hostname=False, ca_certs="/ca"),
            ),
            "rediss://r:6379/0",
        ),
    ],
)
def test_addresses(url: str, address: RedisAddress, text: str) -> None:
    assert parse_address(url) == address
    assert str(address) == repr(address) == text


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@r",
        "redis://:sec#ret@r",
        "redis://:sec/ret@r:7",
        "redis://:sec?ret@r",
        "redis://:12/secret@r",
        "redis://:secret@r:high",
        "redis://:secret@r/first",
        "redis://:secret@r/-1",
        "redis://:secret@r?db=-1",
        "redis://:secret@r?db=secret",
        "redis://:secret@r?nonsense=secret",
        "redis://:secret@r?ssl_ca_certs=secret",
        "rediss://:secret@r?ssl_cert_reqs=secret",
        "rediss://[secret",
        "redis://:secret@r?port=7",
        "redis://r/0#secret",
        "unix://",
    ],
)
def test_bad_addresses_keep_their_secrets(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has) ") as raised:
        parse_address(url)
    assert not re.search("secret|ret@|sec", str(raised.value).replace("security", ""))
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_tls_options_keep_their_secret() -> None:
    assert "secret" not in repr(TLSOptions(key_password="secret"))


# Connecting


async def test_over_tcp_by_name(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(f"redis://localhost:{shared_redis.port}/5", name="first-violin")
    await start(nursery, link)
    assert link.usable
    info = await link.execute("CLIENT", "INFO")
    assert isinstance(info, bytes)
    assert b" name=first-violin " in info
    assert b" db=5 " in info
    assert link.outstanding == 0
    nursery.cancel_scope.cancel()


async def test_over_a_unix_socket(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(f"unix://{shared_redis.unix_socket}?db=2")
    await start(nursery, link)
    info = await link.execute("CLIENT", "INFO")
    assert isinstance(info, bytes)
    assert b" db=2 " in info
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "user", [":p%40ss%3Aword%2F1", "default:p%40ss%3Aword%2F1", "player:gu%3Aitar"]
)
async def test_authenticated(guarded: RedisServer, nursery: trio.Nursery, user: str) -> None:
    link = link_to(f"redis://{user}@{HOST}:{guarded.port}/1")
    await start(nursery, link)
    assert await link.execute("PING") == b"PONG"
    nursery.cancel_scope.cancel()


async def test_a_user_may_lack_the_right_to_a_name(
    guarded: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(f"redis://shy:quiet@{HOST}:{guarded.port}/1")
    await start(nursery, link)
    assert await link.execute("PING") == b"PONG"
    with pytest.raises(NoPermissionError) as raised:
        await link.execute("GET", "key")
    assert loss_reason(raised.value) == "auth"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:p%40ss@", "player@"])
async def test_not_let_in(guarded: RedisServer, user: str) -> None:
    error = await why_not(f"redis://{user}{HOST}:{guarded.port}")
    assert isinstance(error, AuthenticationError)
    assert loss_reason(error) == "auth"


async def test_a_password_that_nobody_asked_for(shared_redis: RedisServer) -> None:
    assert loss_reason(await why_not(f"redis://:pw@{HOST}:{shared_redis.port}")) == "auth"


async def test_no_such_database(shared_redis: RedisServer) -> None:
    error = await why_not(f"redis://{HOST}:{shared_redis.port}/9999")
    assert loss_reason(error) == "refused"
    assert "SELECT: ERR DB index is out of range" in str(error)


async def test_nobody_listens() -> None:
    port = free_port()
    error = await why_not(f"redis://:secret@{HOST}:{port}")
    assert loss_reason(error) == "refused"
    assert f"redis://{HOST}:{port}/0" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("second", "reason"),
    [(ConnectionRefusedError(), "refused"), (TimeoutError(), "unreachable")],
)
async def test_a_host_with_several_addresses(
    second: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect_tcp(host: str, port: int) -> None:
        raise OSError from ExceptionGroup("several", [OSError("no route"), second])

    monkeypatch.setattr("anyio.connect_tcp", connect_tcp)
    assert loss_reason(await why_not(ADDRESS)) == reason


@pytest.mark.parametrize("url", ["redis://nowhere.invalid", "unix:///nonexistent/socket"])
async def test_nowhere(url: str) -> None:
    assert loss_reason(await why_not(url)) == "unreachable"


async def test_too_many_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"-ERR max number of clients reached\r\n")
    await scripted.stream.aclose()
    assert loss_reason(await why_not(ADDRESS)) == "refused"


async def test_no_answer_to_the_introduction(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScriptedRedis(monkeypatch)
    error = await why_not(ADDRESS, connect_s=3)
    assert isinstance(error, TimeoutError)
    assert trio.current_time() == 3


async def test_a_surplus_reply_to_the_introduction(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"+OK\r\n+OK\r\n")
    assert loss_reason(await why_not(ADDRESS)) == "protocol"


async def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert loss_reason(await why_not(ADDRESS)) == "protocol"


async def test_not_before_it_is_connected() -> None:
    link = link_to(ADDRESS)
    assert not link.usable
    with pytest.raises(LinkLostError, match="not connected yet"):
        await link.execute("PING")


# TLS


async def test_over_tls(tls_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(tls_redis.url())
    await start(nursery, link)
    # More than one TLS record, both ways.
    assert await link.execute("ECHO", b"x" * 300_000) == b"x" * 300_000
    nursery.cancel_scope.cancel()


async def test_tls_trusts_nobody_by_default(tls_redis: RedisServer) -> None:
    error = await why_not(f"rediss://localhost:{tls_redis.port}")
    assert loss_reason(error) == "tls"
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)


async def test_tls_for_another_name(tmp_path: Path, nursery: trio.Nursery) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("elsewhere.example").configure_cert(context)

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        async with stream:
            try:
                await stream.receive_some()
                await stream.send_all(b"+OK\r\n")
                await stream.receive_some()
            except trio.BrokenResourceError:
                pass

    listeners = await nursery.start(
        partial(trio.serve_ssl_over_tcp, serve, 0, context, host=HOST, https_compatible=True)
    )
    port = listeners[0].transport_listener.socket.getsockname()[1]
    url = f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}"
    assert loss_reason(await why_not(url)) == "tls"
    for lax in ("&ssl_check_hostname=false", "&ssl_cert_reqs=none"):
        await start(nursery, link_to(url + lax))
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [b"-ERR unknown command\r\n", b""])
async def test_tls_to_one_that_does_not_speak_it(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(said)
    await scripted.stream.send_eof()
    assert loss_reason(await why_not(RedisAddress(tls=TLSOptions()))) == "tls"


async def test_tls_that_does_not_come_about(shared_redis: RedisServer) -> None:
    # A Redis in the clear takes our hello for the beginning of a long line.
    address = RedisAddress(host=HOST, port=shared_redis.port, tls=TLSOptions())
    assert isinstance(await why_not(address, connect_s=0.1), TimeoutError)


async def test_a_redis_that_wants_a_certificate(
    tls_redis: RedisServer, nursery: trio.Nursery
) -> None:
    tls_redis.cli("CONFIG", "SET", "tls-auth-clients", "yes")
    assert loss_reason(await why_not(tls_redis.url())) == "tls"
    files = tls_redis.ca_file.parent
    mine = f"&ssl_certfile={files / 'cert.pem'}&ssl_keyfile={files / 'key.pem'}"
    await start(nursery, link_to(tls_redis.url() + mine))
    nursery.cancel_scope.cancel()


async def test_tls_options_that_cannot_be_used(tls_redis: RedisServer) -> None:
    for option in ("ssl_ca_certs", "ssl_certfile"):
        error = await why_not(f"rediss://localhost:{tls_redis.port}?{option}=/nonexistent")
        assert loss_reason(error) == "tls"


# Commands


async def test_replies(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    assert await link.execute("SET", "replies", "né") == b"OK"
    assert await link.execute(b"GET", "replies") == "né".encode()
    assert await link.execute("GET", "no such") is None
    assert await link.execute("INCRBY", "replies:n", 7) == 7
    assert await link.execute("EVAL", "return {1, 'two', {3}, false}", 0) == [1, b"two", [3], None]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await link.execute("LPUSH", "replies", "x")
    with pytest.raises(TypeError):
        await link.execute("SET", None)  # type: ignore[arg-type]
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_several_at_once(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    first, error, last = await link.execute_all(
        [("SET", "several", "1"), ("LPUSH", "several", "x"), ("INCR", "several")]
    )
    assert (first, last) == (b"OK", 2)
    assert isinstance(error, ResponseError)
    assert await link.execute_all([]) == []
    with pytest.raises(TypeError):
        await link.execute_all([("INCR", "several"), ("SET", None)])  # type: ignore[list-item]
    assert await link.execute("GET", "several") == b"2"
    nursery.cancel_scope.cancel()


async def test_what_is_queued_together_leaves_together(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS)
    await start(nursery, link, scripted)
    scripted.wire.writes.clear()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as callers:
            for _ in range(20):
                callers.start_soon(link.execute, "PING")
            callers.start_soon(link.execute_all, [("PING",), ("PING",)])
            await trio.testing.wait_all_tasks_blocked()
            assert link.outstanding == 22
            assert len(scripted.wire.writes) == 1
            await scripted.send(b"+PONG\r\n" * 22)
    nursery.cancel_scope.cancel()


async def test_callers_may_be_cancelled_at_any_moment(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    rng = random.Random(20)
    answered = cancelled = 0

    async def call(number: int, patience: int) -> None:
        nonlocal answered, cancelled
        with trio.CancelScope() as scope:
            asking.start_soon(lose_patience, scope, patience)
            assert await link.execute("ECHO", number) == str(number).encode()
            replies = await link.execute_all([("ECHO", number), ("ECHO", -number)])
            assert replies == [str(number).encode(), str(-number).encode()]
            answered += 1
        cancelled += scope.cancelled_caught

    async def lose_patience(scope: trio.CancelScope, patience: int) -> None:
        for _ in range(patience):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.fail_after(PATIENCE_S):
        for _ in range(20):
            async with trio.open_nursery() as asking:
                for number in range(50):
                    asking.start_soon(call, number, rng.choice([0, 1, 2, 3, 5, 8, 1000]))
        assert await link.execute("ECHO", "end") == b"end"
    assert answered
    assert cancelled
    assert link.outstanding == 0
    nursery.cancel_scope.cancel()


async def test_scripts_are_told_when_redis_does_not_know_them(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url())
    await start(nursery, link)
    script = Script("return {KEYS[1], ARGV[1]}")
    for _ in range(2):
        assert await link.execute("SCRIPT", "FLUSH") == b"OK"
        assert await script.execute(link, ["k"], [1]) == [b"k", b"1"]
        assert await script.execute(link, ["k"], [2]) == [b"k", b"2"]
    with pytest.raises(ResponseError):
        await Script("return redis.call('NOPE')").execute(link, [], [])
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("config", "verb", "reason"),
    [
        ({"maxmemory": "1"}, "INCR", "oom"),
        ({"min-replicas-to-write": "1"}, "INCR", "readonly"),
        ({"replicaof": "127.0.0.1 1"}, "INCR", "readonly"),
        ({"replicaof": "127.0.0.1 1", "replica-serve-stale-data": "no"}, "GET", "masterdown"),
    ],
)
async def test_redis_that_cannot_be_written_to(
    config: dict[str, str], verb: str, reason: str, nursery: trio.Nursery, redis_binary: None
) -> None:
    script = Script(f"return redis.call('{verb}', KEYS[1])")
    with RedisServer() as server:
        link = link_to(server.url())
        await start(nursery, link)
        await script.execute(link, ["k"], [])
        for name, value in config.items():
            if name == "replicaof":
                server.cli("REPLICAOF", *value.split())
            else:
                server.cli("CONFIG", "SET", name, value)
        with pytest.raises(RedisError) as raised:
            await link.execute(verb, "k")
        assert loss_reason(raised.value) == reason
        with pytest.raises(RedisError) as raised:
            await script.execute(link, ["k"], [])
        assert loss_reason(raised.value) == reason
        # That is for the supervisor to judge.
        assert link.usable
        nursery.cancel_scope.cancel()


# Loss


async def test_all_that_wait_learn_of_the_loss(proxy: FaultProxy, nursery: trio.Nursery) -> None:
    link = link_to(proxied(proxy))
    outcome = await start(nursery, link)
    errors: list[RedisError] = []

    async def wait() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute("BLPOP", "nothing", 0)
        errors.append(raised.value)

    async def wait_for_several() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute_all([("PING",), ("PING",)])
        errors.append(raised.value)

    async with trio.open_nursery() as callers:
        for _ in range(10):
            callers.start_soon(wait)
        # Before them, it would be answered.
        await trio.testing.wait_all_tasks_blocked()
        callers.start_soon(wait_for_several)
        await trio.testing.wait_all_tasks_blocked()
        proxy.reset()
    lost = await outcome.wait()
    assert loss_reason(lost) == "reset"
    assert {loss_reason(error) for error in errors} == {"reset"}
    assert len({id(error) for error in errors}) == 11
    assert not link.usable
    assert link.outstanding == 0
    with pytest.raises(LinkLostError):
        await link.execute("PING")


async def test_a_killed_redis(redis_server: RedisServer, nursery: trio.Nursery) -> None:
    outcome = await start(nursery, link_to(redis_server.url()))
    redis_server.kill()
    assert loss_reason(await outcome.wait()) == "reset"


async def test_cancelled(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(shared_redis.url())
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as links:
            await links.start(link.run)

            async def wait() -> None:
                with pytest.raises(LinkLostError, match="closed"):
                    await link.execute("BLPOP", "nothing", 0)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            links.cancel_scope.cancel()
    assert not link.usable


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"junk\r\n", "protocol"),
        (b"$100\r\nhalf", "reset"),
        (b"", "reset"),
        (b"+PONG\r\n+PONG\r\n", "protocol"),
    ],
)
async def test_odd_replies(
    said: bytes, reason: str, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS)
    outcome = await start(nursery, link, scripted)

    async def call() -> None:
        try:
            assert await link.execute("PING") == b"PONG"
        except RedisError as error:
            assert loss_reason(error) == reason

    async with trio.open_nursery() as callers:
        callers.start_soon(call)
        await scripted.command()
        await scripted.send(said)
        await scripted.stream.send_eof()
    assert loss_reason(await outcome.wait()) == reason


async def test_a_reply_that_nobody_asked_for(
    monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    outcome = await start(nursery, link_to(ADDRESS), scripted)
    await scripted.send(b"+PONG\r\n")
    assert loss_reason(await outcome.wait()) == "protocol"


async def test_too_much_waits(monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, max_queued=3)
    outcome = await start(nursery, link, scripted)
    reasons: list[str | None] = []

    async def call() -> None:
        with pytest.raises(RedisError) as raised:
            await link.execute("PING")
        reasons.append(loss_reason(raised.value))

    async with trio.open_nursery() as callers:
        for _ in range(4):
            callers.start_soon(call)
    assert reasons == ["overloaded"] * 4
    assert loss_reason(await outcome.wait()) == "overloaded"


# Deadlines, in virtual time


async def test_silence(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    # Idle is not silent.
    await trio.sleep(100)
    assert link.usable
    nursery.start_soon(scripted.answer, b"+PONG\r\n")
    assert await link.execute("PING") == b"PONG"
    await trio.sleep(100.5)
    assert link.usable
    began = trio.current_time()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert trio.current_time() - began == pytest.approx(1)
    assert isinstance(await outcome.wait(), TimeoutError)


async def test_silence_counts_from_the_latest_sign_of_life(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=5)
    await start(nursery, link, scripted)
    replies: list[object] = []

    async def call() -> None:
        replies.append(await link.execute("GET", "long"))

    async with trio.open_nursery() as callers:
        callers.start_soon(call)
        await scripted.send(b"$4\r\n")
        for _ in range(4):
            await trio.sleep(0.9)
            await scripted.send(b"x")
        await scripted.send(b"\r\n")
    assert replies == [b"xxxx"]
    # But not for ever: a reply that trickles in is too late some time.
    began = trio.current_time()
    async with trio.open_nursery() as callers:

        async def trickle() -> None:
            await scripted.send(b"$100\r\n")
            while True:
                await trio.sleep(0.9)
                await scripted.send(b"x")

        callers.start_soon(trickle)
        with pytest.raises(TimeoutError):
            await link.execute("GET", "long")
        callers.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(5)


async def test_the_oldest_counts_not_the_newest(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    began = trio.current_time()

    async def call() -> None:
        with pytest.raises(TimeoutError):
            await link.execute("PING")

    async with trio.open_nursery() as callers:
        while link.usable:
            callers.start_soon(call)
            await trio.sleep(0.3)
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(1.2)


async def test_the_watch_sleeps_while_replies_come(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=5)
    await start(nursery, link, scripted)
    sleep_until = anyio.sleep_until
    deadlines: list[float] = []

    async def counted(deadline: float) -> None:
        deadlines.append(deadline)
        await sleep_until(deadline)

    monkeypatch.setattr("anyio.sleep_until", counted)
    for _ in range(1000):
        nursery.start_soon(scripted.answer, b"+PONG\r\n")
        await link.execute("PING")
        await trio.sleep(0.01)
    # In ten seconds.
    assert len(deadlines) <= 20


async def test_a_peer_that_does_not_read(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch, lockstep=True)
    link = link_to(ADDRESS, silence_s=1, command_s=60)
    outcome = await start(nursery, link, scripted)
    began = trio.current_time()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert isinstance(await outcome.wait(), TimeoutError)
    assert trio.current_time() - began == pytest.approx(1)


async def test_a_stopped_redis_and_a_black_hole(
    redis_server: RedisServer, proxy: FaultProxy, nursery: trio.Nursery
) -> None:
    link = link_to(proxied(proxy), silence_s=0.2)
    outcome = await start(nursery, link)
    proxy.black_hole()
    with pytest.raises(TimeoutError):
        await link.execute("PING")
    assert isinstance(await outcome.wait(), TimeoutError)
    proxy.heal()
    link = link_to(redis_server.url(), command_s=0.2)
    outcome = await start(nursery, link)
    redis_server.stop()
    try:
        # More than the kernel takes: the writer is stuck.
        with pytest.raises(TimeoutError):
            await link.execute("ECHO", b"x" * 30_000_000)
        assert isinstance(await outcome.wait(), TimeoutError)
    finally:
        redis_server.resume()


async def test_our_own_stall_is_not_the_silence_of_redis(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    silence_s = 1.0
    link = link_to(shared_redis.url(), silence_s=silence_s, command_s=silence_s)
    await start(nursery, link)
    for _ in range(3):
        async with trio.open_nursery() as callers:
            callers.start_soon(link.execute, "BLPOP", "nothing", 0.1)
            await trio.testing.wait_all_tasks_blocked()
            assert link.outstanding == 1
            time.sleep(silence_s * 1.1)  # noqa: ASYNC251
        assert link.usable
    nursery.cancel_scope.cancel()


async def test_a_reply_that_is_on_its_way_gets_as_long_as_we_were_away(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(shared_redis.url(), silence_s=1.0)
    await start(nursery, link)
    async with trio.open_nursery() as callers:
        callers.start_soon(link.execute, "BLPOP", "nothing", 2.2)
        await trio.testing.wait_all_tasks_blocked()
        time.sleep(2)  # noqa: ASYNC251
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_a_stall_before_the_command_is_sent(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=1)
    await start(nursery, link, scripted)

    async def stall() -> None:
        autojump_clock.jump(1.5)

    async def answer() -> None:
        await scripted.command()
        await trio.sleep(0.9)
        await scripted.send(b"+PONG\r\n")

    # Often enough that the stall comes after the call and before the writer some time.
    for _ in range(20):
        async with trio.open_nursery() as callers:
            callers.start_soon(link.execute, "PING")
            callers.start_soon(stall)
            callers.start_soon(answer)
    assert link.usable
    nursery.cancel_scope.cancel()


async def test_a_stall_while_the_watch_waits_for_the_reader(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    link = link_to(ADDRESS, silence_s=1, command_s=1)
    await start(nursery, link, scripted)
    sleep = anyio.sleep

    async def stalled_sleep(seconds: float) -> None:
        monkeypatch.setattr("anyio.sleep", sleep)
        await scripted.answer(b"+PONG\r\n")
        callers.start_soon(link.execute, "PING")
        await scripted.command()
        autojump_clock.jump(1.5)
        callers.start_soon(scripted.send, b"+PONG\r\n")

    async with trio.open_nursery() as callers:
        monkeypatch.setattr("anyio.sleep", stalled_sleep)
        callers.start_soon(link.execute, "PING")
    assert link.usable
    nursery.cancel_scope.cancel()


# Another event loop


def test_on_asyncio(redis_server: RedisServer) -> None:
    async def main() -> None:
        link = link_to(redis_server.url(), silence_s=1.0)
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                await tasks.start(link.run)
                async with anyio.create_task_group() as callers:

                    async def call(number: int) -> None:
                        with anyio.move_on_after(0 if number % 3 == 0 else None):
                            reply = await link.execute("ECHO", number)
                            assert reply == str(number).encode()

                    for number in range(100):
                        callers.start_soon(call, number)
                assert await link.execute_all([("PING",)] * 3) == [b"PONG"] * 3
                async with anyio.create_task_group() as callers:
                    callers.start_soon(link.execute, "BLPOP", "nothing", 0.1)
                    await anyio.wait_all_tasks_blocked()
                    time.sleep(1.1)  # noqa: ASYNC251
                assert link.usable
                tasks.cancel_scope.cancel()

            link = link_to(redis_server.url(), silence_s=0.2)
            lost: RedisError | None = None
            ended = anyio.Event()

            async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
                nonlocal lost
                try:
                    await link.run(task_status=task_status)
                except RedisError as error:
                    lost = error
                ended.set()

            async with anyio.create_task_group() as tasks:
                await tasks.start(run)
                redis_server.stop()
                with pytest.raises(TimeoutError):
                    await link.execute("PING")
                await ended.wait()
            assert isinstance(lost, TimeoutError)

    try:
        anyio.run(main, backend="asyncio")
    finally:
        redis_server.resume()


def test_on_asyncio_a_reset_is_a_reset() -> None:
    async def main() -> None:
        listener = socket.create_server((HOST, 0))
        with listener:

            def serve() -> None:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1000)
                    peer.sendall(b"+OK\r\n")
                    peer.recv(1000)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

            link = link_to(RedisAddress(host=HOST, port=listener.getsockname()[1]))
            with anyio.fail_after(PATIENCE_S), pytest.raises(ExceptionGroup) as raised:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, serve)
                    await tasks.start(link.run)
                    with pytest.raises(LinkLostError):
                        await link.execute("PING")
            (error,) = raised.value.exceptions
            assert loss_reason(error) == "reset"

    anyio.run(main, backend="asyncio")
