"""Which of several workers a session lives on, so that all of them agree without a word."""

from hashlib import blake2b


def preference(session_id: str, workers: int) -> list[int]:
    """The workers, from 1, in the order in which the session would have them.

    Whoever cannot have the first takes the next: when a worker is gone its sessions are spread
    over the others, and every other session stays where it is. This is rendezvous hashing (Thaler
    and Ravishankar, *Using name-based mappings to increase hit rates*, 1998).
    """
    name = session_id.encode()
    return sorted(range(1, workers + 1), key=lambda number: _weight(number, name))


def _weight(number: int, name: bytes) -> bytes:
    return blake2b(name, digest_size=8, salt=number.to_bytes(4, "big")).digest()
