"""The cores that this process may use, by its affinity and its control groups; its memory."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Number of usable cores, at least one.

    A container with the time of two cores on a machine with 64 cores has two.
    """
    bound = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(bound, cgroup_cores())))


def cgroup_cores() -> float:
    """The smallest limit of the control groups around this process; infinite if there is none.

    Source: cgroups(7), both versions.
    """
    least = math.inf
    for folder in folders():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                least = min(least, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                least = min(least, int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    return least


def folders() -> list[Path]:
    """Directories of the process's control groups and the groups around them.

    Inside a container the outermost group is the container's own.
    """
    found: list[Path] = [CGROUPS, CGROUPS / "cpu"]
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                root = CGROUPS / "cpu" if controllers else CGROUPS
                inner = root / path.strip("/")
                found += [inner, *(outer for outer in inner.parents if outer.is_relative_to(root))]
    return found


def memory_bytes() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def has_uvloop() -> bool:
    """Whether the faster event loop is installed."""
    return importlib.util.find_spec("uvloop") is not None
