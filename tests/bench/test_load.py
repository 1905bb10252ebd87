"""`python -m scripts.bench load` and `soak`: short loads on real servers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from scripts.bench.hosts import addresses_of, live_counts, numbers
from scripts.bench.processes import BenchError
from scripts.bench.trend import left_behind
from scripts.testbed.server_process import ServerProcess
from tests.bench.svg import expect_picture

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120


def bench(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        start_new_session=True,
    )


def outcome(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any], str]:
    try:
        out, error = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, json.loads(out) if out else {}, error


def test_terminated_benchmark_leaves_no_server_behind() -> None:
    process = bench("commands", "--sessions", "2", "--members", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    servers: list[str] = []
    try:
        # One of the two servers is suspended while the other is measured.
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
    """The state of a process, one letter as in proc(5); empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_short_load_has_no_findings(tmp_path: Path) -> None:
    plot, file = tmp_path / "load.svg", tmp_path / "load.json"
    code, result, error = outcome(
        bench(
            *("load", "--bands", "4", "--members", "4", "--minutes", "0.1", "--pace", "12"),
            *("--plot", str(plot), "--json", str(file)),
        )
    )
    assert result["findings"] == [], error
    assert code == 0, error
    counts = result["counts"]
    assert counts["cuts"] > 0
    assert counts["resumes"] >= counts["cuts"]
    assert counts["leaves"] > 0
    # All first members, and a new one for each that left, unless the play ended before.
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
    assert len(playing) >= 4
    assert all(row["deliveriesPerS"] > 0 for row in playing)
    assert all(row["memoryMb"] > 0 and row["descriptors"] > 0 for row in rows)
    expect_picture(plot.read_text())


@pytest.mark.slow
def test_interrupted_soak_prints_its_summary() -> None:
    process = bench("soak", "--bands", "2", "--members", "3", "--minutes", "1", "--pace", "4")
    assert process.stderr is not None
    # One line at once, and one after ten seconds, when all have joined.
    assert " s join" in process.stderr.readline()
    assert " s play" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    code, result, error = outcome(process)
    assert result["stopped"] is True, error
    assert result["counts"]["joins"] >= 6
    # So short a run cannot judge memory, and reports that. Everything else was released.
    assert [each for each in result["findings"] if "memory" not in each] == []
    assert code == (1 if result["findings"] else 0)
    assert result["after"]["connections"] == result["after"]["rooms"] == 0
    assert result["after"]["descriptors"] <= result["before"]["descriptors"]
    # Tasks were counted during the run, and all have ended.
    assert result["tasks"]["most"] > result["before"]["tasks"] >= result["after"]["tasks"] > 0


@pytest.mark.slow
def test_load_uses_given_addresses() -> None:
    with ServerProcess() as first, ServerProcess() as second:
        # Two servers without Redis share no session. A band split over them receives different
        # events.
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


def test_load_without_a_server_fails() -> None:
    code, _, error = outcome(bench("load", "--servers", "127.0.0.1:1", "--minutes", "0.1"))
    assert code == 1
    assert "127.0.0.1:1" in error


@pytest.mark.parametrize("servers", ["http://", "https://127.0.0.1:1", "127.0.0.1:http", "a/b:1"])
def test_invalid_address_is_refused(servers: str) -> None:
    with pytest.raises(BenchError, match="the address"):
        addresses_of(servers)


def test_addresses_are_parsed() -> None:
    (first, second) = addresses_of("http://127.0.0.1:3001, 127.0.0.1:3002")
    assert first[1:] == ("127.0.0.1", 3001, "127.0.0.1:3001")
    assert second[1:] == ("127.0.0.1", 3002, "127.0.0.1:3002")


def test_leftover_tasks_of_a_server_are_found() -> None:
    with ServerProcess() as server:
        before = live_counts([("127.0.0.1", server.port)], 1).current
        with connect(f"{server.ws_url}/ws/song") as member:
            member.recv(PATIENCE_S)
            meanwhile = live_counts([("127.0.0.1", server.port)], 1).current
    found = left_behind(before, meanwhile)
    assert any(
        re.fullmatch(r"\d tasks were left behind \(\d+ before, \d+ now\)", each) for each in found
    )


def test_metrics_are_parsed() -> None:
    metrics = '# HELP a_b x\n# TYPE a_b gauge\na_b 2.0\na_c{code="1"} 3.0\nd_total 1.5e+06\n'
    assert numbers(metrics) == {"a_b": 2.0, "d_total": 1_500_000.0}
