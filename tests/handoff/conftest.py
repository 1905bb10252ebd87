"""Fixtures of the handoff tests."""

import os

import pytest


@pytest.fixture
def group() -> str:
    """The name of a worker group that no other test has."""
    return f"test-{os.getpid()}-{os.urandom(4).hex()}"
