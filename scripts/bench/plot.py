"""The rows of a load as one SVG document, readable on light and on dark pages."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.etree import ElementTree as Xml

from scripts.bench.documents import LoadRow, figure
from scripts.bench.trend import merged

_WIDTH = 960
_LEFT = 84
_RIGHT = 20
_HEAD = 64
_PANEL = 132
_GAP = 52
_FOOT = 44
_POINTS = 480
_TICKS = 4
_MINUTES_FROM_S = 180.0
_LEAST_LOG_MS = 0.1

_STYLE = """
  svg { --paper: #ffffff; --ink: #1f2937; --soft: #4b5563; --grid: #d1d5db;
        --a: #1d4ed8; --b: #b45309; --c: #15803d; --d: #a21caf; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #111827; --ink: #f3f4f6; --soft: #cbd5e1; --grid: #374151;
          --a: #7cb2ff; --b: #fbbf24; --c: #4ade80; --d: #e879f9; } }
  .paper { fill: var(--paper); } text { fill: var(--soft); font: 12px system-ui, sans-serif; }
  .title { fill: var(--ink); font-weight: 600; font-size: 13px; }
  .head { fill: var(--ink); font-weight: 600; font-size: 17px; }
  .grid { stroke: var(--grid); stroke-width: 1; } .end { text-anchor: end; }
  .middle { text-anchor: middle; }
  .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
  .c0 { stroke: var(--a); } .c1 { stroke: var(--b); } .c2 { stroke: var(--c); }
  .c3 { stroke: var(--d); } .dash { stroke-dasharray: 5 3; }
"""


class Curve(NamedTuple):
    """One column of the rows.

    Attributes:
        column: its name in the rows.
        name: its label.
        color: index of its colour.
        dashed: dashes distinguish curves without colours.
    """

    column: str
    name: str
    color: int
    dashed: bool = False


class Panel(NamedTuple):
    """Some curves over one axis.

    Attributes:
        title: of the panel.
        axis: unit of the axis.
        curves: the curves.
        logarithmic: whether the axis is.
    """

    title: str
    axis: str
    curves: tuple[Curve, ...]
    logarithmic: bool = False


PANELS = (
    Panel("Deliveries", "per second", (Curve("deliveriesPerS", "deliveries", 0),)),
    Panel(
        "Actions of the bands",
        "per second",
        (
            Curve("commandsPerS", "commands", 0),
            Curve("joinsPerS", "joins and resumes", 1, dashed=True),
        ),
    ),
    Panel(
        "Latency",
        "milliseconds, logarithmic",
        (
            Curve("commandP99Ms", "command p99", 0),
            Curve("commandP50Ms", "command p50", 0, dashed=True),
            Curve("tickP99Ms", "tick p99", 1),
            Curve("tickP50Ms", "tick p50", 1, dashed=True),
        ),
        logarithmic=True,
    ),
    Panel(
        "CPU",
        "cores",
        (Curve("serverCpu", "servers", 0), Curve("driverCpu", "driver", 1, dashed=True)),
    ),
    Panel("Memory of the servers", "MB", (Curve("memoryMb", "resident memory", 0),)),
    Panel(
        "Connections and open files",
        "count",
        (
            Curve("connections", "members connected", 0),
            Curve("descriptors", "file descriptors of the servers", 1, dashed=True),
        ),
    ),
)


def picture(rows: Sequence[LoadRow], title: str, subtitle: str) -> str:
    """An SVG document of ``rows``."""
    rows = _thinned(rows)
    height = _HEAD + len(PANELS) * (_PANEL + _GAP) + _FOOT - _GAP + 30
    svg = Xml.Element(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        role="img",
    )
    Xml.SubElement(svg, "title").text = title
    Xml.SubElement(svg, "desc").text = subtitle
    Xml.SubElement(svg, "style").text = _STYLE
    Xml.SubElement(svg, "rect", {"class": "paper", "width": "100%", "height": "100%"})
    _text(svg, _LEFT, 26, title, "head")
    _text(svg, _LEFT, 45, subtitle, "")
    longest = max((row["t"] for row in rows), default=1.0) or 1.0
    for number, panel in enumerate(PANELS):
        _draw(svg, panel, rows, _HEAD + 22 + number * (_PANEL + _GAP), longest)
    unit = "minutes" if longest >= _MINUTES_FROM_S else "seconds"
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    _text(svg, middle, height - 12, f"{unit} since the first client", "middle")
    Xml.indent(svg)
    return Xml.tostring(svg, encoding="unicode") + "\n"


def _draw(
    svg: Xml.Element, panel: Panel, rows: Sequence[LoadRow], top: float, longest: float
) -> None:
    group = Xml.SubElement(svg, "g", {"class": "panel"})
    _text(group, _LEFT, top - 10, f"{panel.title} ({panel.axis})", "title")
    low, high, ticks = _scale(panel, rows)

    def height_of(value: float) -> float:
        if panel.logarithmic:
            value = math.log10(max(value, 10**low))
        return top + _PANEL - (value - low) / (high - low) * _PANEL

    for value, label in ticks:
        y = height_of(value)
        _rule(group, _LEFT, y, _WIDTH - _RIGHT, y)
        _text(group, _LEFT - 8, y + 4, label, "end")
    minutes = longest >= _MINUTES_FROM_S
    unit_s = 60.0 if minutes else 1.0
    for value, label in _linear(longest / unit_s, 8):
        if value <= longest / unit_s:
            x = _across(value * unit_s, longest)
            _rule(group, x, top + _PANEL, x, top + _PANEL + 4)
            _text(group, x, top + _PANEL + 17, label, "middle")
    right: float = _WIDTH - _RIGHT
    for curve in reversed(panel.curves):
        right -= 40 + 7 * len(curve.name)
        _legend(group, curve, right, top - 14)
    for curve in panel.curves:
        _curve(group, curve, [(_across(row["t"], longest), row) for row in rows], height_of)


def _curve(
    group: Xml.Element,
    curve: Curve,
    rows: Sequence[tuple[float, LoadRow]],
    height_of: Callable[[float], float],
) -> None:
    """Draw a curve, with gaps where nothing was measured."""
    parts: list[str] = []
    pen = "M"
    for x, row in rows:
        value = figure(row, curve.column)
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x:.1f} {height_of(value):.1f}")
        pen = "L"
    attributes = {"class": _class(curve), "id": curve.column, "d": " ".join(parts) or "M0 0"}
    Xml.SubElement(Xml.SubElement(group, "path", attributes), "title").text = curve.name


def _legend(group: Xml.Element, curve: Curve, x: float, y: float) -> None:
    Xml.SubElement(group, "path", {"class": _class(curve), "d": f"M{x:.0f} {y:.0f}h20"})
    _text(group, x + 25, y + 4, curve.name, "")


def _class(curve: Curve) -> str:
    return f"line c{curve.color}" + (" dash" if curve.dashed else "")


def _scale(panel: Panel, rows: Sequence[LoadRow]) -> tuple[float, float, list[tuple[float, str]]]:
    """The ends of the axis, and its grid lines with their labels."""
    values = [
        value
        for row in rows
        for curve in panel.curves
        if (value := figure(row, curve.column)) is not None
    ]
    most = max(values, default=1.0) or 1.0
    if not panel.logarithmic:
        ticks = _linear(most, _TICKS)
        return 0.0, ticks[-1][0], ticks
    low = math.floor(math.log10(max(min(values, default=1.0), _LEAST_LOG_MS)))
    high = max(low + 1, math.ceil(math.log10(max(most, _LEAST_LOG_MS))))
    return low, high, [(10.0**power, f"{10.0**power:g}") for power in range(low, high + 1)]


def _linear(most: float, count: int) -> list[tuple[float, str]]:
    """Round numbers from 0 to at least ``most``, with their labels."""
    rough = most / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    places = math.ceil(most / step - 1e-9)
    return [(number * step, f"{number * step:,.6g}") for number in range(places + 1)]


def _across(seconds: float, longest: float) -> float:
    return _LEFT + seconds / longest * (_WIDTH - _LEFT - _RIGHT)


def _rule(group: Xml.Element, x1: float, y1: float, x2: float, y2: float) -> None:
    at = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    Xml.SubElement(group, "line", {"class": "grid", **at})


def _text(group: Xml.Element, x: float, y: float, text: str, kind: str) -> None:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    Xml.SubElement(group, "text", ({"class": kind} if kind else {}) | at).text = text


def _thinned(rows: Sequence[LoadRow]) -> list[LoadRow]:
    """Merge rows that are too close to distinguish."""
    step = math.ceil(len(rows) / _POINTS) or 1
    return [merged(rows[at : at + step]) for at in range(0, len(rows), step)]
