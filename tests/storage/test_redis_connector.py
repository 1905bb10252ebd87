"""From settings to connections: which settings go together, and what is shown of them."""

from typing import Any

import pytest

from bandsync.redis_link.cluster.link import ClusterLink
from bandsync.redis_link.link import Link
from bandsync.redis_link.sentinel import MasterLink
from bandsync.settings import Settings
from bandsync.storage.redis_connector import RedisConnector

SENTINELS = {"redis_sentinels": "a:1,b:2", "redis_sentinel_master": "band"}


def access(**settings: Any) -> RedisConnector:
    return RedisConnector(Settings(**settings), "stage")


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"redis_host": "h", "redis_db": 3}, Link, "redis://h:6379/3"),
        (
            {"redis_url": "redis://:hush@h", **SENTINELS},
            MasterLink,
            "the master 'band' of the Sentinels a:1, b:2",
        ),
        (
            {"redis_url": "rediss://u:hush@h:7", "redis_cluster": True},
            ClusterLink,
            "rediss://h:7/0, a Cluster",
        ),
    ],
)
def test_each_kind_of_redis_has_its_link(settings: dict[str, Any], kind: type, text: str) -> None:
    made = access(**settings)
    assert str(made) == text
    assert type(made.link()) is kind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"redis_url": "unix:///run/redis", "redis_cluster": True}, "REDIS_CLUSTER"),
        ({"redis_url": "unix:///run/redis", **SENTINELS}, "REDIS_SENTINELS"),
        ({"redis_url": "redis://:hush@h/2", "redis_cluster": True}, "database"),
    ],
)
def test_contradictory_url_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        access(**settings)
    assert "hush" not in str(caught.value)
