"""Convergence of several servers and a Redis under random faults, on the real rules.

A pure simulation with seeds: no sockets, no tasks, no clock but a number. The final state is
checked after a calm minute; versions are checked all the time.

One file, because clients, servers, faults and the final checks share one simulated world.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import pytest
from msgspec import Struct
from msgspec.structs import replace

from bandsync.model import merge as merge_module
from bandsync.model.merge import merge, same_content
from bandsync.model.session import Member, Session, Stamp, Tip, leader_of, present, tip
from bandsync.rules import draft as draft_module
from bandsync.rules.actions import Actor, Audit, Bind, Command, Decision, Drop, Expire
from bandsync.rules.decide import decide
from bandsync.rules.leadership import settle
from bandsync.rules.reconcile import Adopt, Write, reconcile, superseded
from bandsync.rules.server_context import ServerContext
from bandsync.rules.tokens import parse_resume_token
from bandsync.wire.commands import ChatMessage, LeaveSession, Play, Refusal, SetRole, UpdateMessage
from bandsync.wire.messages import Event, Snapshot, You
from tests.support.states import NOW

RING = 4  # Fifty messages are more than a short history has.
GRACE_MS = 10_000.0
PRESENCE_MS = 10_000.0
SWEEP_MS = 10_000.0
STABLE_MS = 1_500.0
ANTI_ENTROPY_MS = 5_000.0
MAX_ATTEMPTS = 8

Register = Literal["transport", "headline"]
Fate = Literal["unsent", "executed", "late"]


class LostError(Exception):
    """Redis is out of reach, or an answer was lost."""


class ViolationError(AssertionError):
    """A promise was broken."""


class Commit(Struct, frozen=True):
    """A commit, as the relay publishes it."""

    prev: Tip | None
    session: Session
    shown: Session | None
    events: tuple[Event, ...]


class Ack(Struct, frozen=True):
    """An acknowledged change of a register, or a chat message (which has no stamp)."""

    register: Register | Literal["chat"]
    value: object
    stamp: Stamp | None = None
    sent: tuple[float, str] = (0.0, "")

    def held(self, session: Session) -> bool:
        """Whether the promise is kept in this copy."""
        if self.register == "chat":
            ring = [(chat.sent_at, chat.message_id) for chat in session.chat]
            known = any(chat.message_id == self.sent[1] for chat in session.chat)
            return known or (len(ring) == RING and ring[0] > self.sent)
        register = getattr(session, self.register)
        assert self.stamp is not None
        if register.stamp == self.stamp:
            return bool(register.value == self.value)
        return bool(register.stamp > self.stamp)


class Redis:
    """Compares tips and sets, as ``commit.lua`` does."""

    def __init__(self) -> None:
        self.data: Session | None = None
        self.dump: Session | None = None
        self.up = True
        # Published commits that subscribers can still receive, by the tip that they follow.
        self.relayed: dict[Tip | None, Commit] = {}
        self.presence: dict[str, tuple[float, bool]] = {}
        self.zombies: list[Commit] = []

    def execute(self, commit: Commit) -> bool:
        stored = None if self.data is None else tip(self.data)
        if stored != commit.prev:
            return False
        self.data = commit.session
        self.relayed[commit.prev] = commit
        return True

    def lose(self, data: Session | None) -> None:
        """Replace the stored data; None deletes it."""
        self.data = data
        self.relayed = {}
        self.presence = {}


class Client:
    """A musician: joins, acts, drops, comes back; checks the versions that it sees."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.token = ""
        self.member_id = ""
        self.connection_id = ""
        self.server: Server | None = None
        self.seen: Session | None = None

    def snapshot(self, shown: Session) -> None:
        seen = self.seen
        if seen is not None and seen.epoch == shown.epoch:
            if shown.version < seen.version:
                raise ViolationError(f"version went back: {seen.version} -> {shown.version}")
            if shown.version == seen.version and not same_content(shown, seen):
                raise ViolationError(f"two states of version {shown.version}")
        self.seen = shown

    def events(self, events: Sequence[Event], state: Session) -> None:
        assert self.seen is not None
        expected = range(self.seen.version + 1, state.version + 1)
        if [event.version for event in events] != list(expected):
            raise ViolationError(f"events skip: {self.seen.version} -> {state.version}")
        if state.epoch != self.seen.epoch:
            raise ViolationError("another epoch without a snapshot")
        self.seen = state


class Server:
    """One server process and its room."""

    def __init__(self, world: "World", number: int, life: int) -> None:
        self.world = world
        self.number = number
        self.boot_id = f"boot-{number}.{life}"
        self.up = True
        self.cut = False
        self.link = False
        self.linked_since = 0.0
        self.deaf = False
        self.next_fate: Fate | None = None
        self.checked_at = world.now
        # The room.
        self.mirror: Session | None = None
        self.hosting = False
        self.on_redis = False
        self.own: dict[str, Member] = {}
        self.clients: dict[str, Client] = {}  # by member id
        self.half_open: dict[str, float] = {}  # by connection id
        self.graces: dict[tuple[str, str], float] = {}
        self.absent: dict[str, float] = {}
        if self.reachable:
            self.link = True
            self.linked_since = world.now - STABLE_MS

    @property
    def now(self) -> float:
        return self.world.now + self.world.skews[self.number]

    @property
    def reachable(self) -> bool:
        return self.up and not self.cut and self.world.redis.up

    @property
    def in_redis_mode(self) -> bool:
        return self.link and self.world.now - self.linked_since >= STABLE_MS

    @property
    def here(self) -> ServerContext:
        isolated = not self.on_redis
        return ServerContext(
            f"server-{self.number}", self.boot_id, 8, self.world.leadership, isolated
        )

    # --- Redis

    def lose_link(self) -> None:
        self.link = False
        self.on_redis = False

    def require_link(self) -> None:
        if not self.reachable or not self.link:
            self.lose_link()
            raise LostError

    def read(self) -> Session | None:
        self.require_link()
        return self.world.redis.data

    def commit(self, commit: Commit) -> bool:
        self.require_link()
        fate, self.next_fate = self.next_fate, None
        if fate is not None:
            if fate == "executed":
                self.world.redis.execute(commit)
            elif fate == "late":
                self.world.redis.zombies.append(commit)
            self.lose_link()
            raise LostError
        return self.world.redis.execute(commit)

    # --- the mirror

    def take(self, session: Session) -> None:
        """Replace the mirror; the new one keeps everything except tombstones."""
        self.check_inflation(self.mirror, session)
        slots = [chat.slot for chat in session.chat]
        if len(set(slots)) != len(slots) or not set(slots) <= set(range(RING)):
            raise ViolationError(f"slots {slots}")
        self.mirror = session
        for member in session.members.values():
            key = (member.member_id, member.connection_id)
            if member.boot_id == self.boot_id and member.present and not member.connected:
                self.graces.setdefault(key, self.world.now + GRACE_MS)

    def jump(self, session: Session, shown: Session, events: Sequence[Event]) -> None:
        self.take(session)
        for client in self.listeners():
            client.snapshot(shown)
            client.events(events, session)
        self.outside()

    def outside(self) -> None:
        """Close superseded connections after a change from another server."""
        assert self.mirror is not None
        for member_id in superseded(self.mirror, self.own):
            self.close(member_id)

    def close(self, member_id: str) -> None:
        mine = self.own.pop(member_id)
        client = self.clients.pop(member_id)
        self.half_open.pop(mine.connection_id, None)
        if client.connection_id == mine.connection_id:
            raise ViolationError(f"live connection of {client.name} closed")

    def listeners(self) -> Iterator[Client]:
        for member_id, client in self.clients.items():
            if client.connection_id == self.own[member_id].connection_id:
                yield client

    def reconcile(self, stored: Session | None) -> None:
        for _ in range(MAX_ATTEMPTS):
            mine = self.mirror
            here = replace(self.here, isolated=False)
            outcome = reconcile(mine, stored, self.own, here, self.now)
            match outcome:
                case None:
                    return
                case Adopt(session=session):
                    if mine is None or tip(mine) != tip(session):
                        self.jump(session, session, ())
                    return
                case Write(session=session, shown=shown, events=events):
                    self.world.writes += 1
                    written = replace(session, event_id=self.world.draw("write"))
                    prev = None if stored is None else tip(stored)
                    if self.commit(Commit(prev, written, shown, events)):
                        self.jump(written, shown, events)
                        return
                    stored = self.read()

    def read_again(self) -> bool:
        """Read and reconcile; False if Redis cannot be reached."""
        try:
            self.reconcile(self.read())
        except LostError:
            return False
        return True

    def receive(self) -> None:
        """Apply relayed commits that follow the mirror; read the store after a gap."""
        if not (self.hosting and self.on_redis and self.reachable and self.link):
            return
        redis = self.world.redis
        while self.mirror is not None and not self.deaf:
            commit = redis.relayed.get(tip(self.mirror))
            if commit is None:
                break
            if commit.shown is not None:
                self.jump(commit.session, commit.shown, commit.events)
                continue
            self.take(commit.session)
            for client in self.listeners():
                client.events(commit.events, commit.session)
            self.outside()
        stored = redis.data
        if (stored and tip(stored)) != (self.mirror and tip(self.mirror)):
            self.read_again()
        self.audit()

    def audit(self) -> None:
        if self.mirror is not None and self.hosting:
            self.change(Audit(dict(self.own)), Actor(self.here, ""))

    def change(self, command: Command, actor: Actor) -> Decision | Refusal:
        """Decide and commit; the events go to all connections."""
        for _ in range(MAX_ATTEMPTS):
            base = self.mirror
            decision = decide(base, command, replace(actor, server=self.here), self.now)
            if isinstance(decision, Refusal) or not decision.events:
                return decision
            session = replace(decision.session, event_id=self.world.draw("event"))
            if self.on_redis:
                prev = None if base is None else tip(base)
                try:
                    if not self.commit(Commit(prev, session, None, decision.events)):
                        self.reconcile(self.read())
                        continue
                except LostError:
                    continue
            self.take(session)
            for client in self.listeners():
                client.events(decision.events, session)
            return replace(decision, session=session)
        return Refusal("conflict", "")

    def check_inflation(self, base: Session | None, session: Session) -> None:
        if base is None:
            return
        merged = merge(base, session)
        kept = {key: merged.members[key] for key in session.members}
        pruned = [merged.members[key] for key in merged.members.keys() - kept.keys()]
        if not same_content(replace(merged, members=kept), session):
            raise ViolationError("not inflationary")
        if any(stone.present for stone in pruned):
            raise ViolationError("a member was pruned")

    # --- the room

    def open(self) -> None:
        if self.hosting:
            return
        self.hosting = True
        self.deaf = False
        self.mirror = None
        if self.in_redis_mode:
            self.on_redis = True
            self.read_again()
            self.audit()

    def close_if_empty(self) -> None:
        if not self.hosting or self.own:
            return
        session = self.mirror
        if session is not None:
            if not self.on_redis:  # Dirty.
                return
            if any(member.boot_id == self.boot_id for member in present(session)):
                return
        self.hosting = False
        self.on_redis = False
        self.mirror = None
        self.graces = {}
        self.absent = {}

    def bind(self, client: Client, *, lead: bool, resume: bool) -> None:
        self.open()
        world = self.world
        token = parse_resume_token(client.token) if resume else None
        connection_id = world.draw("connection")
        bind = Bind(
            "song",
            world.draw("epoch"),
            world.draw("secret"),
            client.name,
            lead,
            (token,) if token else (),
        )
        outcome = self.change(bind, Actor(self.here, connection_id, "", world.draw("member")))
        if isinstance(outcome, Refusal):
            self.close_if_empty()
            return
        assert isinstance(outcome.reply, Snapshot)
        assert isinstance(outcome.reply.you, You)
        assert self.mirror is not None
        member_id = outcome.reply.you.member_id
        client.token = outcome.reply.you.resume_token
        client.member_id = member_id
        client.connection_id = connection_id
        client.server = self
        client.seen = self.mirror
        if member_id in self.own:
            self.close(member_id)
        self.own[member_id] = self.mirror.members[member_id]
        self.clients[member_id] = client
        self.audit()

    def command(self, client: Client, command: Command) -> None:
        world = self.world
        fresh = world.draw("id")
        mine = self.own.get(client.member_id)
        if mine is None or mine.connection_id != client.connection_id:
            raise ViolationError(f"{client.name} is not registered")
        actor = Actor(self.here, client.connection_id, client.member_id, fresh)
        outcome = self.change(command, actor)
        if isinstance(command, LeaveSession):
            del self.own[client.member_id]
            del self.clients[client.member_id]
            client.connection_id = client.member_id = client.token = ""
            client.server = None
            self.audit()
            self.close_if_empty()
            return
        self.audit()
        if isinstance(outcome, Refusal):
            if outcome.code != "conflict":
                world.refused(command)
            return
        if outcome.events:
            world.acknowledge(command, outcome.session, fresh)

    def drop(self, connection_id: str) -> None:
        """Notice that a connection is gone."""
        self.half_open.pop(connection_id, None)
        for member_id, mine in self.own.items():
            if mine.connection_id == connection_id:
                del self.own[member_id]
                del self.clients[member_id]
                self.change(Drop(), Actor(self.here, connection_id, member_id))
                self.audit()
                self.close_if_empty()
                return

    # --- time

    def tick(self) -> None:
        world = self.world
        if self.link and not self.reachable:
            self.lose_link()
        if self.reachable:
            if not self.link:
                self.link = True
                self.linked_since = world.now
            world.redis.presence[self.boot_id] = (world.now, self.hosting)
            if self.hosting and not self.on_redis and self.in_redis_mode:
                self.on_redis = self.read_again()
                self.deaf = False
                self.audit()
        for connection_id, due in list(self.half_open.items()):
            if world.now >= due:
                self.drop(connection_id)
        for (member_id, connection_id), due in list(self.graces.items()):
            if world.now >= due:
                self.graces.pop((member_id, connection_id), None)
                self.change(Expire("timeout"), Actor(self.here, connection_id, member_id))
        if self.hosting and self.on_redis and self.mirror is not None:
            self.sweep(self.mirror)
            if world.now - self.checked_at >= ANTI_ENTROPY_MS:
                self.checked_at = world.now
                if self.deaf:
                    self.deaf = False
                self.receive()
        self.audit()
        self.close_if_empty()

    def sweep(self, session: Session) -> None:
        world = self.world
        for member in present(session):
            key = (member.member_id, member.connection_id)
            if member.boot_id == self.boot_id:
                continue
            seen, hosted = world.redis.presence.get(member.boot_id, (0.0, False))
            if hosted and world.now - seen < PRESENCE_MS:
                self.absent.pop(member.member_id, None)
                continue
            if world.now - self.absent.setdefault(member.member_id, world.now) < SWEEP_MS:
                continue
            if member.connected:
                self.change(Drop(), Actor(self.here, member.connection_id, member.member_id))
            self.graces.setdefault(key, world.now + GRACE_MS)


class World:
    """Three servers, four musicians, one Redis and what was promised."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now = NOW
        self.drawn = 0
        self.writes = 0
        self.leadership: Literal["claim", "open"] = rng.choice(["claim", "claim", "open"])
        self.skews = rng.choice([(0.0, 0.0, 0.0), (0.0, 40.0, -25.0), (5000.0, 0.0, -3000.0)])
        # Until a silent connection is noticed; the long one outlives the history.
        self.half_open_ms = rng.choice([30_000.0, 30_000.0, 1e9])
        self.redis = Redis()
        self.lives = [0, 0, 0]
        self.servers = [Server(self, number, 0) for number in range(3)]
        self.clients = [Client(name) for name in ("Ann", "Bob", "Cid", "Dan")]
        self.acks: list[Ack] = []
        self.never: list[object] = []  # Refused changes, which must be absent in the end.

    def draw(self, kind: str) -> str:
        self.drawn += 1
        return f"{kind}-{self.drawn}"

    def acknowledge(self, command: Command, session: Session, fresh: str) -> None:
        match command:
            case Play():
                register = session.transport
                self.acks.append(Ack("transport", register.value, register.stamp))
            case UpdateMessage():
                headline = session.headline
                self.acks.append(Ack("headline", headline.value, headline.stamp))
            case ChatMessage():
                chat = next(chat for chat in session.chat if chat.message_id == fresh)
                self.acks.append(Ack("chat", chat.text, sent=(chat.sent_at, fresh)))

    def refused(self, command: Command) -> None:
        match command:
            case UpdateMessage(message=text) | ChatMessage(text=text):
                self.never.append(text)

    def copies(self, without: Server | None = None) -> list[Session]:
        found = [
            server.mirror
            for server in self.servers
            if server.up and server is not without and server.mirror is not None
        ]
        return found if self.redis.data is None else [*found, self.redis.data]

    def excuse(self, without: Server | None = None) -> None:
        """Drop the promises whose last copy is lost."""
        copies = self.copies(without)
        self.acks = [ack for ack in self.acks if any(ack.held(copy) for copy in copies)]

    # --- what can happen

    def pass_time(self, milliseconds: float) -> None:
        self.now += milliseconds
        for server in self.servers:
            if server.up:
                server.tick()

    def pump(self) -> None:
        for _ in range(2):
            for server in self.servers:
                if server.up:
                    server.receive()

    def join(self, client: Client, server: Server, *, resume: bool) -> None:
        if server.up and not client.connection_id:
            server.bind(client, lead=self.rng.random() < 0.3, resume=resume)

    def act(self, client: Client, what: str) -> None:
        if client.server is None or not client.connection_id:
            return
        others = [other.member_id for other in self.clients if other is not client]
        text = self.draw(what)
        command: Command
        match what:
            case "play":
                command = Play(position_ms=float(self.drawn), start_in_ms=0.0)
            case "headline":
                command = UpdateMessage(message=text)
            case "chat":
                command = ChatMessage(text=text)
            case "claim":
                command = SetRole(role="leader")
            case "down":
                command = SetRole(role="follower")
            case "hand":
                command = SetRole(role="leader", member_id=self.rng.choice(others))
            case _:
                command = LeaveSession()
        client.server.command(client, command)

    def disconnect(self, client: Client, *, noticed: bool) -> None:
        server, connection_id = client.server, client.connection_id
        client.connection_id = ""
        client.server = None
        if server is None or not server.up or not connection_id:
            return
        if noticed:
            server.drop(connection_id)
        else:
            server.half_open[connection_id] = self.now + self.half_open_ms

    def crash(self, server: Server) -> None:
        if not server.up:
            return
        server.up = False
        for client in self.clients:
            if client.server is server:
                client.server = None
                client.connection_id = ""
        self.excuse(without=server)

    def start(self, number: int) -> None:
        if not self.servers[number].up:
            self.lives[number] += 1
            self.servers[number] = Server(self, number, self.lives[number])

    def redis_stops(self, data: Literal["keep", "empty", "dump"]) -> None:
        redis = self.redis
        if not redis.up:
            return
        redis.up = False
        redis.zombies = []
        redis.relayed = {}
        if data != "keep":
            redis.lose(None if data == "empty" else redis.dump)
            self.excuse()

    def do(self, what: str, salt: int) -> None:
        """Carry out one step of a history; ``salt`` seeds the choice of server and client."""
        self.rng = rng = random.Random(salt)
        # No server does two things at one instant: stamps of one process would be equal.
        self.now += 0.1
        redis = self.redis
        server = rng.choice(self.servers)
        client = rng.choice(self.clients)
        match what:
            case "time":
                self.pass_time(rng.choice([0, 200, 1000, 1000, 2000, 4000, 11_000, 25_000]))
            case "pump":
                self.pump()
            case "hear":
                if server.up:
                    server.receive()
            case "join" | "resume":
                self.join(client, server, resume=what == "resume" and bool(client.token))
            case "drop" | "half":
                self.disconnect(client, noticed=what == "drop")
            case "move":
                self.disconnect(client, noticed=rng.random() < 0.3)
                self.join(client, server, resume=bool(client.token))
            case "lead":
                leaders = [
                    client
                    for client in self.clients
                    if client.server is not None
                    and client.server.mirror is not None
                    and client.server.mirror.leader.member_id == client.member_id
                ]
                if leaders:
                    kinds = ["play", "headline", "headline", "chat", "hand", "down"]
                    self.act(rng.choice(leaders), rng.choice(kinds))
            case "act":
                kinds = ["play", "headline", "chat", "chat", "chat", "claim", "claim", "leave"]
                self.act(client, rng.choice(kinds))
            case "fate":
                server.next_fate = rng.choice(["unsent", "executed", "late"])
            case "zombie":
                if redis.zombies and redis.up:
                    redis.execute(redis.zombies.pop(0))
            case "stop":
                self.redis_stops(rng.choice(["keep", "empty", "dump"]))
            case "up":
                redis.up = True
            case "flush":
                if redis.up:
                    redis.lose(None)
                    self.excuse()
            case "dump":
                redis.dump = redis.data
            case "cut":
                server.cut = True
            case "heal":
                server.cut = False
            case "reset":
                server.lose_link()
            case "deaf":
                server.deaf = True
            case "crash":
                self.crash(server)
            case "start":
                self.start(server.number)

    # --- the end

    def settle_down(self) -> None:
        """Heal every fault, and let the servers converge."""
        self.redis.up = True
        while self.redis.zombies:
            self.redis.execute(self.redis.zombies.pop(0))
        for number, server in enumerate(self.servers):
            server.cut = False
            server.next_fate = None
            self.start(number)
        self.calm(80)
        if not any(server.hosting for server in self.servers) and self.redis.data is not None:
            # A join makes a server observe the session and remove members of failed servers.
            self.join(self.clients[0], self.servers[2], resume=False)
            self.calm(40)

    def calm(self, seconds: int) -> None:
        for _ in range(seconds):
            self.pass_time(1000)
            self.pump()

    def check(self) -> None:
        stored = self.redis.data
        # Connections that the servers hold, half-open ones included.
        live: dict[str, str] = {}
        for server in self.servers:
            for member_id, mine in server.own.items():
                if member_id in live:
                    raise ViolationError(f"{member_id} has two connections")
                live[member_id] = mine.connection_id
        for server in self.servers:
            if server.mirror is None:
                continue
            if stored is None or tip(server.mirror) != tip(stored):
                raise ViolationError(f"{server.boot_id} has another state than Redis")
            if not same_content(server.mirror, stored):
                raise ViolationError("one tip, two contents")
        for client in self.clients:
            if client.server is None:
                continue
            if client.server.clients.get(client.member_id) is not client:
                raise ViolationError(f"{client.name} lost its connection")
            if client.seen is None or stored is None or not same_content(client.seen, stored):
                raise ViolationError(f"{client.name} sees another state")
        if stored is None:
            if live or self.acks:
                raise ViolationError("nothing is left")
            return
        shown = {member.member_id: member.connection_id for member in present(stored)}
        if shown != live:
            raise ViolationError(f"shown {shown}, live {live}")
        if not all(member.connected for member in present(stored)):
            raise ViolationError("a live member is shown as disconnected")
        if live and leader_of(stored) is None and stored.leader.member_id:
            raise ViolationError("nobody leads")
        if settle(stored, self.now, "", None) is not stored:
            raise ViolationError("nobody leads although somebody could")
        for ack in self.acks:
            if not ack.held(stored):
                raise ViolationError(f"lost: {ack}")
            if ack.stamp is not None and ack.stamp.rank == stored.leader.rank:
                if getattr(stored, ack.register).stamp.rank == ack.stamp.rank:
                    continue
                raise ViolationError(f"lost under the winning leader: {ack}")
        texts = [chat.text for chat in stored.chat]
        if len(set(texts)) != len(texts):
            raise ViolationError(f"said twice: {texts}")
        for text in (*texts, stored.headline.value):
            if text in self.never:
                raise ViolationError(f"refused, but done: {text}")
        writes = self.writes
        self.calm(10)
        if self.writes != writes or (self.redis.data and tip(self.redis.data)) != tip(stored):
            raise ViolationError("there is no rest")


# Weights of the steps.
MIX = {
    "pump hear hear": 20,
    "lead": 18,
    "act": 10,
    "join": 5,
    "drop half": 5,
    "resume": 4,
    "move": 4,
    "time": 11,
    "fault": 23,
}
MOVES = {"cut": 20, "heal": 12, "move": 18, "time": 12, "lead": 6, "pump hear hear": 30, "act": 2}
FAULTS = {
    "all": [
        *["stop", "up", "up", "flush", "cut", "heal", "reset", "deaf", "fate", "fate", "zombie"],
        *["crash", "start", "dump"],
    ],
    "redis": ["stop", "up", "up", "fate", "fate", "zombie", "flush", "dump", "reset"],
    "partition": ["cut", "heal", "heal", "reset", "fate"],
    "crash": ["crash", "start", "start", "stop", "up"],
    "relay": ["deaf", "flush", "reset"],
    "none": ["pump"],
}


Step = tuple[str, int]


def history(seed: int) -> list[Step]:
    """The steps of the history with this seed."""
    rng = random.Random(seed)
    faults = FAULTS[rng.choice(list(FAULTS))]
    mix = rng.choice([MIX, MIX, MIX, MOVES])
    words = ["join", "pump", "join"]
    for _ in range(rng.randrange(8, 80)):
        what = rng.choices(list(mix), list(mix.values()))[0]
        words.append(rng.choice(faults) if what == "fault" else rng.choice(what.split()))
    return [(word, rng.randrange(1 << 30)) for word in words]


@contextmanager
def short_rings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_module, "CHAT_RING", RING)
        patch.setattr(merge_module, "CHAT_RING", RING)
        yield


def live_through(seed: int, steps: Sequence[Step]) -> World:
    """Run a history, and check the final state."""
    world = World(random.Random(seed))
    for what, salt in steps:
        world.do(what, salt)
        for server in world.servers:
            server.close_if_empty()
    world.settle_down()
    world.check()
    return world


@pytest.mark.parametrize("hundred", range(4))
def test_servers_converge_after_faults(hundred: int) -> None:
    with short_rings():
        for seed in range(hundred * 100, hundred * 100 + 100):
            try:
                live_through(seed, history(seed))
            except Exception as broken:
                broken.add_note(f"history {seed}")
                raise
