"""Durations, ages and sizes for people."""

from __future__ import annotations

from datetime import UTC, datetime


def ago(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "an unknown time"
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}s"
    return f"{max(seconds, 0):.0f} s" if seconds >= 1 else f"{max(seconds, 0) * 1000:.0f} ms"


def since(at: datetime | None) -> str:
    """Age of the last checkpoint or verify, for people."""
    return "none yet" if at is None else f"{ago((datetime.now(UTC) - at).total_seconds())} old"


def amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
