"""The picture of a load."""

import re
from xml.etree import ElementTree

from scripts.bench.plot import PANELS, picture
from tests.bench.svg import expect_picture


def test_picture_has_all_curves() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    measured = [
        {"t": second + 1.0, "phase": "play", **dict.fromkeys(columns, 1.0 + second % 7)}
        for second in range(3000)
    ]
    measured[5]["tickP99Ms"] = None
    expect_picture(picture(measured, "Load: 2 < 3 bands & more", "80 % of a core"))


def test_curve_has_a_gap_where_nothing_was_measured() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    measured = [
        {"t": second + 1.0, "phase": "play", **dict.fromkeys(columns, 1.0)} for second in range(9)
    ]
    measured[4]["memoryMb"] = None
    svg = picture(measured, "Load", "")
    line = re.search(r'id="memoryMb" d="([^"]*)"', svg)
    other = re.search(r'id="serverCpu" d="([^"]*)"', svg)
    assert line is not None
    assert other is not None
    assert (line[1].count("M"), line[1].count("L")) == (2, 6)
    assert (other[1].count("M"), other[1].count("L")) == (1, 8)


def test_picture_without_rows_is_valid() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    nothing = {"t": 1.0, "phase": "play", **dict.fromkeys(columns)}
    for each in ([], [nothing], [nothing | dict.fromkeys(columns, 0)]):
        assert ElementTree.fromstring(picture(each, "Soak", "")) is not None  # noqa: S314  # our own
