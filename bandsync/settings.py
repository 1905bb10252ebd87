"""Settings: names, defaults, ranges and meanings in one table, and how texts become values.

The names are those of environment variables: protocol.md section 9.
"""

from collections.abc import Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct
from msgspec import inspect as types

Text = Annotated[str, Meta(min_length=1)]
RedisUrl = Annotated[str, Meta(pattern="^(redis|rediss|unix)://.")]
Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]


class Settings(Struct, frozen=True, kw_only=True):
    """All settings. Each attribute is the variable of the same name in capitals."""

    redis_enabled: Annotated[
        bool, Meta(description="Whether to use Redis; false keeps sessions in memory.")
    ] = True
    redis_url: Annotated[
        RedisUrl | None,
        Meta(
            description="Where Redis is: redis://, rediss:// or unix://; wins over the parts below."
        ),
    ] = None
    redis_host: Annotated[Text, Meta(description="Host of Redis.")] = "localhost"
    redis_port: Annotated[int, Meta(ge=1, le=65535, description="Port of Redis.")] = 6379
    redis_username: Annotated[
        Text | None, Meta(description="User of Redis (ACL), also for a REDIS_URL that names none.")
    ] = None
    redis_password: Annotated[
        Text | None, Meta(description="Password of Redis, also for a REDIS_URL that has none.")
    ] = None
    redis_db: Annotated[int, Meta(ge=0, description="Database number of Redis.")] = 0
    redis_key_prefix: Annotated[str, Meta(description="What every key in Redis begins with.")] = (
        "bandsync:"
    )
    redis_ttl: Annotated[
        int,
        Meta(
            ge=1,
            le=315_360_000,
            description="Seconds until a session that nobody is in is forgotten; in memory too.",
        ),
    ] = 3600
    redis_max_retries: Annotated[
        int, Meta(ge=0, description="Fast attempts to reconnect before the slow cadence.")
    ] = 5
    redis_retry_delay_on_failure: Annotated[
        Milliseconds, Meta(description="First delay between attempts to reconnect, milliseconds.")
    ] = 100
    redis_connect_timeout: Annotated[
        Milliseconds, Meta(description="Longest wait for a connection to Redis, milliseconds.")
    ] = 10000
    redis_command_timeout: Annotated[
        Milliseconds, Meta(description="Longest wait for an answer of Redis, milliseconds.")
    ] = 5000
    redis_health_interval_ms: Annotated[
        Milliseconds, Meta(description="How often Redis is asked whether it lives, milliseconds.")
    ] = 500
    redis_health_timeout_ms: Annotated[
        Milliseconds, Meta(description="How long it may take to answer that, milliseconds.")
    ] = 1000
    redis_auto_recover: Annotated[
        bool,
        Meta(description="Whether to go back to Redis by itself when it is back."),
    ] = True
    redis_required: Annotated[
        bool, Meta(description="Whether to refuse to start without Redis.")
    ] = False
    redis_sentinels: Annotated[
        Text | None,
        Meta(
            description="Redis Sentinels, host:port, by comma; the master they name is used, with "
            "the credentials, database and TLS of the settings above, whose host counts no more."
        ),
    ] = None
    redis_sentinel_master: Annotated[
        Text | None,
        Meta(description="The name under which the Sentinels watch the master, such as mymaster."),
    ] = None
    redis_sentinel_password: Annotated[
        Text | None, Meta(description="Password of the Sentinels themselves, if they want one.")
    ] = None
    redis_cluster: Annotated[
        bool,
        Meta(
            description="Whether Redis is a Cluster; the settings above name one node, and the "
            "credentials and TLS of all."
        ),
    ] = False
    server_id: Annotated[
        Text | None,
        Meta(description="Name of this server, different for each; by default host name and port."),
    ] = None
    host: Annotated[Text, Meta(description="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[
        Port, Meta(description="Port to listen on; 0 picks a free one and prints it.")
    ] = 3001
    workers: Annotated[
        int,
        Meta(ge=1, le=256, description="Processes that share the port; more than 1 need Redis."),
    ] = 1
    worker_ports: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="First of the ports of their own that workers also listen on, one each."),
    ] = None
    tls_cert: Annotated[
        Text | None,
        Meta(description="File with the TLS certificate chain (PEM); with TLS_KEY serves https."),
    ] = None
    tls_key: Annotated[
        Text | None, Meta(description="File with the key of that certificate (PEM).")
    ] = None
    allowed_origins: Annotated[
        str,
        Meta(description="Other origins whose pages may connect, by comma; * for all."),
    ] = ""
    join_secret: Annotated[
        Text | None,
        Meta(description="When set, joining needs a token: a JWT (HS256) signed with this secret."),
    ] = None
    admin_token: Annotated[
        Text | None,
        Meta(
            description="Token of operators: needed for /api/sessions, and when set for /ops, "
            "/api/ops and /metrics."
        ),
    ] = None
    max_members: Annotated[int, Meta(ge=1, le=1000, description="Members a session takes.")] = 8
    leadership: Annotated[
        Literal["claim", "open"],
        Meta(description="claim: a free lead can be claimed; open: any lead, at any time."),
    ] = "claim"
    resume_grace_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=3_600_000,
            description="How long a member without connection keeps its place, milliseconds.",
        ),
    ] = 10000
    tick_interval_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=60_000,
            description="How often playing sessions send scroll_tick, milliseconds; 0 for never.",
        ),
    ] = 100
    max_idle_sessions: Annotated[
        int, Meta(ge=0, description="Empty sessions kept in memory; the longest idle go first.")
    ] = 10000
    max_connections: Annotated[
        Positive, Meta(description="Connections at a time, of each worker.")
    ] = 10000
    max_message_bytes: Annotated[
        int, Meta(ge=1024, le=1_048_576, description="Largest message of a client, bytes.")
    ] = 16384
    ping_interval_ms: Annotated[
        Milliseconds, Meta(description="How often the server pings each client, milliseconds.")
    ] = 5000
    connection_timeout_ms: Annotated[
        Milliseconds,
        Meta(description="How long a client may be silent, milliseconds; over PING_INTERVAL_MS."),
    ] = 30000
    outbox_limit_bytes: Annotated[
        int, Meta(ge=65_536, description="How much may wait for a slow client, bytes.")
    ] = 262144
    write_timeout_ms: Annotated[
        Milliseconds,
        Meta(description="How long a write to a client may go without progress, milliseconds."),
    ] = 10000
    rate_limit_factor: Annotated[
        float, Meta(ge=0, description="Multiplies the rate limits of the protocol; 0 lifts them.")
    ] = 1.0
    drain_timeout_ms: Annotated[
        Milliseconds, Meta(description="How long a shutdown may take, milliseconds.")
    ] = 10000
    log_format: Annotated[
        Literal["console", "json"],
        Meta(description="console for people, json for machines: one object per line."),
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="The least that is logged.")
    ] = "info"


class Option(Struct, frozen=True):
    """One setting, for those who list them.

    Attributes:
        name: of the environment variable.
        attribute: of `Settings`.
        default: as a text; empty for none.
        allowed: which values it may have.
        meaning: a sentence.
    """

    name: str
    attribute: str
    default: str
    allowed: str
    meaning: str


class SettingsError(Exception):
    """Settings that cannot be used.

    Attributes:
        problems: one line each: name, value, what is allowed.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# Values that must not stand in an error message or a log.
SECRETS = frozenset(
    {"redis_password", "redis_sentinel_password", "redis_url", "join_secret", "admin_token"}
)

SENTINEL_PORT = 26379


def parse(texts: Mapping[str, str]) -> Settings:
    """The settings that ``texts`` (by variable name) give; an empty text counts as not given.

    Raises:
        SettingsError: with all problems at once.
    """
    values: dict[str, object] = {}
    problems: list[str] = []
    for option in OPTIONS:
        text = texts.get(option.name, "").strip()
        if not text:
            continue
        try:
            values[option.attribute] = msgspec.convert(text, _TYPES[option.attribute], strict=False)
        except msgspec.ValidationError:
            shown = "(not shown)" if option.attribute in SECRETS else repr(text)
            problems.append(f"{option.name}={shown}: must be {option.allowed}")
    settings = msgspec.convert(values, Settings)
    problems += _contradictions(settings)
    if problems:
        raise SettingsError(problems)
    return settings


def _contradictions(settings: Settings) -> list[str]:
    """What each setting allows, but not together."""
    problems = []
    if (settings.tls_cert is None) != (settings.tls_key is None):
        given, missing = ("TLS_KEY", "TLS_CERT")
        if settings.tls_key is None:
            given, missing = missing, given
        problems.append(f"{missing}='': must name a file when {given} does")
    if settings.connection_timeout_ms <= settings.ping_interval_ms:
        problems.append(
            f"CONNECTION_TIMEOUT_MS={settings.connection_timeout_ms}: must be more than "
            f"PING_INTERVAL_MS={settings.ping_interval_ms}, or clients that only listen are cut off"
        )
    problems += _sentinel_contradictions(settings)
    if settings.redis_cluster:
        if settings.redis_db:
            problems.append(f"REDIS_DB={settings.redis_db}: must be 0 when REDIS_CLUSTER is true")
        if "{" in settings.redis_key_prefix:
            problems.append(
                f"REDIS_KEY_PREFIX={settings.redis_key_prefix!r}: must have no '{{' when "
                "REDIS_CLUSTER is true, or all sessions are on one node"
            )
    if settings.redis_required and not settings.redis_enabled:
        problems.append("REDIS_REQUIRED='true': must be false when REDIS_ENABLED is")
    return problems + _worker_contradictions(settings)


def _worker_contradictions(settings: Settings) -> list[str]:
    problems = []
    if settings.workers > 1 and not settings.redis_enabled:
        problems.append(
            f"WORKERS={settings.workers}: must be 1 when REDIS_ENABLED is false, "
            "because workers share their sessions through Redis"
        )
    if settings.worker_ports is not None:
        ports = range(settings.worker_ports, settings.worker_ports + settings.workers)
        if ports[-1] > 65535 or settings.port in ports:
            problems.append(
                f"WORKER_PORTS={settings.worker_ports}: must leave room for WORKERS="
                f"{settings.workers} ports up to 65535, PORT={settings.port} not among them"
            )
    return problems


def _sentinel_contradictions(settings: Settings) -> list[str]:
    sentinels, master = settings.redis_sentinels, settings.redis_sentinel_master
    problems = []
    if (sentinels is None) != (master is None):
        given, missing = ("REDIS_SENTINEL_MASTER", "REDIS_SENTINELS")
        if master is None:
            given, missing = missing, given
        problems.append(f"{missing}='': must be set when {given} is")
    if settings.redis_sentinel_password is not None and sentinels is None:
        problems.append("REDIS_SENTINEL_PASSWORD=(not shown): needs REDIS_SENTINELS")
    if sentinels is not None:
        if settings.redis_cluster:
            problems.append("REDIS_CLUSTER='true': must be false when REDIS_SENTINELS is set")
        try:
            sentinel_hosts(sentinels)
        except ValueError:
            problems.append(f"REDIS_SENTINELS={sentinels!r}: must be host:port, by comma")
    return problems


def sentinel_hosts(text: str) -> list[tuple[str, int]]:
    """The hosts and ports in ``REDIS_SENTINELS``.

    Raises:
        ValueError: it names none, or not so.
    """
    hosts = []
    for part in text.split(","):
        parts = urlsplit(f"//{part.strip()}")
        if not parts.hostname or parts.netloc != part.strip() or "@" in parts.netloc:
            raise ValueError(part)
        port = SENTINEL_PORT if parts.port is None else parts.port
        hosts.append((parts.hostname, port))
    return hosts


def _allowed(kind: types.Type) -> str:
    """In words, the values of a type."""
    match kind:
        case types.Metadata(type=inner):
            return _allowed(inner)
        case types.UnionType(types=parts):
            return " or ".join(_allowed(part) for part in parts if type(part) is not types.NoneType)
        case types.BoolType():
            return "true or false"
        case types.LiteralType(values=values):
            return " or ".join(str(value) for value in values)
        case types.IntType(ge=low, le=high) | types.FloatType(ge=low, le=high):
            noun = "a whole number" if isinstance(kind, types.IntType) else "a number"
            if high is None:
                return f"{noun}, {low} or more"
            return f"{noun} from {low} to {high}"
        case types.StrType(pattern=pattern) if pattern is not None:
            return "a URL that begins with redis://, rediss:// or unix://"
        case _:
            return "a text"


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


_TYPES = {entry.name: entry.type for entry in msgspec.structs.fields(Settings)}
OPTIONS = tuple(
    Option(
        name=entry.name.upper(),
        attribute=entry.name,
        default=_text(entry.default),
        allowed=_allowed(types.type_info(entry.type)),
        meaning=next(
            meta.description
            for meta in entry.type.__metadata__
            if isinstance(meta, Meta) and meta.description
        ),
    )
    for entry in msgspec.structs.fields(Settings)
)
