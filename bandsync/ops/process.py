"""Identity of this process, so that a later one can find out whether it still runs."""

import os
import resource
import socket
from pathlib import Path


def machine() -> str:
    """An id of this machine since its boot, and of the process namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        # Process ids in a container are not those outside.
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    except OSError:
        # Not Linux: only the host name is known.
        pass
    return "/".join(parts)


def is_gone(machine_name: str, pid: int) -> bool:
    """Whether another process of this machine has certainly ended."""
    if machine_name != machine() or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def resident_bytes() -> int | None:
    """Resident memory of this process, bytes; None where `/proc` does not have it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()
