"""One sentence for operators: when it says what."""

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
    """These, one after the other, the last one now."""
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


def test_memory_by_choice_is_well_and_says_what_it_costs() -> None:
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


def test_a_lost_redis_says_why_since_when_and_what_is_at_stake() -> None:
    verdict = judge(LOST)
    assert verdict.level == "warn"
    assert verdict.text == "Redis is lost: the bands play on from memory."
    assert verdict.since == 50
    assert in_words("timed_out") in verdict.meaning
    # It may come back empty: then what is here is all there is.
    assert "the only copy" in verdict.meaning
    nobody = seconds(replace(SECOND, rooms=0, sessions=0))
    assert "the only copy" not in judge(replace(LOST, samples=nobody)).meaning
    assert "1 session has" in judge(replace(LOST, kept_in_memory=1)).meaning
    at_stake = judge(replace(LOST, kept_in_memory=12))
    assert "12 sessions have" in at_stake.meaning
    # The figure moves, the sentence does not: screen readers speak it.
    assert at_stake.text == verdict.text


def test_a_redis_that_was_never_there() -> None:
    absent = replace(LOST, changes=[ModeChange(7, "memory")], loss=Loss("refused", "nobody"))
    verdict = judge(absent)
    assert verdict.text.startswith("Redis is not there")
    assert verdict.since == 7


def test_the_way_back() -> None:
    assert judge(replace(LOST, connected=True)).text.startswith("Redis answers again")
    moving = replace(LOST, connected=True, migration=Migration(9, 4))
    verdict = judge(moving)
    assert verdict.text.startswith("Redis is back")
    assert "4 of 9" in verdict.meaning
    assert verdict.since == 50


def test_before_the_first_session_is_on_its_way() -> None:
    """The listening to other servers comes first: half a second, if it must."""
    begun = [*LOST.changes, ModeChange(60, "migrating")]
    verdict = judge(replace(LOST, connected=True, changes=begun))
    assert verdict.text == "Redis is back: sessions are on their way to it."
    assert verdict.meaning.startswith("Members")
    assert judge(replace(LOST, connected=True, migration=Migration(0))).meaning.startswith(
        "Members"
    )


def test_a_redis_that_was_never_there_is_not_back() -> None:
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
def test_a_band_on_several_servers_notices(facts: Facts) -> None:
    together = judge(facts)
    assert "Members notice nothing, unless" in together.meaning
    for spread, counted in ((1, "1 session has members"), (3, "3 sessions have members")):
        apart = judge(replace(facts, samples=seconds(replace(SECOND, spread=spread))))
        assert apart.level == "bad"
        assert counted in apart.meaning
        assert "out of reach" in apart.meaning
        assert "notice nothing" not in apart.meaning


def test_a_band_that_was_cut_apart_says_so_in_its_sentence() -> None:
    apart = replace(LOST, samples=seconds(replace(SECOND, spread=1)))
    assert judge(apart).text == "Redis is lost: bands on several servers are cut apart."
    # That is over when Redis is back, which is another state.
    moving = judge(replace(apart, connected=True, migration=Migration(9, 4)))
    assert (moving.level, moving.text[:13]) == ("warn", "Redis is back")
    assert "they meet again" in moving.meaning
    # While Redis is in use it is as good as one server.
    assert judge(replace(WELL, samples=apart.samples)).level == "good"


def test_nobody_trying_again_is_worse() -> None:
    verdict = judge(replace(LOST, gave_up=True, kept_in_memory=1))
    assert verdict.level == "bad"
    assert "REDIS_AUTO_RECOVER" in verdict.meaning
    # Waiting for Redis would be waiting for nothing.
    assert "a restart loses them" in verdict.meaning
    assert "do not stop" not in verdict.meaning


def test_an_outage_begins_with_its_first_loss() -> None:
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


def test_a_lag_must_last() -> None:
    late = replace(SECOND, loop_lag_ms=LATE_MS + 1)
    few = [late] * (LATE_SECONDS - 1)
    assert judge(replace(WELL, samples=seconds(*few, *[SECOND] * 5))).level == "good"
    verdict = judge(replace(WELL, samples=seconds(*few, late, *[SECOND] * 5)))
    assert (verdict.level, verdict.text) == ("bad", "The server is late.")
    assert judge(replace(WELL, samples=seconds(*few, late, *[SECOND] * 20))).level == "good"


@pytest.mark.parametrize(
    ("second", "level", "text"),
    [
        (replace(SECOND, slow_consumers=2), "warn", "Slow clients were let go."),
        (replace(SECOND, internal_errors=2), "bad", "The server fails at commands."),
    ],
)
def test_what_happened_is_shown_for_a_minute(second: Sample, level: str, text: str) -> None:
    verdict = judge(replace(WELL, samples=seconds(second, *[SECOND] * 59)))
    assert (verdict.level, verdict.text) == (level, text)
    assert verdict.meaning.startswith("2 in the last minute")
    assert judge(replace(WELL, samples=seconds(second, *[SECOND] * 60))).level == "good"


def test_other_servers_unheard() -> None:
    deaf = replace(SECOND, listening=False)
    one = replace(WELL, listening=False, samples=seconds(SECOND, SECOND, deaf))
    assert judge(one).level == "good"
    verdict = judge(replace(one, samples=seconds(deaf, deaf, deaf)))
    assert verdict.text.startswith("Changes made on other servers")
    # Where Redis is lost, that says it all.
    assert [each.code for each in judge(replace(LOST, samples=seconds(deaf, deaf))).others] == []


def test_a_clock_that_is_surely_wrong() -> None:
    unsure = replace(SECOND, clock_error_ms=-40, clock_uncertainty_ms=30)
    assert judge(replace(WELL, samples=seconds(unsure))).level == "good"
    verdict = judge(replace(WELL, samples=seconds(replace(unsure, clock_uncertainty_ms=1))))
    assert verdict.level == "warn"
    assert "39 ms" in verdict.meaning


def test_the_worst_is_the_sentence_and_the_others_follow() -> None:
    failing = seconds(replace(SECOND, internal_errors=1))
    verdict = judge(replace(LOST, samples=failing, draining=True))
    assert verdict.text == "The server fails at commands."
    assert [each.code for each in verdict.others] == ["draining", "lost"]


def test_a_full_server_may_have_slow_clients_too() -> None:
    assert judge(replace(WELL, full=True)).others == []
    verdict = judge(replace(WELL, full=True, samples=seconds(replace(SECOND, slow_consumers=5))))
    assert verdict.text == "The server is full."
    assert [each.code for each in verdict.others] == ["slow"]


def test_a_server_that_stops_says_what_ends_with_it() -> None:
    stops = judge(replace(WELL, draining=True))
    assert (stops.level, stops.text) == ("warn", "This server is stopping.")
    chosen = judge(replace(WELL, awaited=False, draining=True, kept_in_memory=2))
    assert chosen.level == "warn"
    assert "2 sessions are in its memory only, as configured" in chosen.meaning
    loses = judge(replace(LOST, draining=True, kept_in_memory=1))
    assert loses.level == "bad"
    assert "1 session is in its memory only" in loses.meaning


def test_every_reason_has_words() -> None:
    for reason in LossReason.__args__:
        assert in_words(reason) != reason
    # A reason from a newer link is better than none.
    assert in_words("unheard_of") == "unheard_of"
