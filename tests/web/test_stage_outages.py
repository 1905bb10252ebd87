"""The stage while the network, the server or Redis is away: the beat goes on."""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jwt
import pytest

from scripts.testbed.browsers import LOST_CONNECTIONS, BrowserPages
from scripts.testbed.network import Network
from scripts.testbed.redis_server import RedisServer
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    pass
from tests.support.stage_pages import (
    PHONE,
    WATCH_BEATS,
    Start,
    assert_in_step,
    enter,
    open_stage,
    shows,
    until,
    wait_for_beats,
)


@pytest.mark.slow
def test_stage_resumes_after_a_lost_network(
    open_page: BrowserPages, server_process: ServerProcess, network_to: Callable[[int], Network]
) -> None:
    network = network_to(server_process.port)
    ann = enter(open_page(f"{network.url}/#song", tolerate=LOST_CONNECTIONS), "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_role("button", name="Play").click()
    shows(ann, "#state", "playing")
    ann.evaluate(WATCH_BEATS)
    network.cut()
    shows(ann, "#banner", re.compile("^Connection lost"))
    assert ann.locator("#play").is_disabled()
    wait_for_beats(ann, 4)
    network.heal()
    shows(ann, "#status", "connected")
    shows(ann, "#banner", "")
    shows(ann, "#reason", "You lead: the band follows.")
    shows(bob, "#bandTitle", "Band (2)")
    assert_in_step(wait_for_beats(ann, 8))


@pytest.mark.slow
def test_redis_dies_and_no_beat_is_missed(
    open_page: BrowserPages, redis_server_process: ServerProcess, redis_server: RedisServer
) -> None:
    ann = open_stage(open_page, redis_server_process, "Ann")
    bob = open_stage(open_page, redis_server_process, "Bob")
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_label("BPM", exact=True).fill("240")
    ann.get_by_label("BPM", exact=True).press("Enter")
    ann.get_by_role("button", name="Play").click()
    for page in (ann, bob):
        shows(page, "#state", "playing")
        page.evaluate(WATCH_BEATS)
        wait_for_beats(page, 4)
    redis_server.kill()
    for page in (ann, bob):
        shows(page, "#banner", re.compile("^The server lost its storage.* nothing is lost"))
        wait_for_beats(page, 8)
    ann.get_by_label("Message to the band").fill("Still here")
    ann.get_by_role("button", name="Show").click()
    shows(bob, "#headline", "Still here")
    redis_server.start()
    for page in (ann, bob):
        shows(page, "#banner", "")
        before = page.evaluate("() => window.beats.length")
        assert_in_step(wait_for_beats(page, before + 8))
    shows(bob, "#headline", "Still here")


@pytest.mark.slow
def test_the_server_is_restarted(
    open_page: BrowserPages, redis_server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, redis_server_process, "Ann", tolerate=LOST_CONNECTIONS)
    bob = open_stage(open_page, redis_server_process, "Bob", tolerate=LOST_CONNECTIONS)
    ann.get_by_label("Count-in").select_option("0")
    ann.get_by_role("button", name="Play").click()
    shows(bob, "#state", "playing")
    bob.evaluate(WATCH_BEATS)
    redis_server_process.stop()
    shows(ann, "#banner", re.compile("coming back by itself|comes back by itself"))
    wait_for_beats(bob, 3)
    redis_server_process.start()
    for page in (ann, bob):
        shows(page, "#status", "connected")
    shows(ann, "#reason", "You lead: the band follows.")
    shows(bob, "#reason", "Only Ann, who leads, can use these.")
    shows(bob, "#bandTitle", "Band (2)")
    assert_in_step(wait_for_beats(bob, 6))


def test_reload_resumes_the_same_member(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    ann.reload()
    shows(ann, "#reason", "You lead: the band follows.")
    shows(ann, "#bandTitle", "Band (2)")
    shows(bob, "#bandTitle", "Band (2)")
    # Leaving is for good.
    ann.get_by_role("button", name="Leave the session").click()
    assert ann.locator("#join").is_visible()
    shows(bob, "#news", re.compile("Ann left|You took over the lead"))
    ann.reload()
    assert ann.locator("#join").is_visible()
    assert ann.get_by_label("Your name").input_value() == "Ann"


@pytest.mark.slow
def test_duplicated_tab_takes_over_the_membership(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    seat = ann.evaluate("() => sessionStorage.getItem('bandsync.seat')")
    other = open_page()
    other.add_init_script(f"sessionStorage.setItem('bandsync.seat', {seat!r})")
    other.goto(f"{server_process.url}/#song")
    shows(other, "#reason", "You lead: the band follows.")
    shows(ann, "#problem", re.compile("another tab"))
    assert ann.locator("#join").is_visible()


@pytest.mark.slow
def test_controls_do_not_move_during_requests_and_outages(
    open_page: BrowserPages, redis_server_process: ServerProcess, redis_server: RedisServer
) -> None:
    """Requests for the lead and storage news leave the controls in place."""
    ann = open_stage(open_page, redis_server_process, "Ann", **PHONE)
    bob = open_stage(open_page, redis_server_process, "Bob", **PHONE)
    shows(ann, "#bandTitle", "Band (2)")
    before = ann.locator("#slower").bounding_box()
    bob.get_by_role("button", name="Ask for the lead").click()
    ann.locator("#requests p").wait_for()
    assert ann.locator("#slower").bounding_box() == before
    redis_server.kill()
    shows(ann, "#banner", re.compile("^The server lost"))
    assert ann.locator("#slower").bounding_box() == before
    ann.get_by_role("button", name="Not now").click()
    shows(bob, "#news", "Ann keeps the lead for now.")


@pytest.mark.slow
def test_banner_names_the_members_out_of_reach_during_an_outage(
    open_page: BrowserPages, redis_server: RedisServer, start_process: Start
) -> None:
    ours, theirs = (
        start_process(REDIS_ENABLED="true", REDIS_URL=redis_server.url(), SERVER_ID=name)
        for name in ("left", "right")
    )
    ann = open_stage(open_page, ours, "Ann")
    bob = open_stage(open_page, theirs, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    redis_server.kill()
    for page in (ann, bob):
        shows(page, "#banner", re.compile("members on other servers are out of reach"))
    # A member who joins during the outage sees the banner too.
    cid = open_stage(open_page, ours, "Cid")
    shows(cid, "#banner", re.compile("^The server lost its storage"))


@pytest.mark.slow
def test_join_waits_for_an_absent_server_until_cancelled(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    # There is nobody to give the worker that keeps the page, either.
    page = open_page(
        f"{server_process.url}/#song", tolerate=LOST_CONNECTIONS, service_workers="block"
    )
    server_process.kill()
    page.get_by_role("button", name="Join").click()
    shows(page, "#banner", re.compile("does not answer yet"))
    page.get_by_role("button", name="Cancel").click()
    assert page.locator("#join").is_visible()
    shows(page, "#banner", "")
    page.get_by_role("button", name="Join").click()
    server_process.start()
    shows(page, "#status", "connected")


@pytest.mark.slow
def test_expired_pass_still_resumes(
    open_page: BrowserPages, start_process: Start, network_to: Callable[[int], Network]
) -> None:
    secret = "0123456789abcdef0123456789abcdef"
    server = start_process(JOIN_SECRET=secret)
    network = network_to(server.port)
    expires = time.time_ns() / 1e9 + 5
    token = jwt.encode({"sub": "ann", "session": "song", "exp": expires}, secret)
    ann = open_page(f"{network.url}/#song&pass={token}", tolerate=LOST_CONNECTIONS)
    enter(ann, "Ann")
    until(ann, f"() => Date.now() > {expires * 1000 + 100}")
    ann.evaluate(
        """() => new MutationObserver(() => { window.away = true; })
          .observe(document.getElementById("status"), { childList: true, subtree: true })"""
    )
    network.reset()
    until(ann, "() => window.away")
    shows(ann, "#status", "connected")
    shows(ann, "#reason", "You lead: the band follows.")
