"""Which process this is, so that a later one can tell whether it still runs."""

import os
import resource
import socket
from pathlib import Path


def machine() -> str:
    """Names this machine since its boot, and the processes that can be seen from here."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        # In a container, process 1 is another one than outside.
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    except OSError:
        # No Linux: its name must do.
        pass
    return "/".join(parts)


def is_gone(machine_name: str, pid: int) -> bool:
    """Whether a process of this machine, not this one, has certainly ended."""
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
    """Memory that this process has in RAM; None where that cannot be told cheaply."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()
