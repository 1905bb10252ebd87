"""The fakeredis server supports the commands that BandSync uses."""

import socket

import pytest
import redis


def test_fakeredis_runs_scripts_pubsub_and_errors(fake_redis: str) -> None:
    with redis.Redis.from_url(fake_redis, decode_responses=True) as client, client.pubsub() as sub:
        sub.subscribe("channel")
        assert sub.get_message(timeout=20)["data"] == 1
        with pytest.raises(redis.exceptions.NoScriptError):
            client.evalsha("0" * 40, 0)
        script = "redis.call('HSET', KEYS[1], 'a', '1') return redis.call('PUBLISH', ARGV[1], 'b')"
        assert client.evalsha(client.script_load(script), 1, "key", "channel") == 1
        assert sub.get_message(timeout=20)["data"] == "b"
        assert client.hgetall("key") == {"a": "1"}
        assert client.scan() == (0, ["key"])


def test_fakeredis_stops_with_open_connections(fake_redis: str) -> None:
    port = int(fake_redis.rpartition(":")[2].partition("/")[0])
    # Left to the garbage collector, the connection would be a warning in a later test.
    with socket.create_connection(("127.0.0.1", port)) as half:
        half.sendall(b"*1\r\n$4\r\nPI")
