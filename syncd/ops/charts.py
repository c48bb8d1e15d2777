"""Charts of the last hour as inline SVG: the page needs neither assets nor a script for them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 360, 90
SPAN_SECONDS = 3600.0
GAP_SECONDS = 35.0
"""Samples further apart are not joined: the process was suspended, or nothing was measured."""

Point = tuple[float, float | None]


def chart(title: str, unit: str, series: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """Lines over time; ``series`` are (name, points of (time, value)).

    The caption shows the newest and the largest value.
    """
    values = [value for _, points in series for _, value in points if value is not None]
    top = max([*values, 0.0]) or 1.0
    newest = max((at for _, points in series for at, _ in points), default=0.0)
    lines = "".join(
        f'<polyline class="s{number}" points="{stretch}"/>'
        for number, (_, points) in enumerate(series)
        for stretch in stretches(points, newest - SPAN_SECONDS, SPAN_SECONDS, top)
    )
    now = ", ".join(f"{name} {shown(last(points), unit)}".strip() for name, points in series)
    text = f"{title}: now {now}; highest {shown(max(values, default=None), unit)}"
    return (
        f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(now)}</span>"
        f" <small>highest {escape(shown(max(values, default=None), unit))}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none"'
        f' role="img" aria-label="{escape(text)}">'
        f'<line x1="0" y1="{HEIGHT - 1}" x2="{WIDTH}" y2="{HEIGHT - 1}"/>{lines}</svg></figure>'
    )


def stretches(points: Sequence[Point], start: float, span: float, top: float) -> list[str]:
    """The coordinates of each unbroken stretch of a line."""
    found: list[list[str]] = []
    before = None
    for at, value in points:
        if value is None or at < start:
            before = None
            continue
        if before is None or at - before > GAP_SECONDS:
            found.append([])
        found[-1].append(
            f"{(at - start) / span * WIDTH:.1f},{(HEIGHT - 2) * (1 - value / top) + 1:.1f}"
        )
        before = at
    return [" ".join(each if len(each) > 1 else [*each, *each]) for each in found]


def last(points: Sequence[Point]) -> float | None:
    """The newest value."""
    return points[-1][1] if points else None


def shown(value: float | None, unit: str) -> str:
    """A value for people."""
    if value is None:
        return "–"
    if unit == "ms":
        value *= 1000
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
