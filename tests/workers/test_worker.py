"""One worker: its pipe protocol and its shared port."""

import os
import signal
import socket
from functools import partial

import httpx
import msgspec
import pytest
import trio
from msgspec.structs import replace
from trio.testing import memory_stream_pair

from bandsync.app import serve
from bandsync.workers.worker import CLOSE_SHARED_PORT, WorkerConfig, WorkerReport, work
from scripts.testbed.redis_server import HOST, free_port
from tests.support.log_capture import LogCapture
from tests.support.servers import PATIENCE_S, TEST_SETTINGS, start_server
from tests.support.worker_groups import ask_health, upgrade


async def test_pipe_closes_the_shared_port_and_begins_the_drain(nursery: trio.Nursery) -> None:
    ours, theirs = memory_stream_pair()
    log_capture = LogCapture()
    done = trio.Event()

    async def run_worker() -> None:
        await work(theirs, theirs, lambda settings: log_capture.logger)
        done.set()

    nursery.start_soon(run_worker)
    settings = replace(TEST_SETTINGS, worker_ports=free_port())
    await ours.send_all(msgspec.json.encode(WorkerConfig(settings, 1)) + b"\n")
    report = msgspec.json.decode(await ours.receive_some(), type=WorkerReport)
    assert report.refused is None
    port = int(report.lines[0].rpartition(":")[2])
    own = f"http://{HOST}:{settings.worker_ports}"
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://{HOST}:{port}/api/health")).status_code == 200
        await ours.send_all(CLOSE_SHARED_PORT)
        # The task that closes the listener runs when this one waits.
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream(HOST, port)
        # Its own port still answers.
        assert (await client.get(f"{own}/api/health")).status_code == 200
    await ours.send_eof()
    with trio.fail_after(PATIENCE_S):
        await done.wait()
    assert log_capture.all("server.stopped", server_id="stage")


async def test_queued_connection_is_served_when_the_shared_port_closes(
    nursery: trio.Nursery,
) -> None:
    server = await start_server(nursery)
    # The connection is in the accept queue: the server has not accepted it yet.
    with socket.create_connection((HOST, server.port)) as client:
        server.serving.close_shared_port()
        status, _ = await trio.to_thread.run_sync(ask_health, client)
        assert status == 200
    await server.stop()


async def test_first_signal_during_a_drain_does_not_cancel_it() -> None:
    log_capture = LogCapture()
    async with trio.open_nursery() as nursery:
        serving = await nursery.start(
            partial(
                serve,
                TEST_SETTINGS,
                log_capture.logger,
                announce=log_capture.logger.info,
                signals=[signal.SIGUSR1],
            )
        )
        # A client that does not answer the close frame makes the drain last.
        with socket.create_connection((HOST, serving.port)) as silent:
            silent.sendall(upgrade("/ws"))
            await trio.to_thread.run_sync(silent.recv, 4096)
            serving.stop()
            await log_capture.until("server.draining")
            os.kill(os.getpid(), signal.SIGUSR1)
            await log_capture.until("server.stopped")


async def test_worker_ends_when_its_pipe_ends_before_it_listens() -> None:
    for sent in (b"", msgspec.json.encode(WorkerConfig(TEST_SETTINGS, 1)) + b"\n"):
        ours, theirs = memory_stream_pair()
        await ours.send_all(sent)
        await ours.aclose()
        with trio.fail_after(PATIENCE_S):
            await work(theirs, theirs, lambda settings: LogCapture().logger)


async def test_worker_reports_why_it_cannot_start() -> None:
    ours, theirs = memory_stream_pair()
    with socket.create_server((HOST, 0)) as taken:
        settings = replace(TEST_SETTINGS, port=taken.getsockname()[1])
        await ours.send_all(msgspec.json.encode(WorkerConfig(settings, 1)) + b"\n")
        await work(theirs, theirs, lambda settings: LogCapture().logger)
    report = msgspec.json.decode(await ours.receive_some(), type=WorkerReport)
    assert "in use" in (report.refused or "")
