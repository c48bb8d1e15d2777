"""How syncd logs: structlog to stderr, one line an event; text on a terminal, JSON elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Mapping
from typing import TextIO, cast

import structlog

EVENTS_KEPT = 100
SHOWN_CHARACTERS = 300

recent_events: deque[Mapping[str, str]] = deque(maxlen=EVENTS_KEPT)
"""The last events that were logged, the oldest first, for the status page. Logging is the process'
own, and so is this.
"""


def remember(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep an event in memory, as short texts."""
    recent_events.append(
        {str(name): str(value)[:SHOWN_CHARACTERS] for name, value in event.items() if name != "exception"}
    )
    return event


class Unbreakable:
    """A text file whose errors nobody meets: a log on a full disk, or a closed pipe, must not fail
    what is logged.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write as much as goes."""
        with contextlib.suppress(OSError, ValueError):
            return self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()


def configure_logging(*, verbose: bool = False) -> None:
    """Set up structlog once, at the start of a command."""
    terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal and not os.environ.get("NO_COLOR"))
        if terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            remember,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", Unbreakable(sys.stderr))),
        cache_logger_on_first_use=True,
    )
