"""README.md: its length, its files, its commands and its examples."""

import re
import sys
from pathlib import Path
from select import select
from subprocess import PIPE, Popen

import pytest
from websockets.sync.client import connect

from scripts.testbed.browsers import BrowserPages
from tests.support.servers import PATIENCE_S
from tests.support.stage_pages import Start

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next heading."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README)
    assert found is not None, title
    return found[1]


def example(title: str, language: str) -> str:
    found = re.search(rf"(?ms)^```{language}\n(.*?)^```", section(title))
    assert found is not None, title
    return found[1]


def test_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


def test_files_in_the_readme_exist() -> None:
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= set(re.findall(r'src="([\w./-]+)"', README))
    named |= set(re.findall(r"(?:python|pytest) ((?:scripts|tests)/\w+\.py)", README))
    for module in re.findall(r"python -m (scripts[\w.]*)", README):
        path = Path(*module.split("."))
        named.add(str(path if (ROOT / path).is_dir() else path.with_suffix(".py")))
    assert len(named) > 12
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_javascript_example_runs(open_page: BrowserPages, start_process: Start) -> None:
    server = start_process()
    # A document of the server's origin, without the page's policy. It has no icon.
    page = open_page(bypass_csp=True, tolerate=re.compile("404.*favicon"))
    page.goto(f"{server.url}/api/health")
    page.set_content(example("JavaScript", "html"))
    page.wait_for_function("() => / ±[0-9.]+ ms$/.test(document.getElementById('beat').value)")
    first = page.evaluate("() => document.getElementById('beat').value.split(' ±')[0]")
    page.wait_for_function(
        "(first) => document.getElementById('beat').value.split(' ±')[0] !== first", arg=first
    )


def test_python_example_runs(start_process: Start, tmp_path: Path) -> None:
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
                assert process.poll() is None, "the example ended"
            assert process.stdout is not None
            # The example opens its event stream shortly after the join: send until it prints.
            for _ in range(100):
                leader.send('{"type": "set_tempo", "tempoBpm": 96}')
                if select([process.stdout], [], [], 0.2)[0]:
                    break
            else:
                pytest.fail("the example printed nothing")
            assert process.stdout.readline() == "96.0 BPM from beat 0.0 on\n"
        finally:
            process.kill()
