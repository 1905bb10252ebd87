"""The pages and their assets: everything in ``bandsync/web``, served under flat names."""

import gzip
import hashlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from msgspec import Struct

from bandsync.wire.http_messages import HttpRequest, HttpResponse

_CONTENT_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "webmanifest": "application/manifest+json",
}
# Types that are not compressed already.
_COMPRESSED = frozenset({"html", "css", "js", "svg", "webmanifest"})
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    ("Content-Security-Policy", _CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    # Revalidate on each load: an updated server must not meet an old page.
    ("Cache-Control", "no-cache"),
    ("Vary", "Accept-Encoding"),
)


class _File(Struct, frozen=True):
    body: bytes
    zipped: bytes | None
    content_type: str
    tag: str


class Pages:
    """Answers requests for the files, which are read once, at construction.

    The folders below ``root`` order the sources; in URLs they do not appear.

    Args:
        root: the folder with the files; None for those of the package.

    Raises:
        ValueError: two files have one name, so one URL would name both.
    """

    def __init__(self, root: Traversable | None = None) -> None:
        root = root or resources.files("bandsync").joinpath("web")
        self._files: dict[str, _File] = {}
        for entry in _walk(root):
            if entry.name.rpartition(".")[2] not in _CONTENT_TYPES:
                continue
            if entry.name in self._files:
                raise ValueError(f"two files named {entry.name!r} below {root}")
            self._files[entry.name] = _file(entry.name, entry.read_bytes())

    def answer(self, request: HttpRequest) -> HttpResponse | None:
        """The file that the path names, the stage for ``/``; None if there is no such file.

        HTML documents other than the stage have routes of their own: see `page`.
        """
        name = request.path.removeprefix("/") or "index.html"
        if name not in self._files or (name.endswith(".html") and name != "index.html"):
            return None
        return self.page(request, name)

    def page(self, request: HttpRequest, name: str) -> HttpResponse:
        """The file ``name``, compressed if the client accepts that; 304 if it has it already."""
        file = self._files[name]
        headers: tuple[tuple[str, str], ...] = (*_HEADERS, ("ETag", file.tag))
        if file.tag in _listed(request, "if-none-match"):
            return HttpResponse(304, b"", file.content_type, headers)
        if file.zipped is not None and "gzip" in _listed(request, "accept-encoding"):
            headers = (*headers, ("Content-Encoding", "gzip"))
            return HttpResponse(200, file.zipped, file.content_type, headers)
        return HttpResponse(200, file.body, file.content_type, headers)


def _walk(folder: Traversable) -> Iterator[Traversable]:
    """All files below ``folder``."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _file(name: str, body: bytes) -> _File:
    suffix = name.rpartition(".")[2]
    return _File(
        body,
        gzip.compress(body, mtime=0) if suffix in _COMPRESSED else None,
        _CONTENT_TYPES[suffix],
        # Weak: one tag for both encodings (RFC 9110 section 8.8.3).
        f'W/"{hashlib.sha256(body).hexdigest()[:16]}"',
    )


def _listed(request: HttpRequest, header: str) -> list[str]:
    """The items of a comma-separated header, without those with weight 0 (``q=0``)."""
    items = (item.partition(";") for item in request.headers.get(header, "").split(","))
    return [
        name.strip() for name, _, weight in items if weight.replace(" ", "") not in {"q=0", "q=0.0"}
    ]
