"""Cancellation of long work: the question whether to go on, and the exception if not."""

from __future__ import annotations

from collections.abc import Callable

Stop = Callable[[], bool]
"""Function that returns true if the work is no longer wanted."""


class Cancelled(Exception):
    """The work ended early because it is no longer wanted."""
