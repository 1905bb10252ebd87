"""The screen of `scripts/top.py`: renderables of rich, made from `/api/ops`. No I/O."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Document = Mapping[str, Any]

WIDTH = 32
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"good": "green", "warn": "yellow", "bad": "red"}
_SIGNS = {"good": "✔", "warn": "!", "bad": "✘"}
_MODES = {"redis": ("█", "green"), "memory": ("▄", "yellow"), "migrating": ("▓", "blue")}
_EVENTS = 3
# After so many successive answers from another server, the view switches to it.
_STRANGERS = 10


class Watched:
    """One server: its latest answer, and its samples across restarts.

    Args:
        address: URL of the server.

    Attributes:
        latest: latest answer; None before the first.
        samples: samples of all answers, the oldest first.
        trouble: why the latest query failed; None if it did not.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.latest: Document | None = None
        self.samples: list[Document] = []
        self.trouble: str | None = None
        self._strangers = 0

    @property
    def since(self) -> float | None:
        """The instant after which samples are missing; None if all are."""
        return self.samples[-1]["at"] if self.samples else None

    @property
    def well(self) -> bool:
        """Whether the server answers and its verdict is good."""
        return (
            self.trouble is None
            and self.latest is not None
            and self.latest["verdict"]["level"] == "good"
        )

    def update(self, answer: Document) -> None:
        """Store an answer; behind a load balancer it may be from another server."""
        if self.latest is not None and self.latest["serverId"] != answer["serverId"]:
            self._strangers += 1
            if self._strangers < _STRANGERS:
                self.trouble = (
                    f"{answer['serverId']} answers; is this the address of a load balancer?"
                )
                return
            self.latest, self.samples = None, []
        self._strangers = 0
        samples = answer["samples"]
        if self.latest is not None and self.latest["bootId"] != answer["bootId"]:
            # Samples of the new process that are older than ours overlap with the old process.
            samples = [each for each in samples if each["at"] > (self.since or 0)]
        if samples:
            first = samples[0]["at"]
            # After its clock was set back, a server sends all its samples again.
            self.samples = [each for each in self.samples if each["at"] < first] + samples
            self.samples = self.samples[-int(answer["keptMs"] / answer["periodMs"]) :]
        self.latest = answer
        self.trouble = None

    def fail(self, trouble: str) -> None:
        """Store why the server did not answer."""
        self.trouble = trouble


def screen(servers: Sequence[Watched]) -> RenderableType:
    """The whole screen: one server with all figures, or a table and a panel for each."""
    if len(servers) == 1:
        return panel(servers[0], figures(servers[0].samples))
    return Group(overview(servers), *(panel(server) for server in servers))


def overview(servers: Sequence[Watched]) -> Table:
    """One line for each server."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("server", ratio=1, no_wrap=True)
    table.add_column("storage", no_wrap=True)
    for name in ("up", "conn.", "sessions", "deliv./s", "commit", "lag"):
        table.add_column(name, justify="right", no_wrap=True)
    for server in servers:
        latest, last = server.latest, server.samples[-1] if server.samples else None
        storage, values = "no answer", ["-"] * 6
        if latest is not None and server.trouble is None:
            storage = latest["storage"]["mode"]
            values[0] = duration(latest["uptimeMs"])
            if last is not None:
                values[1:] = [
                    number(last["connections"]),
                    number(last["sessions"]),
                    number(last["deliveriesPerS"]),
                    milliseconds(last["commit"] and last["commit"]["meanMs"]),
                    milliseconds(last["loopLagMs"]),
                ]
        state = Text(f"{_SIGNS[level(server)]} {storage}", style=_STYLES[level(server)])
        table.add_row(name_of(server), state, *values)
    return table


def panel(server: Watched, details: RenderableType | None = None) -> Panel:
    """A panel of one server: its verdict, its storage, and ``details``."""
    parts: list[RenderableType] = [sentence(server)]
    subtitle, style = "", _STYLES[level(server)]
    if server.latest is not None:
        verdict = server.latest["verdict"]
        subtitle = f"BandSync {server.latest['version']}"
        if server.trouble is None:
            subtitle += f", up {duration(server.latest['uptimeMs'])}"
            parts.append(Text(verdict["meaning"], style="dim"))
            parts += [
                Text(f"{each['text']} {each['meaning']}", style=_STYLES[_known(each["level"])])
                for each in verdict["others"]
            ]
        parts.append(timeline(server.samples))
        if details is not None:
            parts.append(details)
        parts += events(server.latest)
    return Panel(
        Group(*parts),
        title=name_of(server),
        title_align="left",
        subtitle=subtitle,
        subtitle_align="right",
        border_style=style,
        padding=(0, 1),
    )


def name_of(server: Watched) -> str:
    """The id of a server; its address before the first answer."""
    if server.latest is not None:
        return str(server.latest["serverId"])
    # Without the token that may stand before the host.
    return server.address.partition("//")[2].rpartition("@")[2]


def level(server: Watched) -> str:
    """The level of a server: ``good``, ``warn`` or ``bad``."""
    if server.trouble is not None or server.latest is None:
        return "bad"
    return _known(server.latest["verdict"]["level"])


def _known(level: str) -> str:
    """The level; ``warn`` for one that only newer servers know."""
    return level if level in _STYLES else "warn"


def sentence(server: Watched) -> Text:
    """The verdict in words, readable without colours."""
    if server.trouble is not None:
        return Text(f"✘ The server does not answer: {server.trouble}", style="bold red")
    if server.latest is None:
        return Text("… no answer yet", style="dim")
    verdict = server.latest["verdict"]
    line = Text(f"{_SIGNS[level(server)]} {verdict['text']}")
    line.stylize(f"bold {_STYLES[level(server)]}")
    if verdict["since"] is not None:
        lasted = duration(server.latest["now"] - verdict["since"])
        line.append(f"  since {time_of(verdict['since'])}, {lasted}", style="dim not bold")
    return line


def timeline(samples: Sequence[Document]) -> Table:
    """The storage's mode over the last samples: high is Redis, low is memory."""
    line = Text(" " * (WIDTH - len(samples)))
    for each in samples[-WIDTH:]:
        sign, style = _MODES.get(each["mode"], ("▄", "dim"))
        line.append(sign, style=style)
    mode = samples[-1]["mode"].partition(" ")[0] if samples else "-"
    return _table(("storage", mode, line, "█ Redis ▄ memory"))


def figures(samples: Sequence[Document]) -> Table:
    """Each figure now, over time, and its bounds."""
    rows = []
    for name, show, value in _FIGURES:
        values = [value(each) for each in samples]
        known = [each for each in values if each is not None]
        bounds = f"{number(min(known))} … {number(max(known))}" if known else ""
        line = Text(sparkline(values[-WIDTH:]), style="cyan")
        rows.append((name, show(values[-1]) if values else "-", line, bounds))
    return _table(*rows)


def events(latest: Document) -> list[RenderableType]:
    """The last failovers and recoveries; nothing if there were none."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    shown = [each for each in latest["events"] if each["kind"] in {"failover", "recovery"}]
    for each in reversed(shown[-_EVENTS:]):
        if each["kind"] == "failover":
            what = Text("Redis lost", style="yellow")
            why = f"{each['inWords']}: {each['detail']}"
        else:
            back = each["outageMs"] is not None
            what = Text("Redis back" if back else "Redis in use", style="green")
            after = f"after {duration(each['outageMs'])}, " if back else ""
            why = f"{after}{each['sessions']} sessions moved in {duration(each['migrationMs'])}"
        table.add_row(time_of(each["at"]), what, Text(why, overflow="ellipsis", no_wrap=True))
    return [table] if shown else []


def sparkline(values: Sequence[float | None]) -> str:
    """Values as bars, scaled to the highest; a gap for a missing value."""
    most = max((each for each in values if each is not None), default=0.0)

    def bar(value: float | None) -> str:
        if value is None:
            return " "
        return _BARS[min(len(_BARS) - 1, int(value / most * len(_BARS)))] if most > 0 else _BARS[0]

    return "".join(bar(value) for value in values).rjust(WIDTH)


def number(value: float | None) -> str:
    """A quantity, with about three digits."""
    if value is None:
        return "-"
    digits = 0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """A duration with its unit, with about three digits."""
    return "-" if value is None else f"{number(value)} ms"


def duration(ms: float) -> str:
    """A duration in its two largest units."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    if ms < 9_950:
        return f"{ms / 1000:.1f} s"
    rest, parts = round(ms / 1000), []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])


def time_of(at: float) -> str:
    """The local time of day of an instant, milliseconds since the Unix epoch."""
    return f"{datetime.fromtimestamp(at / 1000).astimezone():%H:%M:%S}"


def _table(*rows: tuple[str, str, Text, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True, min_width=12)
    table.add_column(justify="right", no_wrap=True, min_width=9)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _part(group: str, name: str) -> Callable[[Document], float | None]:
    return lambda sample: sample[group][name] if sample[group] is not None else None


def _field(name: str) -> Callable[[Document], float | None]:
    return lambda sample: sample[name]


def _memory(sample: Document) -> float | None:
    size = sample["memoryBytes"]
    return None if size is None else size / 2**20


def _clock_error(sample: Document) -> float | None:
    error = sample["clockErrorMs"]
    return None if error is None else abs(error)


_FIGURES: list[tuple[str, Callable[[float | None], str], Callable[[Document], float | None]]] = [
    ("connections", number, _field("connections")),
    ("sessions", number, _field("sessions")),
    ("deliveries/s", number, _field("deliveriesPerS")),
    ("received/s", number, _field("receivedPerS")),
    ("commit", milliseconds, _part("commit", "meanMs")),
    ("command", milliseconds, _part("command", "meanMs")),
    ("loop lag", milliseconds, _field("loopLagMs")),
    ("slow, closed", number, _field("slowConsumers")),
    ("Redis trip", milliseconds, _field("roundTripMs")),
    ("clock error", milliseconds, _clock_error),
    ("memory, MiB", number, _memory),
    ("processor, %", number, lambda sample: sample["cpu"] * 100),
]
