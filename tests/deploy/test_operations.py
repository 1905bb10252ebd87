"""OPERATIONS.md: its tables match the settings and the metrics."""

import re
from pathlib import Path

import httpx

from bandsync.settings import OPTIONS
from tests.support.servers import Server

DEPLOY = Path(__file__).parents[2] / "scripts" / "deploy"
OPERATIONS = (DEPLOY / "OPERATIONS.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next heading."""
    found = re.search(rf"(?ms)^## {re.escape(title)}\n(.*?)(?=^## |\Z)", OPERATIONS)
    assert found is not None, title
    return found[1]


def test_table_has_every_setting_with_its_default() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (?:`(.*?)`)? ?\| (.*) \|$", section("Settings"))
    assert rows == [(each.name, each.default or "", each.meaning) for each in OPTIONS]


async def test_metrics_in_the_alerts_exist(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        exposition = (await client.get("/metrics")).text
    named = set(re.findall(r"`(bandsync_\w+)", section("Alerts")))
    assert len(named) > 5
    # The clock error exists only with Redis.
    for name in named - {"bandsync_clock_error_seconds"}:
        assert f"# TYPE {name}" in exposition.replace("_total", "") or name in exposition, name
