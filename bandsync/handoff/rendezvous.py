"""Rendezvous hashing: which worker a session belongs to, without any communication.

Thaler and Ravishankar, *Using name-based mappings to increase hit rates*, 1998.
"""

from hashlib import blake2b


def preference(session_id: str, workers: int) -> list[int]:
    """The numbers of the workers, from 1, in the order in which the session prefers them.

    If the first is unavailable, the session uses the next. When a worker stops, its sessions are
    spread over the others, and every other session stays where it is.
    """
    name = session_id.encode()
    return sorted(range(1, workers + 1), key=lambda number: _weight(number, name))


def _weight(number: int, name: bytes) -> bytes:
    return blake2b(name, digest_size=8, salt=number.to_bytes(4, "big")).digest()
