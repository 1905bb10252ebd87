"""Accessibility checks of pages, where axe-core is installed."""

import os
from typing import TYPE_CHECKING

import pytest

from scripts.testbed.browsers import INSTALL_AXE, accessibility_violations, find_axe

if TYPE_CHECKING:
    from playwright.sync_api import Page


def violations(page: "Page") -> list[str]:
    """The violations that axe-core finds. Without axe-core: skips, or fails in a full run."""
    script = find_axe()
    if script is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(INSTALL_AXE)
        pytest.skip(INSTALL_AXE)
    return accessibility_violations(page, script)
