"""A scripted server for pages, which also sends what no real server would.

On the `websockets` library, in threads of its own. Unasked it answers `clock_sync`, nothing else.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from scripts.testbed.redis_server import HOST

Message = dict[str, Any]

# Waiting for what must come: generous, because CI shares its cores. Never asserted on.
PATIENCE_S = 20.0

EPOCH_MS = 1_800_000_000_000.0
TRANSPORT = {
    "isPlaying": False,
    "positionMs": 0.0,
    "anchorTime": EPOCH_MS,
    "tempoBpm": 120.0,
    "beat": 0.0,
    "beatsPerBar": 4,
    "next": None,
}


def member(member_id: str, role: str = "follower", **changes: object) -> Message:
    return {
        "memberId": member_id,
        "displayName": member_id.title(),
        "role": role,
        "joinedAt": EPOCH_MS,
        "connected": True,
        "serverId": "scripted",
    } | changes


def snapshot(version: int = 1, **changes: object) -> Message:
    """A snapshot of the session "song" with one member, "me", who leads; without `you`."""
    return {
        "type": "snapshot",
        "sessionId": "song",
        "version": version,
        "serverTime": EPOCH_MS,
        "epoch": "first",
        "message": "",
        "tempo": 120.0,
        "tempoBpm": 120.0,
        "position": 0.0,
        "isPlaying": False,
        "transport": TRANSPORT,
        "leaderId": "me",
        "members": [member("me", "leader")],
        "chat": [],
        "settings": {"maxMembers": 8},
        "createdAt": EPOCH_MS,
        "lastActiveAt": EPOCH_MS,
    } | changes


def change(type_: str, version: int, **fields: object) -> Message:
    """An event of the session "song"."""
    base = {"type": type_, "sessionId": "song", "version": version, "serverTime": EPOCH_MS}
    return base | fields


class Peer:
    """A connection, seen from the server.

    Attributes:
        inbox: what it sent, `clock_sync` included, and when (seconds).
        deaf: `clock_sync` stays unanswered.
    """

    def __init__(self, connection: ServerConnection) -> None:
        self.inbox: list[tuple[float, Message]] = []
        self.deaf = False
        self._connection = connection
        self._looked = 0
        self._news = threading.Condition()

    def run(self) -> None:
        """Read until the connection ends."""
        with suppress(ConnectionClosed):
            for text in self._connection:
                message = json.loads(text)
                if message["type"] == "clock_sync" and not self.deaf:
                    now = EPOCH_MS + time.perf_counter() * 1000
                    self.send({"type": "clock_sync", "t0": message["t0"], "t1": now, "t2": now})
                with self._news:
                    self.inbox.append((time.perf_counter(), message))
                    self._news.notify_all()

    def next(self, type_: str) -> Message:
        """The next message of this type, skipping others."""

        def look() -> Message | None:
            while self._looked < len(self.inbox):
                _, message = self.inbox[self._looked]
                self._looked += 1
                if message["type"] == type_:
                    return message
            return None

        found: list[Message] = []
        with self._news:
            self._news.wait_for(lambda: found.extend(filter(None, [look()])) or found, PATIENCE_S)
        assert found, f"no {type_} came"
        return found[0]

    def all(self, type_: str) -> list[tuple[float, Message]]:
        """Every message of this type so far, and when it came."""
        with self._news:
            return [entry for entry in self.inbox if entry[1]["type"] == type_]

    def send(self, *messages: Message | str) -> None:
        """Send these; a text is sent as it is."""
        with suppress(ConnectionClosed):
            for message in messages:
                text = message if isinstance(message, str) else json.dumps(message)
                self._connection.send(text)

    def welcome(self, **changes: object) -> None:
        """Say what a server says first."""
        welcome: Message = {
            "type": "welcome",
            "protocol": 1,
            "serverId": "scripted",
            "connectionId": "c",
            "serverTime": EPOCH_MS + time.perf_counter() * 1000,
            "storageType": "memory",
            "pingIntervalMs": 5000,
            "limits": {
                "maxMessageBytes": 16_384,
                "maxMembers": 8,
                "minTempoBpm": 20,
                "maxTempoBpm": 300,
            },
        }
        self.send(welcome | changes)

    def admit(self, *, resumed: bool = False, token_number: int = 1, **changes: object) -> Message:
        """Welcome it and let it join as "me", with the token "t1"; what it sent to join."""
        self.welcome()
        join = self.next("join_session")
        secret = f"t{token_number}"
        you = {"memberId": "me", "role": "leader", "resumeToken": secret, "resumed": resumed}
        self.send(snapshot(you=you, **changes), self.ack(join, version=1))
        return join

    def ack(self, request: Message, **fields: object) -> Message:
        """The ack of a request, to be sent."""
        return {"type": "ack", "requestId": request["requestId"], **fields}

    def refuse(self, request: Message, code: str, **fields: object) -> None:
        """Answer a request with an error."""
        answer = {"type": "error", "requestId": request["requestId"], "code": code}
        self.send(answer | {"message": "Do something else."} | fields)

    def close(self, code: int, reason: str = "") -> None:
        """Close the connection with this code."""
        self._connection.close(code, reason)


class ScriptedServer:
    """Listens on 127.0.0.1.

    Attributes:
        port: where.
    """

    def __init__(self) -> None:
        self.port = 0
        self._peers: list[Peer] = []
        self._taken = 0
        self._news = threading.Condition()

    @property
    def ws_url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    @property
    def connections(self) -> int:
        """So far."""
        with self._news:
            return len(self._peers)

    def next(self) -> Peer:
        """The next connection."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._peers) > self._taken, PATIENCE_S)
            self._taken += 1
            return self._peers[self._taken - 1]

    def handle(self, connection: ServerConnection) -> None:
        """Serve a connection, in a thread of its own."""
        peer = Peer(connection)
        with self._news:
            self._peers.append(peer)
            self._news.notify_all()
        peer.run()


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """One that runs to the end of the block."""
    scripted = ScriptedServer()
    with serve(scripted.handle, HOST, 0, compression=None) as server:
        scripted.port = server.socket.getsockname()[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield scripted
        server.shutdown()
        thread.join()
