"""URLs of Redis, and the secrets in them."""

import re

import pytest

from bandsync.redis_link.redis_address import RedisAddress, TLSOptions, parse_address


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
def test_url_is_parsed(url: str, address: RedisAddress, text: str) -> None:
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
def test_error_of_a_bad_url_has_no_secret(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(must|has) ") as raised:
        parse_address(url)
    assert not re.search("secret|ret@|sec", str(raised.value).replace("security", ""))
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_tls_options_hide_their_secret() -> None:
    assert "secret" not in repr(TLSOptions(key_password="secret"))
