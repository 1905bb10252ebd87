"""The two compose configurations, read once for a module."""

import pytest

from tests.support.deployments import composed
from tests.support.servers import Message


@pytest.fixture(scope="module")
def compose() -> Message:
    return composed("compose.yaml")


@pytest.fixture(scope="module")
def compose_haproxy() -> Message:
    return composed("compose.yaml", "compose.haproxy.yaml")
