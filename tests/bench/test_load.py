"""`scripts/bench.py load` and `soak`: a short load on a real server, and how they judge."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from websockets.sync.client import connect

from bandsync.wire.frames import text_frame
from scripts.bench.band import LoadBand
from scripts.bench.epoll_ws import ServerAddress, EpollLoop
from scripts.bench.gig import summary  # noqa: F401  # it can be imported without a terminal
from scripts.bench.histogram import Histogram
from scripts.bench.hosts import live_counts, numbers, addresses_of
from scripts.bench.phone import LoadMember
from scripts.bench.plot import PANELS, picture
from scripts.bench.processes import BenchError
from scripts.bench.score import LoadScore
from scripts.bench.trend import LoadRow, RowSeries, bottleneck, leaks, left_behind, trend
from scripts.testbed.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
PATIENCE_S = 120


def bench(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
    )


def outcome(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any], str]:
    try:
        out, error = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, json.loads(out) if out else {}, error


# The whole.


def test_a_benchmark_that_is_told_to_stop_leaves_no_server_behind() -> None:
    process = bench("commands", "--sessions", "2", "--members", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    servers: list[str] = []
    try:
        # One of the two is suspended while the other is measured.
        for _ in range(1200):
            servers = children.read_text().split()
            if any(_state(each) == "T" for each in servers):
                break
            time.sleep(0.05)
        else:
            pytest.fail("nothing was measured")
        process.send_signal(signal.SIGTERM)
        assert outcome(process) == (130, {}, "")
        assert [each for each in servers if _state(each)] == []
    finally:
        process.kill()
        for each in servers:
            if _state(each):
                os.kill(int(each), signal.SIGKILL)


def _state(pid: str) -> str:
    """One letter, proc(5); empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_short_load(tmp_path: Path) -> None:
    plot, file = tmp_path / "load.svg", tmp_path / "load.json"
    code, result, error = outcome(
        bench(
            *("load", "--bands", "4", "--members", "4", "--minutes", "0.2", "--pace", "6"),
            *("--plot", str(plot), "--json", str(file)),
        )
    )
    assert result["findings"] == [], error
    assert code == 0, error
    counts = result["counts"]
    assert counts["cuts"] > 0
    assert counts["resumes"] >= counts["cuts"]
    assert counts["leaves"] > 0
    # Everybody who came at first, and one for each who left, unless the end was sooner.
    assert 16 <= counts["joins"] <= 16 + counts["leaves"] + counts.get("joinsAnew", 0)
    assert result["beat"] == {"anchorDisagreementMs": 0, "tickOffAnchorMs": pytest.approx(0, abs=1)}
    assert result["stopped"] is False
    assert result["cpuUsPerDelivery"] > 0
    assert set(result["phases"]) == {"join", "play", "check", "leave"}
    for name in ("command", "event", "tick", "resume"):
        latency = result["latencyMs"][name]
        assert 0 < latency["p50"] <= latency["p99"] <= latency["p999"] <= latency["max"]
    rows = json.loads(file.read_text())["rows"]
    playing = [row for row in rows if row["phase"] == "play"]
    assert len(playing) >= 8
    assert all(row["deliveriesPerS"] > 0 for row in playing)
    assert all(row["memoryMb"] > 0 and row["descriptors"] > 0 for row in rows)
    expect_picture(plot.read_text())


def test_an_interrupt_ends_it_with_the_summary() -> None:
    process = bench("soak", "--bands", "2", "--members", "3", "--minutes", "1", "--pace", "4")
    assert process.stderr is not None
    # One at once, and one after ten seconds, when all are there.
    assert " s join" in process.stderr.readline()
    assert " s play" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, result, error = outcome(process)
    assert result["stopped"] is True, error
    assert result["counts"]["joins"] >= 6
    # So short a run says nothing about memory, and says so; everything else came back.
    assert [each for each in result["findings"] if "memory" not in each] == []
    assert code == (1 if result["findings"] else 0)
    assert result["after"]["connections"] == result["after"]["rooms"] == 0
    assert result["after"]["descriptors"] <= result["before"]["descriptors"]
    # They were looked at meanwhile, and are all gone.
    assert result["tasks"]["most"] > result["before"]["tasks"] >= result["after"]["tasks"] > 0


def test_given_addresses_are_used() -> None:
    with ServerProcess() as first, ServerProcess() as second:
        # Two servers without a Redis share no session: bands that are split over them are not told
        # the same, which is found out.
        code, result, error = outcome(
            bench(
                *("load", "--bands", "1", "--members", "2", "--minutes", "0.05"),
                *("--servers", f"{first.url},{second.url}"),
            )
        )
        assert result, error
        assert code == 1
        assert any(text.startswith("newEpoch") for text in result["findings"])
        assert result["memoryMb"] is None or result["memoryMb"]["most"] > 0
        code, result, error = outcome(
            bench(
                *("load", "--bands", "2", "--members", "2", "--minutes", "0.05"),
                *("--servers", first.url),
            )
        )
        assert (code, result["findings"]) == (0, []), error


def test_nobody_there() -> None:
    code, _, error = outcome(bench("load", "--servers", "127.0.0.1:1", "--minutes", "0.1"))
    assert code == 1
    assert "127.0.0.1:1" in error


@pytest.mark.parametrize("servers", ["http://", "https://127.0.0.1:1", "127.0.0.1:http", "a/b:1"])
def test_what_is_no_address(servers: str) -> None:
    with pytest.raises(BenchError, match="the address"):
        addresses_of(servers)


def test_addresses() -> None:
    (first, second) = addresses_of("http://127.0.0.1:3001, 127.0.0.1:3002")
    assert first[1:] == ("127.0.0.1", 3001, "127.0.0.1:3001")
    assert second[1:] == ("127.0.0.1", 3002, "127.0.0.1:3002")


# Percentiles.


def test_percentiles_are_those_of_the_values() -> None:
    chance = random.Random(7)
    values = sorted(chance.lognormvariate(0, 1.5) for _ in range(5000))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for share in (0.0, 0.5, 0.9, 0.99, 0.999):
        exact = values[int(share * len(values))]
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.03)
    assert histogram.percentile(1.0) == pytest.approx(values[-1], rel=0.03)
    spread = histogram.spread()
    assert spread is not None
    assert spread["max"] == pytest.approx(values[-1], abs=0.001)
    assert spread["count"] == 5000


def test_no_latency_has_no_percentiles() -> None:
    assert Histogram().percentile(0.5) is None
    assert Histogram().spread() is None


def test_clocks_that_disagree_do_not_break_percentiles() -> None:
    histogram = Histogram()
    histogram.add(-3.0)
    histogram.add(0.0)
    assert (histogram.percentile(0.5) or 0) <= 0.002
    histogram.add(1e12)
    assert histogram.longest == 1e12


# Flatness.


def rows(memory: "list[float]", **columns: "list[float]") -> list[LoadRow]:
    plain = {"phase": "play", "connections": 100, "descriptors": 110}
    return [
        plain
        | {"t": float(second), "memoryMb": value}
        | {name: values[second] for name, values in columns.items()}
        for second, value in enumerate(memory)
    ]


def noise(count: int, level: float, width: float) -> list[float]:
    chance = random.Random(count)
    return [level + chance.uniform(-width, width) for _ in range(count)]


def test_a_line_through_points() -> None:
    line = trend([0, 1, 2, 3, 4], [5, 5, 5, 5, 5])
    assert line is None, "five points are no trend"
    times = [float(second) for second in range(100)]
    line = trend(times, [10 + 0.5 * second for second in times], warm_up=0.0)
    assert line is not None
    assert (line.first, line.last) == pytest.approx((10, 59.5))
    assert line.growth == pytest.approx(4.95)


def test_what_is_flat() -> None:
    assert leaks(rows(noise(600, 80, 1.5))) == []


def test_the_warm_up_is_no_leak() -> None:
    memory = [40 + second for second in range(60)] + noise(540, 100, 0.5)
    assert leaks(rows([float(each) for each in memory])) == []


def test_a_peak_at_the_end_is_no_leak() -> None:
    memory = noise(600, 80, 0.5)
    memory[-3:] = [120.0, 130.0, 140.0]
    assert leaks(rows(memory)) == []


def test_a_leak_is_found() -> None:
    memory = [value + second * 0.01 for second, value in enumerate(noise(600, 80, 1.5))]
    (finding,) = leaks(rows(memory))
    assert re.search(r"memory grew by (6|7)\.\d%", finding)


def test_a_leak_that_ends_low_is_found() -> None:
    # First and last point alone would say that it shrank.
    memory = [value + second * 0.02 for second, value in enumerate(noise(600, 80, 0.5))]
    memory[-1] = 70.0
    assert leaks(rows(memory))


def test_leaking_descriptors_are_found() -> None:
    found = leaks(rows(noise(600, 80, 1), descriptors=[110 + second / 20 for second in range(600)]))
    assert len(found) == 1
    assert "descriptors" in found[0]
    # More of them because there are more connections are none.
    more = [100 + second / 20 for second in range(600)]
    columns = {"connections": more, "descriptors": [each + 10 for each in more]}
    assert leaks(rows(noise(600, 80, 1), **columns)) == []


def test_leaking_tasks_are_found() -> None:
    two_each = [200.0 + second % 3 for second in range(600)]
    assert leaks(rows(noise(600, 80, 1), tasks=two_each)) == []
    # One for every tenth connection that was closed, of four a second.
    leaking = [count + second * 0.4 for second, count in enumerate(two_each)]
    (finding,) = leaks(rows(noise(600, 80, 1), tasks=leaking))
    assert re.fullmatch(r"tasks that no connection of ours needs: 2\d\d more", finding)


def test_tasks_of_more_connections_are_no_leak() -> None:
    more = [100 + second / 20 for second in range(600)]
    columns = {"connections": more, "descriptors": [each + 10 for each in more]}
    columns["tasks"] = [2 * each + 12 for each in more]
    assert leaks(rows(noise(600, 80, 1), **columns)) == []


def test_tasks_that_are_left_behind_are_found() -> None:
    with ServerProcess() as server:
        before = live_counts([("127.0.0.1", server.port)], 1).current
        with connect(f"{server.ws_url}/ws/song") as member:
            member.recv(PATIENCE_S)
            meanwhile = live_counts([("127.0.0.1", server.port)], 1).current
    found = left_behind(before, meanwhile)
    assert any(
        re.fullmatch(r"\d tasks were left behind \(\d+ before, \d+ now\)", each) for each in found
    )


def test_too_short_a_run_is_no_proof() -> None:
    (finding,) = leaks(rows([80.0] * 5))
    assert "too short" in finding
    assert leaks(rows([80.0] * 5 + [81.0] * 20)) == []


def test_memory_that_nobody_tells_is_no_proof() -> None:
    assert leaks([row | {"memoryMb": None} for row in rows([1.0] * 100)])


def test_what_is_left_behind() -> None:
    before = {"rooms": 0.0, "connections": 0.0, "descriptors": 9.0}
    assert left_behind(before, before) == []
    assert left_behind(before, before | {"descriptors": 8.0}) == []
    assert left_behind(before, {}) == []
    (finding,) = left_behind(before, before | {"rooms": 2.0})
    assert finding == "2 rooms were left behind (0 before, 2 now)"


def test_a_driver_that_is_the_bottleneck_says_so() -> None:
    quiet = [{"driverCpu": 0.4, "driverLagMs": 2.0}] * 100
    assert bottleneck(quiet) is None
    assert bottleneck([]) is None
    busy = [{"driverCpu": 0.95, "driverLagMs": 2.0}] * 10
    assert "busy" in (bottleneck(quiet + busy) or "")
    late = [{"driverCpu": 0.4, "driverLagMs": 80.0}] * 10
    assert "late" in (bottleneck(quiet + late) or "")


# Rows.


def test_a_long_run_is_kept_in_bounded_rows() -> None:
    series = RowSeries(most=100)
    for second in range(10_000):
        series.add(
            {"t": float(second), "phase": "play", "rate": 4.0, "p99Ms": float(second), "none": None}
        )
        assert len(series.rows) <= 100
    assert len(series.rows) > 40
    assert all(row["rate"] == 4.0 for row in series.rows)
    # Of latencies the worst is kept, and nothing of before is lost.
    assert [row["p99Ms"] for row in series.rows] == [row["t"] for row in series.rows]
    assert series.rows[0]["t"] == pytest.approx(10_000 / len(series.rows), rel=1)


def expect_picture(text: str) -> None:
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


def test_a_picture_has_all_its_curves() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    told = [
        {"t": second + 1.0, "phase": "play", **dict.fromkeys(columns, 1.0 + second % 7)}
        for second in range(3000)
    ]
    told[5]["tickP99Ms"] = None
    expect_picture(picture(told, "Load: 2 < 3 bands & more", "80 % of a core"))


def test_where_nothing_was_measured_there_is_no_line() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    told = [
        {"t": second + 1.0, "phase": "play", **dict.fromkeys(columns, 1.0)} for second in range(9)
    ]
    told[4]["memoryMb"] = None
    svg = picture(told, "Load", "")
    line = re.search(r'id="memoryMb" d="([^"]*)"', svg)
    other = re.search(r'id="serverCpu" d="([^"]*)"', svg)
    assert line is not None
    assert other is not None
    assert (line[1].count("M"), line[1].count("L")) == (2, 6)
    assert (other[1].count("M"), other[1].count("L")) == (1, 8)


def test_a_picture_of_nothing_is_one() -> None:
    columns = [curve.column for panel in PANELS for curve in panel.curves]
    nothing = {"t": 1.0, "phase": "play", **dict.fromkeys(columns)}
    for each in ([], [nothing], [nothing | dict.fromkeys(columns, 0)]):
        assert ElementTree.fromstring(picture(each, "Soak", "")) is not None  # noqa: S314


def test_metrics_are_read() -> None:
    metrics = '# HELP a_b x\n# TYPE a_b gauge\na_b 2.0\na_c{code="1"} 3.0\nd_total 1.5e+06\n'
    assert numbers(metrics) == {"a_b": 2.0, "d_total": 1_500_000.0}


# What must not happen is found.


class Deaf:
    """Takes what a phone sends."""

    open = True
    all_ticks = True

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def cut(self) -> None:
        self.open = False


class Hall:
    """A band of two that were told of version 5, without a server."""

    def __init__(self) -> None:
        self.score = LoadScore()
        self.loop = EpollLoop()
        address = ServerAddress(2, ("127.0.0.1", 1), "nowhere")
        chance = random.Random(1)
        self.band = LoadBand(self.loop, self.score, "b", 0, 2, [address], chance=chance)
        for number, member in enumerate(self.band.members):
            member.away = False
            member.connection = Deaf()  # type: ignore[assignment]
            self.tell(member, snapshot(you=you(number)))

    @property
    def found(self) -> dict[str, int]:
        return dict(self.score.findings)

    def tell(self, member: LoadMember, message: dict[str, Any]) -> None:
        # As it comes from the server: without spaces.
        payload = json.dumps(message, separators=(",", ":")).encode()
        frame = text_frame(payload)
        start = len(frame) - len(payload)
        kind = frame[start + 9 : start + 13]
        member.received(kind, frame, start, len(frame))

    def tell_all(self, message: dict[str, Any]) -> None:
        for member in self.band.members:
            self.tell(member, message)

    def end(self, *snapshots: dict[str, Any]) -> None:
        self.band.request_snapshots()
        for member, each in zip(self.band.members, snapshots, strict=True):
            self.tell(member, each)
        self.band.oracle.judge()


LINE = {
    "isPlaying": True,
    "positionMs": 0.0,
    "anchorTime": 1000.0,
    "tempoBpm": 120.0,
    "beat": 0.0,
    "beatsPerBar": 4,
    "next": None,
}


def you(number: int, *, resumed: bool = False) -> dict[str, Any]:
    role = "follower" if number else "leader"
    return {"memberId": f"m{number}", "role": role, "resumeToken": "t", "resumed": resumed}


def snapshot(version: int = 5, **changes: object) -> dict[str, Any]:
    return {
        "type": "snapshot",
        "version": version,
        "serverTime": 2000.0,
        "epoch": "e",
        "message": "",
        "transport": LINE,
        "leaderId": "m0",
        "members": [],
        "chat": [],
    } | changes


def event(kind: str, version: int, **fields: object) -> dict[str, Any]:
    fields = fields or {"memberId": "m9"}
    return {"type": kind, "sessionId": "b", "version": version, "serverTime": 2000.0, **fields}


def test_nothing_is_found_where_all_is_well() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    assert leader.request("seek", positionMs=0)
    moved = event("seek", 6, transport=LINE | {"positionMs": 7.0}, by="m0")
    hall.tell_all(moved)
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    hall.end(*[snapshot(6, transport=moved["transport"])] * 2)
    assert hall.found == {}
    assert hall.score.counts["acks"] == 1
    assert hall.score.anchor_error_ms == 0


def test_a_gap_is_found() -> None:
    hall = Hall()
    hall.tell_all(event("user_left", 7))
    assert hall.found == {"versionGap": 2}


def test_two_truths_are_found() -> None:
    hall = Hall()
    first, second = hall.band.members
    hall.tell(first, event("seek", 6, transport=LINE, by="m0"))
    hall.tell(second, event("seek", 6, transport=LINE | {"positionMs": 30.0}, by="m0"))
    assert hall.found == {"disagreement": 1, "beat": 1}
    assert hall.score.anchor_error_ms == pytest.approx(30)


def test_a_lost_ack_is_found() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("seek", positionMs=0)
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    hall.end(snapshot(), snapshot())
    assert hall.found == {"lostAck": 1}


def test_an_ack_of_something_else_is_found() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("seek", positionMs=0)
    hall.tell_all(event("message_updated", 6, message="x", by="m0"))
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    assert hall.found == {"otherAck": 1}
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    assert hall.found == {"otherAck": 1, "answeredTwice": 1}


def test_an_ack_before_another_event_is_found() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("seek", positionMs=0)
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    hall.tell_all(event("message_updated", 6, message="x", by="m0"))
    assert hall.found == {"otherAck": 1}


def test_a_lost_chat_message_is_found() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("chat_message", text="hello")
    hall.tell_all(event("chat_message", 6, text="hello"))
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    hall.end(snapshot(6), snapshot(6))
    assert hall.found == {"lostAck": 1}


def test_an_old_chat_message_may_be_gone() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("chat_message", text="hello")
    hall.tell(leader, {"type": "ack", "requestId": "1", "version": 6})
    for version in range(6, 57):
        hall.tell_all(event("chat_message", version, text=str(version)))
    ring = [{"text": str(version)} for version in range(7, 57)]
    hall.end(snapshot(56, chat=ring), snapshot(56, chat=ring))
    assert hall.found == {}


def test_a_question_without_an_answer_is_found() -> None:
    hall = Hall()
    leader = hall.band.members[0]
    leader.request("seek", positionMs=0)
    hall.band.check_deadlines(time.perf_counter() + 9)
    assert hall.found == {}
    hall.band.check_deadlines(time.perf_counter() + 11)
    assert hall.found == {"unanswered": 1}


def test_a_place_that_is_not_given_back_is_found() -> None:
    hall = Hall()
    follower = hall.band.members[1]
    follower.cut(1.0)
    follower.connection = Deaf()  # type: ignore[assignment]
    hall.tell(follower, snapshot(6, you=you(1)))
    assert hall.found == {"notResumed": 1}


def test_a_session_that_began_again_is_found() -> None:
    hall = Hall()
    hall.tell(hall.band.members[1], snapshot(1, epoch="f"))
    assert hall.found == {"newEpoch": 1}


def test_different_ends_are_found() -> None:
    hall = Hall()
    hall.end(snapshot(), snapshot(message="other"))
    assert hall.found == {"disagreement": 1}


def test_a_tick_off_the_anchor_is_seen() -> None:
    hall = Hall()
    tick = {"type": "scroll_tick", "serverTime": 3000.0, "positionMs": 2012.0}
    hall.tell(hall.band.members[0], tick)
    assert hall.score.tick_error_ms == pytest.approx(12)
