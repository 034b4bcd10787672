"""How much memory there is for weights."""

from __future__ import annotations

import contextlib
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What this process may still take without pushing others out; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        found.append(int((GROUP / "memory.max").read_text(encoding="ascii")) - int((GROUP / "memory.current").read_text(encoding="ascii")))
    return min(found, default=None)


def fits(size: int, share: float = 0.7) -> bool:
    """Whether `size` bytes take at most `share` of it; not where that is not known."""
    available = available_bytes()
    return available is not None and size <= share * available
