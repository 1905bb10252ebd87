"""The README's tables name what exists, and its examples run."""

import re
import sys
from pathlib import Path
from select import select
from subprocess import PIPE, Popen

import httpx
import pytest
from websockets.sync.client import connect

from bandsync.settings import OPTIONS
from scripts.testbed.browsers import Pages
from tests.support.servers import PATIENCE_S, Server
from tests.web.test_stage import Start

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """What stands under a heading, until the next one."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README)
    assert found is not None, title
    return found[1]


def example(title: str, language: str) -> str:
    found = re.search(rf"(?ms)^```{language}\n(.*?)^```", section(title))
    assert found is not None, title
    return found[1]


def test_every_setting_is_listed() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (?:`(.*?)`)? ?\| (.*) \|$", section("Settings"))
    assert rows == [(each.name, each.default or "", each.meaning) for each in OPTIONS]


async def test_metrics_to_alert_on_exist(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        exposition = (await client.get("/metrics")).text
    named = set(re.findall(r"`(bandsync_\w+)", section("Alerts")))
    assert len(named) > 5
    # Those of Redis are there once it is.
    for name in named - {"bandsync_clock_error_seconds"}:
        assert f"# TYPE {name}" in exposition.replace("_total", "") or name in exposition, name


def test_files_that_it_names_exist() -> None:
    promises = section("What the first document promised")
    named = set(
        re.findall(r"`((?:scripts|tests|storage|redis_link|ops)/[\w./]*|[\w]+\.py)", promises)
    )
    named |= set(re.findall(r"(?:python|pytest) ((?:scripts|tests)/\w+\.py)", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= set(re.findall(r'src="([\w./-]+)"', README))
    assert len(named) > 20
    missing = [
        name
        for name in named
        if name and not ((ROOT / name).exists() or (ROOT / "bandsync" / name).exists())
    ]
    assert missing == []


def test_the_javascript_example_runs(open_page: Pages, start_process: Start) -> None:
    server = start_process()
    # Of the server's origin, but not its page; and such a document has no icon.
    page = open_page(bypass_csp=True, tolerate=re.compile("404.*favicon"))
    page.goto(f"{server.url}/api/health")
    page.set_content(example("JavaScript", "html"))
    page.wait_for_function("() => / ±[0-9.]+ ms$/.test(document.getElementById('beat').value)")
    first = page.evaluate("() => document.getElementById('beat').value.split(' ±')[0]")
    page.wait_for_function(
        "(first) => document.getElementById('beat').value.split(' ±')[0] !== first", arg=first
    )


def test_the_python_example_runs(start_process: Start, tmp_path: Path) -> None:
    server = start_process()
    script = tmp_path / "lights.py"
    script.write_text(example("Python", "python").replace("ws://127.0.0.1:3001", server.ws_url))
    with (
        connect(f"{server.ws_url}/ws/our-song") as leader,
        Popen([sys.executable, "-u", script], stdout=PIPE, text=True) as process,
    ):
        leader.send('{"type": "join_session"}')
        try:
            while '"user_joined"' not in leader.recv(PATIENCE_S):
                pass
            assert process.stdout is not None
            # It hears what comes after it has begun to listen, which is a little after it joined.
            for _ in range(100):
                leader.send('{"type": "set_tempo", "tempoBpm": 96}')
                if select([process.stdout], [], [], 0.2)[0]:
                    break
            else:
                pytest.fail("it said nothing")
            assert process.stdout.readline() == "96.0 BPM from beat 0.0 on\n"
        finally:
            process.kill()
