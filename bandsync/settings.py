"""Settings: names, defaults, ranges and meanings in one table, and their parser.

The names are environment variables: `scripts/deploy/OPERATIONS.md`, section *Settings*.
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
    """All settings; each attribute is the environment variable of the same name in capitals."""

    redis_enabled: Annotated[
        bool, Meta(description="Keep sessions in Redis; false keeps them in memory only.")
    ] = True
    redis_url: Annotated[
        RedisUrl | None,
        Meta(
            description="Redis URL: redis://, rediss://, unix://; replaces host, port and database."
        ),
    ] = None
    redis_host: Annotated[Text, Meta(description="Redis host.")] = "localhost"
    redis_port: Annotated[int, Meta(ge=1, le=65535, description="Redis port.")] = 6379
    redis_username: Annotated[
        Text | None, Meta(description="Redis user (ACL), also for a REDIS_URL without one.")
    ] = None
    redis_password: Annotated[
        Text | None, Meta(description="Redis password, also for a REDIS_URL without one.")
    ] = None
    redis_db: Annotated[int, Meta(ge=0, description="Redis database number.")] = 0
    redis_key_prefix: Annotated[str, Meta(description="Prefix of every key in Redis.")] = (
        "bandsync:"
    )
    redis_ttl: Annotated[
        int,
        Meta(
            ge=1,
            le=315_360_000,
            description="Lifetime of a session without members, in Redis and in memory, seconds.",
        ),
    ] = 3600
    redis_max_retries: Annotated[
        int, Meta(ge=0, description="Fast attempts to reconnect to Redis before the slow ones.")
    ] = 5
    redis_retry_delay_on_failure: Annotated[
        Milliseconds,
        Meta(description="First delay between attempts to reconnect to Redis, milliseconds."),
    ] = 100
    redis_connect_timeout: Annotated[
        Milliseconds, Meta(description="Timeout of connecting to Redis, milliseconds.")
    ] = 10000
    redis_command_timeout: Annotated[
        Milliseconds, Meta(description="Timeout of a Redis command, milliseconds.")
    ] = 5000
    redis_health_interval_ms: Annotated[
        Milliseconds, Meta(description="Interval of the Redis health checks, milliseconds.")
    ] = 500
    redis_health_timeout_ms: Annotated[
        Milliseconds, Meta(description="Timeout of a Redis health check, milliseconds.")
    ] = 1000
    redis_auto_recover: Annotated[
        bool,
        Meta(
            description="Return to Redis when it recovers; false stays in memory until a restart."
        ),
    ] = True
    redis_required: Annotated[bool, Meta(description="Refuse to start without Redis.")] = False
    redis_sentinels: Annotated[
        Text | None,
        Meta(
            description="Redis Sentinels that name the master: host:port, comma-separated. "
            "Credentials, database and TLS are those of the settings above; "
            "REDIS_HOST and REDIS_PORT are not used."
        ),
    ] = None
    redis_sentinel_master: Annotated[
        Text | None,
        Meta(description="Name of the master in the Sentinels, such as mymaster."),
    ] = None
    redis_sentinel_password: Annotated[
        Text | None, Meta(description="Password of the Sentinels themselves, if they have one.")
    ] = None
    redis_cluster: Annotated[
        bool,
        Meta(
            description="Whether Redis is a Cluster. The settings above name one node; "
            "credentials and TLS are those of all nodes."
        ),
    ] = False
    server_id: Annotated[
        Text | None,
        Meta(
            description="Name of this server, unique among servers; by default host name and port."
        ),
    ] = None
    host: Annotated[Text, Meta(description="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[
        Port, Meta(description="Port to listen on; 0 chooses a free one and prints it.")
    ] = 3001
    workers: Annotated[
        int,
        Meta(ge=1, le=256, description="Processes that share the port; more than 1 need Redis."),
    ] = 1
    worker_ports: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="First of the ports that workers also listen on, one for each worker."),
    ] = None
    tls_cert: Annotated[
        Text | None,
        Meta(description="TLS certificate chain (PEM file); with TLS_KEY serves https."),
    ] = None
    tls_key: Annotated[
        Text | None, Meta(description="Private key of the certificate (PEM file).")
    ] = None
    allowed_origins: Annotated[
        str,
        Meta(description="Other origins whose pages may connect, comma-separated; * for all."),
    ] = ""
    join_secret: Annotated[
        Text | None,
        Meta(
            description="Secret that signs join tokens (JWT, HS256); if set, joining needs a token."
        ),
    ] = None
    admin_token: Annotated[
        Text | None,
        Meta(
            description="Operator token, needed for /api/sessions; when set, "
            "also for /ops, /api/ops and /metrics."
        ),
    ] = None
    max_members: Annotated[
        int, Meta(ge=1, le=1000, description="Maximum number of members in a session.")
    ] = 8
    leadership: Annotated[
        Literal["claim", "open"],
        Meta(description="claim: the lead is free while the leader is disconnected; open: always."),
    ] = "claim"
    resume_grace_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=3_600_000,
            description="Time that a disconnected member keeps its place, milliseconds.",
        ),
    ] = 10000
    tick_interval_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=60_000,
            description="Interval of scroll_tick while a session plays, milliseconds; 0 for never.",
        ),
    ] = 100
    max_idle_sessions: Annotated[
        int,
        Meta(
            ge=0,
            description="Maximum number of empty sessions in memory; the longest idle go first.",
        ),
    ] = 10000
    max_connections: Annotated[
        Positive, Meta(description="Maximum number of connections of each worker.")
    ] = 10000
    max_message_bytes: Annotated[
        int,
        Meta(ge=1024, le=1_048_576, description="Maximum size of a message from a client, bytes."),
    ] = 16384
    ping_interval_ms: Annotated[
        Milliseconds, Meta(description="Interval of pings to each client, milliseconds.")
    ] = 5000
    connection_timeout_ms: Annotated[
        Milliseconds,
        Meta(description="Silence that disconnects a client, milliseconds; over PING_INTERVAL_MS."),
    ] = 30000
    outbox_limit_bytes: Annotated[
        int,
        Meta(
            ge=65_536,
            description="Send queue limit of a client, bytes; more disconnects it.",
        ),
    ] = 262144
    write_timeout_ms: Annotated[
        Milliseconds,
        Meta(description="Time that a write to a client may make no progress, milliseconds."),
    ] = 10000
    rate_limit_factor: Annotated[
        float, Meta(ge=0, description="Factor on the rate limits of clients; 0 lifts them.")
    ] = 1.0
    drain_timeout_ms: Annotated[
        Milliseconds, Meta(description="Time limit of a graceful shutdown, milliseconds.")
    ] = 10000
    log_format: Annotated[
        Literal["console", "json"],
        Meta(description="console for people; json for machines, one object per line."),
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Minimum log level.")
    ] = "info"


class Option(Struct, frozen=True):
    """The description of one setting, for help texts and tables.

    Attributes:
        name: name of the environment variable.
        attribute: name of the attribute of `Settings`.
        default: default value as text; empty for none.
        allowed: allowed values in words.
        meaning: help text, one or two sentences.
    """

    name: str
    attribute: str
    default: str
    allowed: str
    meaning: str


class SettingsError(Exception):
    """Settings that cannot be used.

    Attributes:
        problems: one line for each: name, value, allowed values.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# Settings whose values must not appear in an error message or a log.
SECRETS = frozenset(
    {"redis_password", "redis_sentinel_password", "redis_url", "join_secret", "admin_token"}
)

SENTINEL_PORT = 26379


def parse(texts: Mapping[str, str]) -> Settings:
    """Parse settings from texts by variable name; an empty text counts as not set.

    Raises:
        SettingsError: some texts are not usable; the error has all problems.
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
    """Problems of values that are allowed each, but not together."""
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
    """Parse `REDIS_SENTINELS` into hosts and ports.

    Raises:
        ValueError: the text is empty or malformed.
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
    """The values of a type, in words."""
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
