"""Cancellation of long work: how the work asks whether to go on, and what it raises if not."""

from __future__ import annotations

from collections.abc import Callable

Stop = Callable[[], bool]
"""Returns true when the work is no longer wanted."""


class Cancelled(Exception):
    """The work was given up because it is no longer wanted."""
