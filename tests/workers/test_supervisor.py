"""The supervisor over worker processes that are shell scripts."""

import os
import signal
from functools import partial

import pytest
import trio

from bandsync.startup import StartError
from bandsync.workers import supervisor
from bandsync.workers.supervisor import RestartDelays, supervise
from tests.support.log_capture import LogCapture
from tests.support.servers import PATIENCE_S
from tests.support.worker_groups import WorkerGroup, group_settings

# A worker as its supervisor sees it, in shell: it reads its configuration and reports a start.
LISTENS = "read config; echo '{\"lines\":[]}'; "


def shell(script: str) -> list[str]:
    return ["sh", "-c", script, "worker"]


async def test_signals_replace_and_stop_workers() -> None:
    log_capture = LogCapture()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                supervise,
                group_settings("redis://nowhere"),
                log_capture.logger,
                command=shell(LISTENS + "cat"),
                announce=log_capture.logger.info,
                stop_on=[signal.SIGUSR1],
                replace_on=[signal.SIGUSR2],
            )
        )
        for number in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR2)
            await log_capture.until("workers.replaced", number)
        os.kill(os.getpid(), signal.SIGUSR1)
        await log_capture.until("workers.stopped")
    assert len({entry["pid"] for entry in log_capture.all("worker.started")}) == 6


async def start_error_of(script: str) -> str:
    with pytest.raises(StartError) as caught, trio.fail_after(PATIENCE_S):
        await supervise(
            group_settings("redis://nowhere"), LogCapture().logger, command=shell(script)
        )
    return str(caught.value)


async def test_refused_start_raises_its_reason() -> None:
    assert await start_error_of('read config; echo \'{"refused":"the stage is locked"}\'') == (
        "the stage is locked"
    )
    assert "ended with status 7" in await start_error_of("exit 7")
    with pytest.raises(StartError, match="could not be started"):
        await supervise(
            group_settings("redis://nowhere"), LogCapture().logger, command=["/nonexistent/python"]
        )


async def test_start_over_its_limit_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_MARGIN_S", -20.5)
    assert "did not start in time" in await start_error_of("sleep 1000")
    assert "did not start in time" in await start_error_of("exec >&-; sleep 1000")


async def test_restart_delay_grows_with_every_failure(nursery: trio.Nursery) -> None:
    group = WorkerGroup(group_settings("redis://nowhere"))
    await group.start(nursery, shell(LISTENS), RestartDelays(first=0.01, longest=0.08))
    await group.log.until("worker.exited", 9, server_id="stage-1")
    waits = [entry["restart_in_s"] for entry in group.log.all("worker.exited")]
    assert waits[0] <= 0.02 < max(waits) <= 0.08
    await group.stop()


async def test_restart_delay_resets_after_a_stable_run(nursery: trio.Nursery) -> None:
    group = WorkerGroup(group_settings("redis://nowhere"))
    await group.start(nursery, shell(LISTENS), RestartDelays(first=0.01, longest=0.08, stable=0))
    await group.log.until("worker.exited", 9, server_id="stage-1")
    assert all(entry["restart_in_s"] <= 0.01 for entry in group.log.all("worker.exited"))
    await group.stop()
