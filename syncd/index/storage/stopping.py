"""Giving long work up: how it asks whether it is still wanted, and what it raises when it is not."""

from __future__ import annotations

from collections.abc import Callable

Stop = Callable[[], bool]
"""Returns true when the work is no longer wanted."""


class Cancelled(Exception):
    """The work was given up because it is no longer wanted."""
