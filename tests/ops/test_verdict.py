"""The verdict: which facts lead to which sentence for operators."""

import pytest
from msgspec.structs import replace

from bandsync.ops.loss_reasons import in_words
from bandsync.ops.samples import Sample
from bandsync.ops.verdict import LATE_MS, LATE_SECONDS, Facts, degraded_since, judge
from bandsync.redis_link.errors import LossReason
from bandsync.storage.era import Loss
from bandsync.storage.history import Failover, Migration, ModeChange, Recovery

NOW = 1_000_000.0

SECOND = Sample(
    at=NOW,
    lasted_ms=1000,
    connections=4,
    members=4,
    rooms=1,
    sessions=1,
    spread=0,
    mode="redis",
    degraded=False,
    listening=True,
    deliveries_per_s=40,
    received_per_s=2,
    dropped_per_s=0,
    slow_consumers=0,
    internal_errors=0,
    command=None,
    commit=None,
    loop_lag_ms=1,
    link_queue=0,
    round_trip_ms=0.3,
    clock_error_ms=0.1,
    clock_uncertainty_ms=0.2,
    memory_bytes=None,
    cpu=0.1,
)


def seconds(*samples: Sample) -> list[Sample]:
    """These samples at successive seconds, the last one now."""
    first = NOW - 1000 * (len(samples) - 1)
    return [replace(each, at=first + 1000 * number) for number, each in enumerate(samples)]


WELL = Facts(
    now=NOW,
    awaited=True,
    degraded=False,
    connected=True,
    gave_up=False,
    loss=None,
    kept_in_memory=0,
    listening=True,
    migration=None,
    changes=[ModeChange(0, "memory"), ModeChange(1, "migrating"), ModeChange(2, "redis")],
    draining=False,
    full=False,
    samples=seconds(*[SECOND] * 60),
)
LOST = replace(
    WELL,
    degraded=True,
    connected=False,
    listening=False,
    loss=Loss("timed_out", "no answer for 1.0 s"),
    changes=[*WELL.changes, ModeChange(50, "memory", failover=Failover(50, "reset", "gone"))],
)


def test_all_is_well() -> None:
    verdict = judge(WELL)
    assert (verdict.level, verdict.text, verdict.others) == ("good", "All is well.", [])
    assert "Redis" in verdict.meaning


def test_memory_by_configuration_is_well_and_warns_of_restarts() -> None:
    chosen = replace(
        WELL,
        awaited=False,
        connected=False,
        listening=False,
        kept_in_memory=3,
        changes=[ModeChange(0, "memory (disabled)")],
    )
    verdict = judge(chosen)
    assert verdict.level == "good"
    assert "restart" in verdict.meaning


def test_lost_redis_shows_reason_start_and_data_at_stake() -> None:
    verdict = judge(LOST)
    assert verdict.level == "warn"
    assert verdict.text == "Redis is lost: the bands play on from memory."
    assert verdict.since == 50
    assert in_words("timed_out") in verdict.meaning
    # Redis may come back empty: then this memory is the only copy.
    assert "the only copy" in verdict.meaning
    idle = seconds(replace(SECOND, rooms=0, sessions=0))
    assert "the only copy" not in judge(replace(LOST, samples=idle)).meaning
    assert "1 session has" in judge(replace(LOST, kept_in_memory=1)).meaning
    at_stake = judge(replace(LOST, kept_in_memory=12))
    assert "12 sessions have" in at_stake.meaning
    # The figure moves, the sentence does not, because screen readers speak it.
    assert at_stake.text == verdict.text


def test_absent_redis_is_not_called_lost() -> None:
    absent = replace(LOST, changes=[ModeChange(7, "memory")], loss=Loss("refused", "nobody"))
    verdict = judge(absent)
    assert verdict.text.startswith("Redis is not there")
    assert verdict.since == 7


def test_recovery_is_shown_with_its_progress() -> None:
    assert judge(replace(LOST, connected=True)).text.startswith("Redis answers again")
    moving = replace(LOST, connected=True, migration=Migration(9, 4))
    verdict = judge(moving)
    assert verdict.text.startswith("Redis is back")
    assert "4 of 9" in verdict.meaning
    assert verdict.since == 50


def test_migration_is_shown_before_its_first_session() -> None:
    """The subscription to other servers comes first, and may take half a second."""
    begun = [*LOST.changes, ModeChange(60, "migrating")]
    verdict = judge(replace(LOST, connected=True, changes=begun))
    assert verdict.text == "Redis is back: sessions are moving to it."
    assert verdict.meaning.startswith("Members")
    assert judge(replace(LOST, connected=True, migration=Migration(0))).meaning.startswith(
        "Members"
    )


def test_redis_used_for_the_first_time_is_not_called_back() -> None:
    absent = replace(LOST, changes=[ModeChange(7, "memory")])
    assert judge(replace(absent, connected=True)).text.startswith("Redis answers, ")
    moving = replace(absent, connected=True, migration=Migration(9, 4))
    assert judge(moving).text.startswith("Redis is there")
    assert judge(replace(absent, gave_up=True)).text.startswith("Redis is not there")


@pytest.mark.parametrize(
    "facts",
    [LOST, replace(LOST, connected=True), replace(LOST, gave_up=True)],
    ids=["lost", "proving", "gave up"],
)
def test_effect_on_bands_on_several_servers_is_shown(facts: Facts) -> None:
    together = judge(facts)
    assert "Members notice nothing, unless" in together.meaning
    for spread, counted in ((1, "1 session has members"), (3, "3 sessions have members")):
        apart = judge(replace(facts, samples=seconds(replace(SECOND, spread=spread))))
        assert apart.level == "bad"
        assert counted in apart.meaning
        assert "out of reach" in apart.meaning
        assert "notice nothing" not in apart.meaning


def test_bands_cut_apart_change_the_sentence() -> None:
    apart = replace(LOST, samples=seconds(replace(SECOND, spread=1)))
    assert judge(apart).text == "Redis is lost: bands on several servers are cut apart."
    # During the migration the servers exchange changes again.
    moving = judge(replace(apart, connected=True, migration=Migration(9, 4)))
    assert (moving.level, moving.text[:13]) == ("warn", "Redis is back")
    assert "they are together again" in moving.meaning
    # Several servers are no finding while Redis is in use.
    assert judge(replace(WELL, samples=apart.samples)).level == "good"


def test_ended_reconnecting_is_bad() -> None:
    verdict = judge(replace(LOST, gave_up=True, kept_in_memory=1))
    assert verdict.level == "bad"
    assert "REDIS_AUTO_RECOVER" in verdict.meaning
    # Redis is not tried again: advice to wait for it would be wrong.
    assert "a restart loses them" in verdict.meaning
    assert "do not stop" not in verdict.meaning


def test_outage_starts_with_its_first_loss() -> None:
    flapping = [
        *WELL.changes,
        ModeChange(50, "memory", failover=Failover(50, "reset", "gone")),
        ModeChange(60, "migrating"),
        ModeChange(61, "memory", failover=Failover(61, "reset", "gone again")),
    ]
    assert degraded_since(flapping) == 50
    healed = [
        *flapping,
        ModeChange(70, "redis", recovery=Recovery(70, 20, 1, 1)),
        ModeChange(90, "memory"),
    ]
    assert degraded_since(healed) == 90


def test_lag_is_a_finding_only_when_it_lasts() -> None:
    late = replace(SECOND, loop_lag_ms=LATE_MS + 1)
    few = [late] * (LATE_SECONDS - 1)
    assert judge(replace(WELL, samples=seconds(*few, *[SECOND] * 5))).level == "good"
    verdict = judge(replace(WELL, samples=seconds(*few, late, *[SECOND] * 5)))
    assert (verdict.level, verdict.text) == ("bad", "The server is overloaded.")
    assert judge(replace(WELL, samples=seconds(*few, late, *[SECOND] * 20))).level == "good"


@pytest.mark.parametrize(
    ("second", "level", "text"),
    [
        (replace(SECOND, slow_consumers=2), "warn", "Slow clients were disconnected."),
        (
            replace(SECOND, internal_errors=2),
            "bad",
            "Commands fail because of a bug in the server.",
        ),
    ],
)
def test_event_is_shown_for_a_minute(second: Sample, level: str, text: str) -> None:
    verdict = judge(replace(WELL, samples=seconds(second, *[SECOND] * 59)))
    assert (verdict.level, verdict.text) == (level, text)
    assert verdict.meaning.startswith("2 in the last minute")
    assert judge(replace(WELL, samples=seconds(second, *[SECOND] * 60))).level == "good"


def test_lost_subscription_is_a_finding_after_three_seconds() -> None:
    unsubscribed = replace(SECOND, listening=False)
    one = replace(WELL, listening=False, samples=seconds(SECOND, SECOND, unsubscribed))
    assert judge(one).level == "good"
    verdict = judge(replace(one, samples=seconds(unsubscribed, unsubscribed, unsubscribed)))
    assert verdict.text.startswith("Changes made on other servers")
    # The loss of Redis includes it.
    assert [
        each.code
        for each in judge(replace(LOST, samples=seconds(unsubscribed, unsubscribed))).others
    ] == []


def test_clock_error_is_a_finding_when_it_exceeds_its_uncertainty() -> None:
    unsure = replace(SECOND, clock_error_ms=-40, clock_uncertainty_ms=30)
    assert judge(replace(WELL, samples=seconds(unsure))).level == "good"
    verdict = judge(replace(WELL, samples=seconds(replace(unsure, clock_uncertainty_ms=1))))
    assert verdict.level == "warn"
    assert "39 ms" in verdict.meaning


def test_worst_finding_is_the_sentence() -> None:
    failing = seconds(replace(SECOND, internal_errors=1))
    verdict = judge(replace(LOST, samples=failing, draining=True))
    assert verdict.text == "Commands fail because of a bug in the server."
    assert [each.code for each in verdict.others] == ["draining", "lost"]


def test_full_server_is_worse_than_slow_clients() -> None:
    assert judge(replace(WELL, full=True)).others == []
    verdict = judge(replace(WELL, full=True, samples=seconds(replace(SECOND, slow_consumers=5))))
    assert verdict.text == "The server is full."
    assert [each.code for each in verdict.others] == ["slow"]


def test_draining_server_counts_the_sessions_that_end_with_it() -> None:
    stops = judge(replace(WELL, draining=True))
    assert (stops.level, stops.text) == ("warn", "This server is stopping.")
    chosen = judge(replace(WELL, awaited=False, draining=True, kept_in_memory=2))
    assert chosen.level == "warn"
    assert "2 sessions are in its memory only, as configured" in chosen.meaning
    loses = judge(replace(LOST, draining=True, kept_in_memory=1))
    assert loses.level == "bad"
    assert "1 session is in its memory only" in loses.meaning


def test_every_loss_reason_has_words() -> None:
    for reason in LossReason.__args__:
        assert in_words(reason) != reason
    # An unknown reason is shown as it is.
    assert in_words("new_reason") == "new_reason"
