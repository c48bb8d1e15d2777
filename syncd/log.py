"""syncd's log: structlog on stderr, one line per event; text on a terminal, JSON elsewhere."""

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
"""The last logged events, the oldest first, for the status page.

They are global because logging is: both belong to the process.
"""


def remember(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Keep an event in memory, with its values as short texts."""
    shown = [(str(name), str(value)) for name, value in event.items() if name != "exception"]
    recent_events.append({name: value[:SHOWN_CHARACTERS] for name, value in shown})
    return event


class Unbreakable:
    """A text file that ignores errors: a full disk or a closed pipe must not fail other work."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> int:
        """Write ``text`` if possible."""
        with contextlib.suppress(OSError, ValueError):
            return self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()


def configure_logging(*, verbose: bool = False) -> None:
    """Set up structlog once, at the start of a command."""
    terminal, level = sys.stderr.isatty(), logging.DEBUG if verbose else logging.INFO
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
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", Unbreakable(sys.stderr))),
        cache_logger_on_first_use=True,
    )
