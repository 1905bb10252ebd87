"""The lead on the stage: requested, denied, handed over, taken, and left behind."""

from typing import TYPE_CHECKING

import pytest

from scripts.testbed.browsers import BrowserPages
from scripts.testbed.server_process import ServerProcess

if TYPE_CHECKING:
    pass
from tests.support.stage_pages import Start, open_stage, shows


def test_the_lead_is_asked_for_refused_and_handed_over(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    bob.get_by_role("button", name="Ask for the lead").click()
    shows(bob, "#news", "You asked for the lead.")
    ann.get_by_role("button", name="Not now").click()
    shows(bob, "#news", "Ann keeps the lead for now.")
    ann.locator("#requests p").wait_for(state="detached")

    bob.get_by_role("button", name="Ask for the lead").click()
    ann.locator("#requests").get_by_role("button", name="Hand over").click()
    shows(bob, "#news", "You were given the lead.")
    shows(ann, "#reason", "Only Bob, who leads, can use these.")
    assert bob.locator("#play").is_enabled()
    assert ann.locator("#play").is_disabled()
    # Back, from the list of members; then by giving it up.
    bob.get_by_role("button", name="Hand over the lead to Ann").click()
    shows(ann, "#reason", "You lead: the band follows.")
    ann.get_by_role("button", name="Give up the lead").click()
    shows(bob, "#reason", "You lead: the band follows.")


@pytest.mark.slow
def test_the_lead_can_be_taken_where_it_is_open(
    open_page: BrowserPages, start_process: Start
) -> None:
    server = start_process(LEADERSHIP="open")
    ann = open_stage(open_page, server, "Ann")
    bob = open_stage(open_page, server, "Bob")
    bob.get_by_role("button", name="Take the lead").click()
    shows(bob, "#reason", "You lead: the band follows.")
    shows(ann, "#news", "Bob took the lead.")


@pytest.mark.slow
def test_lead_of_a_present_leader_cannot_be_taken(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    bob.get_by_role("button", name="Take the lead").click()
    shows(bob, "#news", "Somebody leads: ask for the lead.")


@pytest.mark.slow
def test_the_lead_of_somebody_away_is_free(
    open_page: BrowserPages, server_process: ServerProcess
) -> None:
    ann = open_stage(open_page, server_process, "Ann")
    bob = open_stage(open_page, server_process, "Bob")
    shows(ann, "#bandTitle", "Band (2)")
    ann.close()
    shows(bob, "#reason", "Ann leads, and is away.")
    bob.get_by_role("button", name="Lead now").click()
    shows(bob, "#reason", "You lead: the band follows.")
