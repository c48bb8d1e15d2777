"""Unexpected errors: a function in syncd's process raises as a bug in it would."""

from __future__ import annotations

import functools
import inspect
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

ALWAYS = 1_000_000_000


RAISED = ""
"""Name of a function of ``syncd.sync.background.comparison`` that returns the error to raise.

Empty for an error that syncd does not know.
"""


class BrokenOnPurposeError(Exception):
    """An error that syncd does not know."""


def break_function(function: str, times: int, when: str) -> None:
    """Let ``module:path`` raise at its first ``times`` calls for which ``when`` is true.

    ``when`` is a Python expression over ``args``.
    """
    module, _, path = function.partition(":")
    owner = pkgutil.resolve_name(module)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    setattr(owner, name, broken(getattr(owner, name), times, when))


def broken(function: Callable[..., Any], times: int, when: str) -> Callable[..., Any]:
    """The function, which raises first."""
    calls = itertools.count(1)

    def check(args: tuple[Any, ...]) -> None:
        if eval(when, {"args": args}) and next(calls) <= times:  # noqa: S307 - the test's own text
            raise comparison_error() if RAISED else BrokenOnPurposeError("broken on purpose")

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(*args: Any, **named: Any) -> Any:
            check(args)
            return await function(*args, **named)

        return later

    @functools.wraps(function)
    def now(*args: Any, **named: Any) -> Any:
        check(args)
        return function(*args, **named)

    return now


def comparison_error() -> Exception:
    """The error that ``RAISED`` names."""
    error = pkgutil.resolve_name(f"syncd.sync.background.comparison:{RAISED}")()
    assert isinstance(error, Exception)
    return error
