"""A page with a `BandSync`, and what it saw, for tests of `bandsync/web/client/bandsync.js`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.testbed.browsers import LOST_CONNECTIONS, BrowserPages, evaluate

if TYPE_CHECKING:
    from playwright.sync_api import Page

WEB = Path(__file__).parents[2] / "bandsync" / "web"
# The origin of the pages; no server need listen there.
ORIGIN = "http://127.0.0.1:8000"

# Also notes what happens: [type, detail] in `seen`.
CREATE = """async (options) => {
    const module = await import("/bandsync.js");
    globalThis.bandsync = module;
    globalThis.band = new module.BandSync({ sessionId: "song", ...options });
    globalThis.seen = [];
    const types = ["status", "joined", "gap", "play", "seek", "tempo_changed", "chat_message",
        "role_changed", "leader_requested", "leader_denied", "message_updated", "snapshot",
        "user_joined", "user_left", "storage_status", "server_draining", "room_stats"];
    for (const type of types) {
        band.addEventListener(type, ({ detail }) => seen.push([type, detail]));
    }
    globalThis.changes = 0;
    band.addEventListener("change", () => { changes += 1; });
    // A refusal as a value.
    globalThis.refusal = (promise) => promise.then(
        () => null,
        ({ name, code, context, closeCode }) => ({ name, code, context, closeCode }),
    );
}"""
JOIN = "() => band.join()"


def open_band(open_page: BrowserPages, url: str, **options: object) -> "Page":
    """A page with a `band` that has not joined yet."""
    page = open_page.blank(ORIGIN, *WEB.rglob("*.js"), tolerate=LOST_CONNECTIONS)
    evaluate(page, CREATE, {"url": url, **options})
    return page


def join(open_page: BrowserPages, url: str, **options: object) -> "Page":
    """A page with a `band` that has joined the session "song"."""
    page = open_band(open_page, url, **options)
    evaluate(page, JOIN)
    return page


def until(page: "Page", expression: str) -> None:
    """Wait until it is true."""
    page.wait_for_function(expression)


def details(page: "Page", type_: str) -> list[dict[str, Any]]:
    """The details of all events of this type so far."""
    return [detail for kind, detail in page.evaluate("seen") if kind == type_]


def statuses(page: "Page") -> list[str]:
    """That it had, one after the other."""
    found: list[str] = []
    for detail in details(page, "status"):
        if found[-1:] != [detail["status"]]:
            found.append(detail["status"])
    return found
