"""The files of the pages, as browsers ask for them."""

import gzip
import re
from pathlib import Path

import httpx
import pytest

from bandsync.ops.pages import Pages
from bandsync.wire.http_messages import HttpRequest, HttpResponse
from tests.support.servers import Server
from tests.support.web_files import WEB_FILES


def ask(path: str, **headers: str) -> HttpResponse | None:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Pages().answer(HttpRequest("GET", path, headers=named))


def found(path: str, **headers: str) -> HttpResponse:
    answer = ask(path, **headers)
    assert answer is not None, path
    return answer


def header(answer: HttpResponse, name: str) -> str | None:
    return dict(answer.headers).get(name)


def test_root_serves_the_stage() -> None:
    assert found("/").body == WEB_FILES["index.html"].read_bytes()
    assert found("/").content_type == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    "path", ["/index.htm", "/../app.py", "/web/index.html", "/ops.html", "/stage/stage.js", "//"]
)
def test_nothing_else_is_served(path: str) -> None:
    assert ask(path) is None


def test_every_file_has_a_type_and_a_strict_policy() -> None:
    names = [name for name in WEB_FILES if not name.endswith(".html")]
    assert "bandsync.js" in names
    for name in names:
        policy = header(found(f"/{name}"), "Content-Security-Policy")
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert header(found(f"/{name}"), "X-Content-Type-Options") == "nosniff"


def test_files_are_compressed_when_accepted() -> None:
    plain = found("/stage.js")
    zipped = found("/stage.js", accept_encoding="br, gzip")
    assert header(plain, "Content-Encoding") is None
    assert header(zipped, "Content-Encoding") == "gzip"
    assert gzip.decompress(zipped.body) == plain.body
    assert len(zipped.body) < len(plain.body) / 2
    assert header(plain, "Vary") == "Accept-Encoding"
    refused = found("/stage.js", accept_encoding="gzip;q=0, deflate")
    assert header(refused, "Content-Encoding") is None
    # A picture does not get smaller.
    assert header(found("/icon-192.png", accept_encoding="gzip"), "Content-Encoding") is None


async def test_unchanged_file_is_304(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.serving.url) as client:
        first = await client.get("/stage.css")
        tag = first.headers["etag"]
        again = await client.get("/stage.css", headers={"If-None-Match": f'"other", {tag}'})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == tag
        # The connection is in step after an answer without a body.
        other = await client.get("/stage.css", headers={"If-None-Match": '"other"'})
        assert other.status_code == 200
        assert other.content == first.content


def test_pages_ask_for_nothing_from_elsewhere() -> None:
    """No address of another host in any file, but for names of formats."""
    formats = {"http://www.w3.org/2000/svg"}
    for entry in WEB_FILES.values():
        if entry.name.endswith((".html", ".css", ".js", ".svg", ".webmanifest")):
            markup = re.sub(r"(?m)^\s*(//|\*|/\*).*$", "", entry.read_text())
            addresses = set(re.findall(r"\b(?:https?|wss?)://[\w.]+[\w/.-]*", markup))
            assert addresses <= formats, entry.name


def test_the_kept_page_is_the_whole_page() -> None:
    """The kept files are those that `/` names and those files import: all of them, no more."""
    written = re.search(r"(?m)^const NAMED = /(.+)/g;$", WEB_FILES["sw.js"].read_text())
    assert written is not None
    named = re.compile(written[1].replace(r"\/", "/"))
    kept: set[str] = set()
    waiting = ["index.html"]
    while waiting:
        name = waiting.pop()
        kept.add(name)
        if name.endswith(".png"):
            continue
        found = {"".join(each)[1:] for each in named.findall(WEB_FILES[name].read_text())}
        waiting += found - kept
    assert kept <= set(WEB_FILES)
    used = set(WEB_FILES) - {"sw.js", "icon-512.png"}
    assert kept == {name for name in used if not name.startswith("ops")}


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("stage", "ops"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.js").write_text("")
    with pytest.raises(ValueError, match=r"two files named 'words\.js'"):
        Pages(tmp_path)
