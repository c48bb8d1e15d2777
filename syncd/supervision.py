"""Supervision of background tasks: each is started again after an error, with a growing delay.

Failing tasks are listed for ``status``. Invariant: an error in one task ends neither the service
nor another task. There are two exceptions, which end the process: ``ConsumerReplaced``, and an
error before a task has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus

from syncd.errors import ConsumerReplaced, SyncdError

FIRST_RETRY_SECONDS = 0.25
LAST_RETRY_SECONDS = 60.0
SETTLED_SECONDS = 60.0
"""A task that runs this long after a retry no longer counts as failing."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Failing:
    """One task that fails: its last error, errors in a row, and the time of its retry.

    ``retry_at`` is in seconds of ``time.monotonic``.
    """

    task: str
    error: str
    failures: int
    retry_at: float


class Startable(Protocol):
    """A task that reports when it has started."""

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        """Run the task; it calls ``task_status.started`` when it has started."""


class Tasks:
    """The tasks that fail.

    Only the event loop changes them; ``listed`` may be called from any thread.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter(consumer=0)
        """Errors of each task since the start; 0 for a task that never failed."""
        self.failing: dict[str, Failing] = {}

    def failed(self, task: str, error: BaseException, retry_seconds: float) -> None:
        """Note an error of a task, which is tried again after ``retry_seconds``."""
        self.failures[task] += 1
        before = self.failing.get(task)
        in_a_row = 1 if before is None or is_settled(before) else before.failures + 1
        retry_at = time.monotonic() + retry_seconds
        self.failing[task] = Failing(task, describe(error), in_a_row, retry_at)

    def well(self, task: str) -> None:
        """Note that a task has done its work."""
        self.failing.pop(task, None)

    def listed(self) -> list[Failing]:
        """The tasks that fail now, by name."""
        return sorted(
            (each for each in list(self.failing.values()) if not is_settled(each)),
            key=lambda each: each.task,
        )

    async def keep(self, task: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a task, and run it again after an error, until it returns or is cancelled."""
        await self.keep_running(task, run, lambda: True)

    async def keep_started(
        self, task: str, run: Startable, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
    ) -> None:
        """``keep`` for a task that reports when it has started.

        An error before that is raised, and ends the start.
        """
        status = FirstStart(task_status)
        await self.keep_running(task, lambda: run(task_status=status), lambda: status.has_started)

    async def keep_running(
        self, task: str, run: Callable[[], Awaitable[None]], has_started: Callable[[], bool]
    ) -> None:
        """The loop of ``keep`` and ``keep_started``."""
        # so that the metric exists before the first error: else it would show no increase
        self.failures[task] += 0
        while True:
            try:
                await run()
            except ConsumerReplaced:
                raise
            except Exception as error:
                if not has_started():
                    raise
                before = self.failing.get(task)
                in_a_row = 0 if before is None or is_settled(before) else before.failures
                delay = min(FIRST_RETRY_SECONDS * 2 ** min(in_a_row, 16), LAST_RETRY_SECONDS)
                self.failed(task, error, delay)
                logger.exception("task_failed", task=task, retry_in_seconds=delay)
                await anyio.sleep(delay)
            else:
                return


class FirstStart(TaskStatus[None]):
    """Passes on the first ``started`` only: a task that is started again calls it again."""

    def __init__(self, status: TaskStatus[None]) -> None:
        self.status = status
        self.has_started = False

    def started(self, value: None = None) -> None:
        """Note that the task has started."""
        if not self.has_started:
            self.has_started = True
            self.status.started(value)


async def stop_at_signal(stopping: anyio.Event) -> None:
    """Set ``stopping`` at the first SIGTERM or SIGINT; the second one ends the process at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if stopping.is_set():
                logger.warning("stopped_at_once", signal=number.name)
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(1)
            logger.info("stopping", signal=number.name)
            stopping.set()


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to raise for nested groups; syncd's own errors come before others."""
    errors: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(error.exceptions)
        else:
            errors.append(error)
    return next((error for error in errors if isinstance(error, SyncdError)), errors[0])


def describe(error: BaseException) -> str:
    """The text of an error: syncd's own message, or another error's type and message."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error).strip()
    if text and hasattr(error, "kind"):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_settled(failing: Failing) -> bool:
    """Whether the task has run for ``SETTLED_SECONDS`` since its retry."""
    return time.monotonic() > failing.retry_at + SETTLED_SECONDS
