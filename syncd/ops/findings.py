"""What a check found: one line for a person, with the command that mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Literal

import msgspec
import psycopg

from syncd.errors import DatabaseUnreachable, SyncdError
from syncd.postgres.connection import as_database_error, first_line

Level = Literal["ok", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One line: how it is, what was looked at, what was found, and the next step where something is not as it should be."""

    level: Level
    what: str
    detail: str
    fix: str = ""


def ok(what: str, detail: str) -> Finding:
    """All is well."""
    return Finding("ok", what, detail)


def warn(what: str, detail: str, fix: str) -> Finding:
    """The indexes are right, or will be, but this wants attention."""
    return Finding("warn", what, detail, fix)


def fail(what: str, detail: str, fix: str) -> Finding:
    """Something does not work, or will not."""
    return Finding("fail", what, detail, fix)


def guarded(what: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run one check; one that itself fails is a ``warn`` that says so. Raises ``DatabaseUnreachable`` where the database went away."""
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
        fix = "see who is busy: SELECT pid, state, query FROM pg_stat_activity; then run syncd check again"
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
    """A check that failed."""
    return warn(
        what, f"could not be looked at: {error.message}", error.hint or "see the server's log"
    )


def ago(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "an unknown time"
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}s"
    return f"{max(seconds, 0):.0f} s" if seconds >= 1 else f"{max(seconds, 0) * 1000:.0f} ms"


def since(at: datetime | None) -> str:
    """How old the last checkpoint or verify is."""
    return "none yet" if at is None else f"{ago((datetime.now(UTC) - at).total_seconds())} old"


def amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def session(
    pid: int | None, user: str | None, application: str | None, state: str | None, since: str | None
) -> str:
    """Who holds something, as far as this role may see."""
    parts = [
        f"pid {pid}",
        f"application {application!r}" if application else "",
        f"user {user}" if user else "",
        state or "state hidden",
        f"since {since}" if since else "",
    ]
    return ", ".join(part for part in parts if part)
