"""The storage in Redis. Keys and channel messages are in `bandsync/wire/PROTOCOL.md`."""

from collections.abc import Callable, Iterator, Sequence
from importlib import resources

from msgspec import Struct
from msgspec.structs import replace
from redis.exceptions import RedisError

from bandsync.model.session import Session, Tip, tip
from bandsync.redis_link.connection import Argument, Reply
from bandsync.redis_link.errors import LossReason, loss_reason
from bandsync.redis_link.interfaces import Executor
from bandsync.redis_link.script import Script
from bandsync.storage.base import (
    Committed,
    Conflict,
    Lost,
    Presence,
    RedisStatus,
    Storage,
    StorageHealth,
    StorageType,
    Unreadable,
    Unusable,
)
from bandsync.storage.channel_messages import write_change
from bandsync.storage.records import (
    UnreadableError,
    changed_fields,
    read_presence,
    read_session,
    read_tip,
)

_COMMIT = Script(resources.files("bandsync").joinpath("storage", "commit.lua").read_text())
_TIP_FIELDS = ("epoch", "version", "eventId")
# Keys per SCAN: few round trips, yet Redis serves other clients in between.
_SCAN_COUNT = 500
# Sessions per round trip of a listing.
_BATCH = 100
# Begins an error reply, or is contained in that of a script.
_WRONG_TYPE = "WRONGTYPE"
# An id that no session can have.
_NO_SESSION = "*"


class Keys(Struct, frozen=True):
    """The names of keys and channels in Redis; each begins with ``prefix``."""

    prefix: str

    def session(self, session_id: str) -> str:
        """Key of a session's hash; the braces enclose its hash tag in a Cluster."""
        return f"{self.prefix}session:{{{session_id}}}"

    def events(self, session_id: str) -> str:
        """Channel of a session."""
        return f"{self.prefix}events:{{{session_id}}}"

    def server(self, server_id: str) -> str:
        """Key of a server's presence entry."""
        return f"{self.prefix}server:{server_id}"

    def probe(self, server_id: str) -> str:
        """Channel of a server's liveness probe."""
        return f"{self.prefix}probe:{server_id}"

    def node_probe(self, server_id: str, hash_tag: int) -> str:
        """Probe channel at one master of a Cluster, and key of its write probe."""
        return f"{self.prefix}probe:{{{hash_tag}}}:{server_id}"


class RedisStorage(Storage):
    """Keeps sessions in Redis, over one link and until that link is lost.

    Args:
        ttl_s: expiry of a session after its last change, seconds.
        server_id: the sender in messages to other servers.
        event_ids: yields ids that are unique among all processes.
        on_loss: called once for each operation that found Redis unusable, before it returns.
    """

    def __init__(
        self,
        link: Executor,
        keys: Keys,
        *,
        ttl_s: int,
        server_id: str,
        event_ids: Iterator[str],
        on_loss: Callable[[LossReason, RedisError], None],
    ) -> None:
        self._link = link
        self._keys = keys
        self._ttl_s = ttl_s
        self._server_id = server_id
        self._event_ids = event_ids
        self._on_loss = on_loss

    @property
    def storage_type(self) -> StorageType:
        return "redis"

    async def get_session(self, session_id: str) -> Session | Unusable | None:
        try:
            reply = await self._link.execute("HGETALL", self._keys.session(session_id))
            return _read(session_id, reply)
        except (RedisError, UnreadableError) as error:
            return self._unusable(error)

    async def commit(
        self, base: Session | None, change: Session, events: Sequence[bytes]
    ) -> Committed | Conflict | Unusable:
        session_id = change.session_id
        committed = replace(change, event_id=next(self._event_ids))
        old = None if base is None else tip(base)
        new = tip(committed)
        fields, gone = changed_fields(base, committed)
        message = write_change(old, new, self._server_id, fields, gone, events)
        arguments: list[Argument] = [
            *(("", "", "") if old is None else (old.epoch, old.version, old.event_id)),
            new.epoch,
            new.version,
            new.event_id,
            self._ttl_s,
            self._link.publish_verb,
            self._keys.events(session_id),
            message,
            len(gone),
            *gone,
        ]
        for name, value in fields.items():
            arguments.append(name)
            arguments.append(value)
        key = self._keys.session(session_id)
        try:
            reply = await _COMMIT.execute(self._link, (key,), arguments)
            if reply != 1:
                return Conflict(_read(session_id, reply))
        except (RedisError, UnreadableError) as error:
            return self._unusable(error)
        if self._link.publish_verb == "SPUBLISH" and self._link.migrates(key):
            # The script has published at the new node, where no subscriber is connected yet.
            await self.publish(session_id, message)
        return Committed(committed)

    async def check_scripts(self) -> None:
        """Run the commit script for a commit that conflicts, to see whether Redis supports it.

        Raises:
            RedisError: it does not.
        """
        await _COMMIT.execute(self._link, (self._keys.session(_NO_SESSION),), ("-", "-", "-"))

    async def delete_session(self, session_id: str) -> bool | Lost:
        try:
            return await self._link.execute("DEL", self._keys.session(session_id)) == 1
        except RedisError as error:
            return self._lost(error)

    async def list_sessions(self) -> list[Session] | Lost:
        sessions: list[Session] = []
        try:
            session_ids = await self._scan()
            for start in range(0, len(session_ids), _BATCH):
                batch = session_ids[start : start + _BATCH]
                replies = await self._link.execute_all(
                    [("HGETALL", self._keys.session(session_id)) for session_id in batch]
                )
                for session_id, reply in zip(batch, replies, strict=True):
                    session = _readable(session_id, reply)
                    if session is not None:
                        sessions.append(session)
        except RedisError as error:
            return self._lost(error)
        return sessions

    async def health_check(self) -> StorageHealth:
        try:
            sessions = await self._scan()
            connected = True
        except RedisError as error:
            self._lost(error)
            sessions = []
            connected = False
        return StorageHealth(
            healthy=connected,
            storage_type=self.storage_type,
            initialized=True,
            fallback_reason=None,
            total_sessions=len(sessions),
            redis_status=RedisStatus(connected, connection_attempts=0),
        )

    async def touch(self, session_ids: Sequence[str]) -> dict[str, Tip | Unreadable | None] | Lost:
        commands: list[tuple[Argument, ...]] = []
        for session_id in session_ids:
            key = self._keys.session(session_id)
            commands += [("HMGET", key, *_TIP_FIELDS), ("EXPIRE", key, self._ttl_s)]
        try:
            replies = await self._link.execute_all(commands)
        except RedisError as error:
            return self._lost(error)
        for reply in replies:
            if isinstance(reply, RedisError) and _WRONG_TYPE not in str(reply):
                return self._lost(reply)
        return dict(zip(session_ids, map(_read_tip, replies[::2]), strict=True))

    async def publish(self, session_id: str, message: bytes) -> None:
        try:
            await self._link.execute(
                self._link.publish_verb, self._keys.events(session_id), message
            )
        except RedisError as error:
            self._unusable(error)

    async def find_servers(
        self, server_ids: Sequence[str]
    ) -> dict[str, Presence | Unreadable | None] | Lost:
        if not server_ids:
            return {}
        try:
            # No MGET: in a Cluster the keys are on several nodes.
            replies = await self._link.execute_all(
                [("GET", self._keys.server(server_id)) for server_id in server_ids]
            )
        except RedisError as error:
            return self._lost(error)
        entries = [None if reply is None else read_presence(reply) for reply in replies]
        return dict(zip(server_ids, entries, strict=True))

    async def _scan(self) -> list[str]:
        """The ids of all sessions; may miss one that is migrating between nodes."""
        start, end = self._keys.session("\0").split("\0")
        pattern = f"{_escaped(start)}*{_escaped(end)}"
        found: dict[str, None] = {}
        for part in self._link.parts():
            cursor: bytes | int = 0
            while cursor != b"0":
                reply = await part.execute("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_COUNT)
                assert isinstance(reply, list)
                cursor, keys = _page(reply)
                for key in keys:
                    found[key.decode(errors="replace")[len(start) : -len(end)]] = None
        return list(found)

    def _unusable(self, error: RedisError | UnreadableError) -> Unusable:
        if isinstance(error, UnreadableError) or _WRONG_TYPE in str(error):
            return Unreadable(str(error))
        # An error without a reason of its own that does not concern the key: Redis lacks or forbids
        # the command.
        reason = loss_reason(error) or "unsupported"
        self._on_loss(reason, error)
        return Lost(reason)

    def _lost(self, error: RedisError) -> Lost:
        unusable = self._unusable(error)
        return unusable if isinstance(unusable, Lost) else Lost(unusable.detail)


def _page(reply: list[Reply | RedisError]) -> tuple[bytes, list[bytes]]:
    """The next cursor and the keys in a reply to SCAN."""
    cursor, keys = reply
    assert isinstance(cursor, bytes)
    assert isinstance(keys, list)
    return cursor, [key for key in keys if isinstance(key, bytes)]


def _read(session_id: str, reply: Reply) -> Session | None:
    """The session in a reply to HGETALL; None for an empty one."""
    if not isinstance(reply, list):
        raise UnreadableError(f"a reply that is no hash: {reply!r:.100}")
    if not reply:
        return None
    fields: dict[str, bytes] = {}
    for name, value in zip(reply[::2], reply[1::2], strict=True):
        assert isinstance(name, bytes)
        assert isinstance(value, bytes)
        fields[name.decode(errors="replace")] = value
    return read_session(session_id, fields)


def _readable(session_id: str, reply: Reply | RedisError) -> Session | None:
    if isinstance(reply, RedisError):
        return None
    try:
        return _read(session_id, reply)
    except UnreadableError:
        return None


def _read_tip(reply: Reply | RedisError) -> Tip | Unreadable | None:
    """The tip in a reply to HMGET."""
    if not isinstance(reply, list):
        return Unreadable(str(reply))
    if reply == [None, None, None]:
        return None
    epoch, version, event_id = (part if isinstance(part, bytes) else None for part in reply)
    try:
        return read_tip(epoch, version, event_id)
    except UnreadableError as error:
        return Unreadable(str(error))


def _escaped(text: str) -> str:
    """A glob pattern that matches ``text`` only."""
    return "".join(f"\\{sign}" if sign in "*?[]\\^" else sign for sign in text)
