"""How long to wait before the next attempt to connect. Pure: chance is an argument."""

# The least wait is half of it.
_FIRST_S = 0.6
_LONGEST_S = 8.0
# After 1013 or 503: the server is full or we were too slow. Still within the resume grace of 10 s.
_FIRST_SLOW_S = 4.0
_LONGEST_SLOW_S = 30.0


def delay_s(waits: int, draw: float, *, slow: bool = False) -> float:
    """Seconds to wait: exponential with jitter, 0.3 to 0.6 s at first and 4 to 8 s at last.

    Args:
        waits: how often this was waited since the last good connection.
        draw: a random number from 0 to 1, so that a thousand clients do not come back at once.
        slow: the server asked to be left alone for a while: 2 to 4 s at first, 15 to 30 s at last.
    """
    first, longest = (_FIRST_SLOW_S, _LONGEST_SLOW_S) if slow else (_FIRST_S, _LONGEST_S)
    # Far beyond the longest, and no overflow after a night without a network.
    ceiling = min(longest, first * 2.0 ** min(waits, 16))
    return ceiling * (1 + draw) / 2
