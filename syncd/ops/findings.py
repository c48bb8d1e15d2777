"""Result of a check: one line for a person, with the command that fixes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec
import psycopg

from syncd.errors import DatabaseUnreachable, SyncdError
from syncd.postgres.connection import as_database_error, first_line

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One line: level, subject, result, and the next step if the level is not ``ok``."""

    level: Level
    what: str
    detail: str
    fix: str = ""


def ok(what: str, detail: str) -> Finding:
    """The subject is in order."""
    return Finding("ok", what, detail)


def warn(what: str, detail: str, fix: str) -> Finding:
    """The indexes are correct or will be, but an operator should look at the subject."""
    return Finding("warn", what, detail, fix)


def fail(what: str, detail: str, fix: str) -> Finding:
    """The subject does not work, or will not work."""
    return Finding("fail", what, detail, fix)


def guarded(what: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run one check; a check that raises an error becomes a ``warn`` with the error.

    Raises ``DatabaseUnreachable`` if the connection is lost.
    """
    found: list[Finding] = []
    try:
        found.extend(look())
    except DatabaseUnreachable:
        raise
    except psycopg.errors.InsufficientPrivilege as error:
        fix = (
            "run syncd check as the role that syncd serve connects as, or grant that role the right"
        )
        found.append(warn(what, f"could not be looked at: {first_line(error)}", fix))
    except psycopg.errors.LockNotAvailable:
        fix = "see the lines about locks; run syncd check again when the lock is gone"
        found.append(warn(what, "could not be looked at: another transaction holds a lock", fix))
    except psycopg.errors.QueryCanceled as error:
        fix = (
            "see what is running: SELECT pid, state, query FROM pg_stat_activity; "
            "then run syncd check again"
        )
        found.append(warn(what, f"could not be looked at in time: {first_line(error)}", fix))
    except psycopg.OperationalError as error:
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
            raise DatabaseUnreachable(
                f"the database cannot be reached: {first_line(error)}",
                hint="run syncd check again when it is back",
            ) from error
        found.append(not_looked_at(what, as_database_error(error)))
    except psycopg.Error as error:
        found.append(not_looked_at(what, as_database_error(error)))
    except SyncdError as error:
        found.append(not_looked_at(what, error))
    except OSError as error:
        found.append(
            warn(
                what,
                f"could not be looked at: {error}",
                "run syncd check as the user that runs syncd serve",
            )
        )
    return found


def not_looked_at(what: str, error: SyncdError) -> Finding:
    """Warning about a check that raised an error."""
    return warn(
        what, f"could not be looked at: {error.message}", error.hint or "see the server's log"
    )


def session(
    pid: int | None, user: str | None, application: str | None, state: str | None, since: str | None
) -> str:
    """Description of a server session, as far as this role may see it."""
    parts = [
        f"pid {pid}",
        f"application {application!r}" if application else "",
        f"user {user}" if user else "",
        state or "state hidden",
        f"since {since}" if since else "",
    ]
    return ", ".join(part for part in parts if part)
