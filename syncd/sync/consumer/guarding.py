"""Errors of one source during a pass: they fail this source, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors as pg

from syncd.errors import ConsumerReplaced, DatabaseUnreachable, SyncdError, Trouble
from syncd.postgres.connection import first_line
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import explained

CONNECTION_LOST = ("08", "57P", "25P")
"""Classes of SQLSTATE that end the session, or make it unusable.

An error without an SQLSTATE is psycopg's own, and counts as the first of them.
"""


class StartAgain(Exception):
    """The pass must begin again, with other sources locked, or without one that failed."""


class ReadRegistryAgain(Exception):
    """A source could not be read, perhaps because a name in its rules has changed."""


@contextmanager
def guarded(connection: psycopg.Connection, each: FollowedSource) -> Iterator[None]:
    """Do work for one source; its error fails this source, which is tried again later."""
    try:
        yield
    except (StartAgain, ReadRegistryAgain, ConsumerReplaced, DatabaseUnreachable):
        raise
    except Exception as error:
        if not is_of_source(connection, each, error):
            raise


def is_of_source(connection: psycopg.Connection, each: FollowedSource, error: Exception) -> bool:
    """Whether an error concerns one source only; if so, the source notes it.

    An error of the server has ended the transaction. Then this raises ``StartAgain`` or
    ``ReadRegistryAgain``: the pass begins again, without the source or with its present names.
    """
    if isinstance(error, pg.LockNotAvailable):  # REINDEX locks an index as well as its table
        locked = Trouble("another transaction holds a lock on the table or an index of it")
        each.behind(locked, now=time.monotonic())
        raise StartAgain from error
    if isinstance(error, psycopg.Error):
        state = error.sqlstate or CONNECTION_LOST[0]
        if connection.broken or state.startswith(CONNECTION_LOST):
            return False
        if isinstance(error, psycopg.OperationalError):  # a time-out, a deadlock, no memory
            later = Trouble(f"it cannot be read now: {first_line(error)}", "syncd check", "see")
            each.behind(later, now=time.monotonic())
        elif not each.careful:
            # first read it with the present names, then find the failing row and read the others
            each.careful = True
            raise ReadRegistryAgain from error
        else:
            each.failed(explained(each, error, connection.info.user), now=time.monotonic())
        raise StartAgain from error
    if isinstance(error, SyncdError | OSError):
        each.failed(Trouble(str(error)), now=time.monotonic())
    else:
        each.failed_unexpectedly(error, now=time.monotonic())
    return True
