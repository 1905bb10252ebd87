"""Connecting to Redis: TCP, Unix socket, authentication, TLS."""

import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    TimeoutError,  # noqa: A004
)

from bandsync.redis_link.errors import LinkLostError, loss_reason
from bandsync.redis_link.redis_address import RedisAddress, TLSOptions
from scripts.testbed.redis_server import HOST, RedisServer, free_port
from tests.support.redis_links import link_to, loss_of_connecting
from tests.support.scripted_redis import ADDRESS, ScriptedRedis, start


@pytest.fixture(scope="module")
def guarded(redis_binary: None) -> Iterator[RedisServer]:
    with RedisServer(password="p@ss:word/1") as server:
        server.cli("ACL", "SETUSER", "player", "on", ">gu:itar", "~*", "&*", "+@all")
        server.cli("ACL", "SETUSER", "shy", "on", ">quiet", "~*", "+ping", "+select")
        yield server


async def test_connects_over_tcp_by_name(shared_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(f"redis://localhost:{shared_redis.port}/5", name="first-violin")
    await start(nursery, link)
    assert link.usable
    info = await link.execute("CLIENT", "INFO")
    assert isinstance(info, bytes)
    assert b" name=first-violin " in info
    assert b" db=5 " in info
    assert link.outstanding == 0
    nursery.cancel_scope.cancel()


async def test_connects_over_a_unix_socket(
    shared_redis: RedisServer, nursery: trio.Nursery
) -> None:
    link = link_to(f"unix://{shared_redis.unix_socket}?db=2")
    await start(nursery, link)
    info = await link.execute("CLIENT", "INFO")
    assert isinstance(info, bytes)
    assert b" db=2 " in info
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "user", [":p%40ss%3Aword%2F1", "default:p%40ss%3Aword%2F1", "player:gu%3Aitar"]
)
async def test_connects_with_a_password(
    guarded: RedisServer, nursery: trio.Nursery, user: str
) -> None:
    link = link_to(f"redis://{user}@{HOST}:{guarded.port}/1")
    await start(nursery, link)
    assert await link.execute("PING") == b"PONG"
    nursery.cancel_scope.cancel()


async def test_user_without_client_setname_connects(
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
async def test_wrong_credentials_are_refused(guarded: RedisServer, user: str) -> None:
    error = await loss_of_connecting(f"redis://{user}{HOST}:{guarded.port}")
    assert isinstance(error, AuthenticationError)
    assert loss_reason(error) == "auth"


async def test_unneeded_password_is_refused(shared_redis: RedisServer) -> None:
    assert (
        loss_reason(await loss_of_connecting(f"redis://:pw@{HOST}:{shared_redis.port}")) == "auth"
    )


async def test_missing_database_is_refused(shared_redis: RedisServer) -> None:
    error = await loss_of_connecting(f"redis://{HOST}:{shared_redis.port}/9999")
    assert loss_reason(error) == "refused"
    assert "SELECT: ERR DB index is out of range" in str(error)


async def test_closed_port_is_refused() -> None:
    port = free_port()
    error = await loss_of_connecting(f"redis://:secret@{HOST}:{port}")
    assert loss_reason(error) == "refused"
    assert f"redis://{HOST}:{port}/0" in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize(
    ("second", "reason"),
    [(ConnectionRefusedError(), "refused"), (TimeoutError(), "unreachable")],
)
async def test_host_with_several_addresses_connects(
    second: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect_tcp(host: str, port: int) -> None:
        raise OSError from ExceptionGroup("several", [OSError("no route"), second])

    monkeypatch.setattr("anyio.connect_tcp", connect_tcp)
    assert loss_reason(await loss_of_connecting(ADDRESS)) == reason


@pytest.mark.parametrize("url", ["redis://nowhere.invalid", "unix:///nonexistent/socket"])
async def test_unknown_host_is_unreachable(url: str) -> None:
    assert loss_reason(await loss_of_connecting(url)) == "unreachable"


async def test_full_redis_refuses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"-ERR max number of clients reached\r\n")
    await scripted.stream.aclose()
    assert loss_reason(await loss_of_connecting(ADDRESS)) == "refused"


async def test_silent_handshake_times_out(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScriptedRedis(monkeypatch)
    error = await loss_of_connecting(ADDRESS, connect_s=3)
    assert isinstance(error, TimeoutError)
    assert trio.current_time() == 3


async def test_surplus_handshake_reply_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"+OK\r\n+OK\r\n")
    assert loss_reason(await loss_of_connecting(ADDRESS)) == "protocol"


async def test_other_protocol_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert loss_reason(await loss_of_connecting(ADDRESS)) == "protocol"


async def test_command_before_the_connect_is_refused() -> None:
    link = link_to(ADDRESS)
    assert not link.usable
    with pytest.raises(LinkLostError, match="not connected yet"):
        await link.execute("PING")


async def test_connects_over_tls(tls_redis: RedisServer, nursery: trio.Nursery) -> None:
    link = link_to(tls_redis.url())
    await start(nursery, link)
    # More than one TLS record, both ways.
    assert await link.execute("ECHO", b"x" * 300_000) == b"x" * 300_000
    nursery.cancel_scope.cancel()


async def test_untrusted_certificate_is_refused(tls_redis: RedisServer) -> None:
    error = await loss_of_connecting(f"rediss://localhost:{tls_redis.port}")
    assert loss_reason(error) == "tls"
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)


async def test_certificate_of_another_name_is_refused(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
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
    assert loss_reason(await loss_of_connecting(url)) == "tls"
    for lax in ("&ssl_check_hostname=false", "&ssl_cert_reqs=none"):
        await start(nursery, link_to(url + lax))
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("said", [b"-ERR unknown command\r\n", b""])
async def test_tls_to_a_plain_port_is_an_error(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = ScriptedRedis(monkeypatch)
    await scripted.send(said)
    await scripted.stream.send_eof()
    assert loss_reason(await loss_of_connecting(RedisAddress(tls=TLSOptions()))) == "tls"


async def test_unfinished_tls_handshake_times_out(shared_redis: RedisServer) -> None:
    # A Redis in the clear takes our hello for the beginning of a long line.
    address = RedisAddress(host=HOST, port=shared_redis.port, tls=TLSOptions())
    assert isinstance(await loss_of_connecting(address, connect_s=0.1), TimeoutError)


async def test_client_certificate_is_sent(tls_redis: RedisServer, nursery: trio.Nursery) -> None:
    tls_redis.cli("CONFIG", "SET", "tls-auth-clients", "yes")
    assert loss_reason(await loss_of_connecting(tls_redis.url())) == "tls"
    files = tls_redis.ca_file.parent
    mine = f"&ssl_certfile={files / 'cert.pem'}&ssl_keyfile={files / 'key.pem'}"
    await start(nursery, link_to(tls_redis.url() + mine))
    nursery.cancel_scope.cancel()


async def test_unusable_tls_options_are_refused(tls_redis: RedisServer) -> None:
    for option in ("ssl_ca_certs", "ssl_certfile"):
        error = await loss_of_connecting(
            f"rediss://localhost:{tls_redis.port}?{option}=/nonexistent"
        )
        assert loss_reason(error) == "tls"
