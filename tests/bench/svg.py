"""Checks of the picture of a load."""

import re
from xml.etree import ElementTree

from scripts.bench.plot import PANELS


def expect_picture(text: str) -> None:
    """Check that the picture has all panels and curves."""
    svg = ElementTree.fromstring(text)  # noqa: S314  # our own
    space = "{http://www.w3.org/2000/svg}"
    lines = {path.get("id"): path for path in svg.iter(f"{space}path") if path.get("id")}
    texts = " ".join(node.text or "" for node in svg.iter(f"{space}text"))
    for panel in PANELS:
        assert f"{panel.title} ({panel.axis})" in texts
        for curve in panel.curves:
            assert curve.name in texts
            title = lines[curve.column].find(f"{space}title")
            assert title is not None
            assert title.text == curve.name
            assert re.fullmatch(
                r"M[\d.]+ [\d.]+( [ML][\d.]+ [\d.]+)*", lines[curve.column].get("d")
            )
    assert "since the first client" in texts
    assert "prefers-color-scheme: dark" in text
