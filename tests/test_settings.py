"""Settings: every name, every default, every problem at once."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandsync.settings import (
    OPTIONS,
    SENTINEL_PORT,
    Settings,
    SettingsError,
    parse,
    sentinel_hosts,
)

ROOT = Path(__file__).parent.parent

# `scripts/deploy/OPERATIONS.md`, section *Settings*.
DOCUMENTED = """
REDIS_ENABLED=true REDIS_URL= REDIS_HOST=localhost REDIS_PORT=6379 REDIS_PASSWORD= REDIS_DB=0
REDIS_KEY_PREFIX=bandsync: REDIS_TTL=3600 REDIS_MAX_RETRIES=5 REDIS_RETRY_DELAY_ON_FAILURE=100
REDIS_CONNECT_TIMEOUT=10000 REDIS_COMMAND_TIMEOUT=5000 SERVER_ID= HOST=127.0.0.1 PORT=3001
REDIS_USERNAME= REDIS_HEALTH_INTERVAL_MS=500 REDIS_HEALTH_TIMEOUT_MS=1000 REDIS_AUTO_RECOVER=true
REDIS_REQUIRED=false REDIS_SENTINELS= REDIS_SENTINEL_MASTER= REDIS_SENTINEL_PASSWORD=
REDIS_CLUSTER=false
MAX_CONNECTIONS=10000 MAX_MEMBERS=8 MAX_MESSAGE_BYTES=16384 TICK_INTERVAL_MS=100
PING_INTERVAL_MS=5000 CONNECTION_TIMEOUT_MS=30000 RESUME_GRACE_MS=10000 LEADERSHIP=claim
OUTBOX_LIMIT_BYTES=262144 DRAIN_TIMEOUT_MS=10000 ALLOWED_ORIGINS= JOIN_SECRET= ADMIN_TOKEN=
TLS_CERT= TLS_KEY= LOG_FORMAT=console LOG_LEVEL=info
"""


def test_settings_have_the_documented_names_and_defaults() -> None:
    ours = {option.name: option.default for option in OPTIONS}
    documented = dict(entry.split("=", 1) for entry in DOCUMENTED.split())
    assert documented.items() <= ours.items()
    assert parse({}) == Settings()


def test_env_example_has_every_setting_with_its_default_and_meaning() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    found = {}
    for above, line in pairwise(lines):
        if "=" in line and not line.startswith("# "):
            assert above.startswith("# "), line
            name, _, value = line.lstrip("#").partition("=")
            found[name] = (value, above[2:])
    assert found == {option.name: (option.default, option.meaning) for option in OPTIONS}
    texts = {name: value for name, (value, _) in found.items()}
    assert parse(texts) == Settings()


def test_error_has_all_problems() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(
            {
                "PORT": "70000",
                "LEADERSHIP": "anarchy",
                "REDIS_ENABLED": "perhaps",
                "MAX_MEMBERS": "0",
                "RATE_LIMIT_FACTOR": "nan",
                "TLS_CERT": "cert.pem",
                "REDIS_SENTINELS": "a:1",
            }
        )
    assert caught.value.problems == [
        "REDIS_ENABLED='perhaps': must be true or false",
        "PORT='70000': must be a whole number from 0 to 65535",
        "MAX_MEMBERS='0': must be a whole number from 1 to 1000",
        "LEADERSHIP='anarchy': must be claim or open",
        "RATE_LIMIT_FACTOR='nan': must be a number, 0 or more",
        "TLS_KEY='': must name a file when TLS_CERT does",
        "REDIS_SENTINEL_MASTER='': must be set when REDIS_SENTINELS is",
    ]


@pytest.mark.parametrize(
    "texts",
    [
        {"PING_INTERVAL_MS": "5000", "CONNECTION_TIMEOUT_MS": "5000"},
        {"REDIS_REQUIRED": "true", "REDIS_ENABLED": "false"},
        {"TLS_KEY": "key.pem"},
        {"REDIS_SENTINEL_MASTER": "m"},
        {"REDIS_SENTINEL_PASSWORD": "p"},
        {"REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "m", "REDIS_CLUSTER": "true"},
        {"REDIS_SENTINELS": "a:1,", "REDIS_SENTINEL_MASTER": "m"},
        {"REDIS_SENTINELS": "a:x", "REDIS_SENTINEL_MASTER": "m"},
        {"REDIS_SENTINELS": "u:p@a:1", "REDIS_SENTINEL_MASTER": "m"},
        {"REDIS_SENTINELS": "redis://a:1", "REDIS_SENTINEL_MASTER": "m"},
        {"REDIS_CLUSTER": "true", "REDIS_DB": "1"},
        {"REDIS_CLUSTER": "true", "REDIS_KEY_PREFIX": "{app}:"},
        {"WORKERS": "2", "REDIS_ENABLED": "false"},
        {"WORKERS": "3", "WORKER_PORTS": "65534"},
        {"WORKERS": "3", "WORKER_PORTS": "3000"},
        {"WORKERS": "0"},
    ],
)
def test_contradicting_settings_are_refused(texts: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        parse(texts)


def test_sentinel_hosts_are_parsed_with_their_default_port() -> None:
    assert sentinel_hosts("a:1, b ,[::1]:3") == [("a", 1), ("b", SENTINEL_PORT), ("::1", 3)]
    settings = parse({"REDIS_SENTINELS": "a:1,b:2", "REDIS_SENTINEL_MASTER": "m"})
    assert settings.redis_sentinels == "a:1,b:2"


def test_values_are_converted_and_stripped() -> None:
    settings = parse({"REDIS_ENABLED": "FALSE", "PORT": " 0 ", "REDIS_PASSWORD": "007", "HOST": ""})
    assert (settings.redis_enabled, settings.port) == (False, 0)
    assert (settings.redis_password, settings.host) == ("007", "127.0.0.1")


@given(st.dictionaries(st.sampled_from([option.name for option in OPTIONS]), st.text(max_size=20)))
def test_any_texts_parse_or_raise_problems(texts: dict[str, str]) -> None:
    try:
        assert isinstance(parse(texts), Settings)
    except SettingsError as error:
        assert error.problems


def test_error_does_not_show_secrets() -> None:
    with pytest.raises(SettingsError) as caught:
        parse({"REDIS_URL": "redis://:hush@h", "PORT": "x", "ADMIN_TOKEN": "hush"})
    assert "hush" not in str(caught.value)
