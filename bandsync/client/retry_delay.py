"""The delay before the next attempt to connect. Pure: the random number is an argument."""

# Upper bound of the first delay; the lower bound is half of it.
_FIRST_S = 0.6
_LONGEST_S = 8.0
# After 1013 or 503 (full server, slow consumer). The first delay is within the resume grace of 10
# s.
_FIRST_SLOW_S = 4.0
_LONGEST_SLOW_S = 30.0


def delay_s(waits: int, draw: float, *, slow: bool = False) -> float:
    """Seconds to wait: jittered exponential backoff from 0.3–0.6 s up to 4–8 s.

    Args:
        waits: number of waits since the last good connection.
        draw: a random number from 0 to 1; the jitter avoids a thundering herd.
        slow: the server is overloaded: from 2–4 s up to 15–30 s.
    """
    first, longest = (_FIRST_SLOW_S, _LONGEST_SLOW_S) if slow else (_FIRST_S, _LONGEST_S)
    # 16 doublings exceed the longest delay and cannot overflow.
    ceiling = min(longest, first * 2.0 ** min(waits, 16))
    return ceiling * (1 + draw) / 2
