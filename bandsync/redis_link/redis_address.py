"""The address and credentials of a Redis, in redis-py's URL grammar without what a link lacks."""

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import msgspec
from redis.connection import parse_url

# redis-py does not annotate it.
_parse_url = cast("Callable[[str], dict[str, Any]]", parse_url)

_CONNECTION_OPTIONS = frozenset({"host", "port", "path", "username", "password", "db"})
_TLS_OPTIONS = {
    "ssl_cert_reqs": "cert_reqs",
    "ssl_check_hostname": "check_hostname",
    "ssl_ca_certs": "ca_certs",
    "ssl_ca_path": "ca_path",
    "ssl_certfile": "certfile",
    "ssl_keyfile": "keyfile",
    "ssl_password": "key_password",
}
_QUERY_OPTIONS = ["username", "password", "db", *_TLS_OPTIONS]
_VERIFY_MODES = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}


class TLSOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to verify a ``rediss://`` server, and the client certificate for it.

    Attributes:
        cert_reqs: whether the server must have a valid certificate; "none" accepts any.
        check_hostname: whether the certificate must name the host.
        ca_certs: file of trusted certificates, instead of the system's.
        ca_path: directory of trusted certificates.
        certfile: client certificate, for servers that require one.
        keyfile: private key of the client certificate, unless ``certfile`` contains it.
        key_password: password of the private key.
    """

    cert_reqs: Literal["none", "optional", "required"] = "required"
    check_hostname: bool = True
    ca_certs: str | None = None
    ca_path: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    key_password: str | None = None

    def __repr__(self) -> str:
        return f"TLSOptions(cert_reqs={self.cert_reqs!r})"

    def context(self) -> ssl.SSLContext:
        """The SSL context. Reads files, so run it in a thread.

        Raises:
            OSError: a file cannot be read or has the wrong content; `ssl.SSLError` is an OSError.
        """
        context = ssl.create_default_context(cafile=self.ca_certs, capath=self.ca_path)
        context.check_hostname = self.check_hostname and self.cert_reqs != "none"
        context.verify_mode = _VERIFY_MODES[self.cert_reqs]
        if self.certfile is not None:
            # A function: without one OpenSSL would prompt for a missing password on the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, lambda: self.key_password or "")
        return context


class RedisAddress(msgspec.Struct, frozen=True):
    """A Redis server, a database and credentials. As a text it contains no secret.

    Attributes:
        host: name or IP address.
        port: TCP port.
        path: path of a Unix socket, which replaces host and port.
        username: ACL user; None for the default user.
        password: password of the user; None if none is required.
        db: number of the database.
        tls: TLS options; None for a plain connection.
    """

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: TLSOptions | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.db}"
        scheme = "redis" if self.tls is None else "rediss"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{self.db}"

    __repr__ = __str__


def parse_address(url: str) -> RedisAddress:
    """Read a ``redis://``, ``rediss://`` or ``unix://`` URL in redis-py's grammar.

    Raises:
        ValueError: it is no such URL. The text quotes nothing of it: it may contain a password.
    """
    try:
        options = _parse_url(url)
        path, fragment = urlsplit(url).path, urlsplit(url).fragment
    except ValueError:
        # redis-py quotes the URL, and thereby a password that was not encoded.
        raise ValueError(
            "must be redis://user:password@host:port/db, rediss://… or unix://path, with special "
            "characters of the password percent-encoded"
        ) from None
    options.pop("connection_class", None)
    if fragment:
        raise ValueError("must not contain a '#': encode it as %23")
    # A port in the query arrives as a text. It is no valid option either.
    if not set(options) <= {*_CONNECTION_OPTIONS, *_TLS_OPTIONS} or isinstance(
        options.get("port"), str
    ):
        raise ValueError("has an unknown option; known are " + ", ".join(_QUERY_OPTIONS))
    if url.startswith("unix:"):
        if "path" not in options:
            raise ValueError("must name the path of the socket after unix://")
    elif "db" not in options and path.strip("/"):
        raise ValueError("must have a number after the last slash, the database")
    if options.get("db", 0) < 0:
        raise ValueError("must not have a negative database number")
    tls_options = {_TLS_OPTIONS[name]: options.pop(name) for name in set(options) & {*_TLS_OPTIONS}}
    return RedisAddress(**options, tls=_tls(tls_options, wanted=url.startswith("rediss:")))


def _tls(options: Mapping[str, Any], *, wanted: bool) -> TLSOptions | None:
    if not wanted:
        if options:
            raise ValueError("has TLS options: they need rediss://")
        return None
    try:
        return msgspec.convert(options, TLSOptions)
    except msgspec.ValidationError:
        raise ValueError(
            "has a TLS option without meaning: ssl_cert_reqs is none, optional or required, "
            "ssl_check_hostname true or false"
        ) from None
