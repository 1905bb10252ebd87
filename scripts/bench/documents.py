"""The JSON documents of a load: the reports of its driver, and the rows kept of them."""

from typing import NotRequired, TypedDict, cast

import msgspec

# The percentiles of a latency, ms, and their count; None without a sample.
Spread = dict[str, int | float] | None


class LoadOptions(TypedDict):
    """The command line of `load` and `soak`."""

    bands: int
    minutes: float
    members: int
    workers: int
    servers: str
    redis: bool
    seed: int
    pace: float
    json: str
    plot: str


class LoadPlan(msgspec.Struct):
    """The argument of the driver.

    Attributes:
        name: common beginning of the sessions' ids.
        addresses: of the servers: family, host, port, and the host for requests.
        bands: number of bands.
        members: of each band.
        seconds: from the first join to the last command.
        ramp: seconds in which the members join.
        filling: seconds after that in which the chat rings are filled; 0 to leave it to the bands.
        seed: draws what the bands do.
        pace: factor on the frequency of their actions.
    """

    name: str
    addresses: list[tuple[int, str, int, str]]
    bands: int
    members: int
    seconds: float
    ramp: float
    filling: float
    seed: int
    pace: float


class SecondReport(TypedDict):
    """The driver's measurements since its previous report.

    Attributes:
        t: seconds since the start.
        seconds: since the previous report.
        deliveries: messages received that the server counts as deliveries.
        ticks: of these.
        counts: of the clients' actions, by name.
        errors: error messages so far.
        closes: connections closed by servers so far.
        findings: violations so far.
        latencyMs: by kind of latency.
        driverCpu: cores.
        driverWaited: time without a core, as a share.
        driverLagMs: the longest delay of a timer.
    """

    t: float
    seconds: float
    deliveries: int
    ticks: int
    counts: dict[str, int]
    errors: int
    closes: int
    findings: int
    latencyMs: dict[str, Spread]
    driverCpu: float
    driverWaited: float
    driverLagMs: float


class DriverRow(SecondReport):
    """A report with the phase of the load and the number of joined members."""

    phase: str
    connections: int


class PhaseReport(TypedDict):
    """A whole phase of a load.

    Attributes:
        seconds: its duration.
        deliveries: messages received that the server counts as deliveries.
        deliveriesPerSecond: their rate.
        ticksPerSecond: rate of ticks.
        perSecond: rates of the clients' actions, by name.
        driverCpu: cores.
        driverWaited: time without a core, as a share.
        latencyMs: by kind of latency.
        serverCpuSeconds: CPU of the servers, where it is known.
    """

    seconds: float
    deliveries: int
    deliveriesPerSecond: float
    ticksPerSecond: float
    perSecond: dict[str, float]
    driverCpu: float
    driverWaited: float
    latencyMs: dict[str, Spread]
    serverCpuSeconds: NotRequired[float]


class DriverEnd(TypedDict):
    """The driver's summary.

    Attributes:
        stopped: whether it was interrupted.
        phases: by name.
        deliveries: in all phases.
        counts: of the clients' actions, by name.
        beat: the largest errors of the beat, ms.
        errors: error messages by code.
        closes: closes by code or reason.
        findings: violations by name.
        examples: texts of the first violations.
    """

    stopped: bool
    phases: dict[str, PhaseReport]
    deliveries: int
    counts: dict[str, int]
    beat: dict[str, float]
    errors: dict[str, int]
    closes: dict[str, int]
    findings: dict[str, int]
    examples: list[str]


class DriverLine(TypedDict):
    """A line that the driver prints; the last one has the summary."""

    row: DriverRow
    end: NotRequired[DriverEnd]


class LoadRow(TypedDict):
    """One second of a load, or the mean of several; None where nothing was measured.

    ``…PerS`` are rates, ``…Ms`` milliseconds, ``…Cpu`` cores, ``…Waited`` the time without a core
    as a share.
    """

    t: float
    phase: str
    connections: float
    deliveriesPerS: float
    ticksPerS: float
    commandsPerS: float
    joinsPerS: float
    commandP50Ms: float | None
    commandP99Ms: float | None
    tickP50Ms: float | None
    tickP99Ms: float | None
    driverCpu: float
    driverWaited: float
    driverLagMs: float
    errors: float
    closes: float
    findings: float
    serverCpu: float | None
    serverWaited: float | None
    memoryMb: float | None
    descriptors: float | None
    tasks: float | None


def figure(row: LoadRow, column: str) -> float | None:
    """The number in a column; None where nothing was measured."""
    # Columns are chosen at runtime, which a TypedDict does not know.
    return cast("float | None", row.get(column))
