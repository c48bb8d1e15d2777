"""Checks of the server's sessions: locks, open writers, old and prepared transactions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from syncd.ops.amounts import ago
from syncd.ops.findings import Finding, ok, session, warn
from syncd.ops.look import Look
from syncd.postgres.source import Source

OLD_TRANSACTION_SECONDS = 300.0
IDLE_SECONDS = 60.0
ORPHAN_SECONDS = 300.0
FULL_QUEUE_SHARE = 0.5
"""Share of the server's notification queue from which syncd's triggers no longer notify."""
SEE_OTHERS = 'GRANT pg_read_all_stats TO "{role}"; shows more of other roles\' sessions'


def check_locks(look: Look, sources: Sequence[Source] | None = None) -> Iterator[Finding]:
    """No session locks a source against reading."""
    relations = look.relations(look.sources if sources is None else sources)
    found = False
    for (
        relation,
        pid,
        granted,
        blockers,
        user,
        application,
        state,
        query,
        seconds,
        since,
    ) in look.rows("read_exclusive_locks", [relations]):
        found = True
        who = session(pid, user, application, state, since)
        waits = (
            ""
            if granted
            else f", and waits for pid {', '.join(map(str, blockers)) or 'unknown'}: "
            "readers queue behind it"
        )
        detail = (
            f"{who} {'holds' if granted else 'asks for'} ACCESS EXCLUSIVE on {relation}{waits}; "
            f"for {ago(seconds)}; query: {query or 'hidden'}"
        )
        ended = pid if granted or not blockers else blockers[0]
        how = (
            "pg_terminate_backend"
            if (state or "").startswith("idle") or not granted
            else "pg_cancel_backend"
        )
        yield warn(
            f"locks on {relation}",
            detail,
            f"let it end its transaction, or: SELECT {how}({ended});",
        )
    if not found:
        yield ok("locks", "no session locks a source against reading")


@dataclass(frozen=True, slots=True)
class Writer:
    """An open transaction that has written to sources. Times are None if hidden from this role."""

    pid: int
    who: str
    is_idle: bool
    open_seconds: float | None
    idle_seconds: float | None
    query: str
    tables: Sequence[str]


def read_writers(look: Look, sources: Sequence[Source]) -> list[Writer]:
    """Open transactions that have written to these sources."""
    return [
        Writer(
            pid,
            session(pid, user, application, state, since),
            (state or "").startswith("idle in transaction"),
            seconds,
            idle,
            query or "hidden",
            tables,
        )
        for pid, user, application, state, query, seconds, idle, since, tables in look.rows(
            "read_writers", [look.relations(sources)]
        )
    ]


def check_writers(look: Look) -> Iterator[Finding]:
    """No session is idle in a transaction that has written to a source."""
    found = False
    for writer in read_writers(look, look.sources):
        if (
            writer.is_idle
            and writer.idle_seconds is not None
            and writer.idle_seconds >= IDLE_SECONDS
        ):
            found = True
            detail = (
                f"{writer.who} has written to {', '.join(writer.tables)} and been idle for "
                f"{ago(writer.idle_seconds)}: its writes are not committed; "
                f"last query: {writer.query}"
            )
            fix = (
                f"let it commit, or: SELECT pg_terminate_backend({writer.pid}); "
                "to prevent it: set idle_in_transaction_session_timeout"
            )
            yield warn("idle in transaction", detail, fix)
    if not found:
        yield ok("idle in transaction", "no session that has written to a source")


def check_oldest_transaction(look: Look) -> Iterator[Finding]:
    """No transaction of the server is very old: PostgreSQL cannot free dead rows after its start.

    The same holds for the rows of the outbox.
    """
    rows = look.rows("read_oldest_transactions")
    old = [row for row in rows if row[6] is not None and row[6] >= OLD_TRANSACTION_SECONDS]
    for pid, database, user, application, state, query, seconds, since in old:
        detail = (
            f"{session(pid, user, application, state, since)}, database {database}, "
            f"open for {ago(seconds)}; query: {query}"
        )
        yield warn("transactions", detail, f"let it end, or: SELECT pg_terminate_backend({pid});")
    if not old:
        visible = [row[6] for row in rows if row[6] is not None]
        shown = f"the oldest is open for {ago(visible[0])}" if visible else "none is open"
        hidden = sum(row[6] is None for row in rows)
        more = (
            f"; {hidden} of other roles hide their start ({SEE_OTHERS.format(role=look.role)})"
            if hidden
            else ""
        )
        yield ok("transactions", shown + more)


def check_notification_queue(look: Look) -> Iterator[Finding]:
    """The server's queue of notifications has room; if it is full, each NOTIFY fails."""
    row = look.row("read_notification_queue")
    usage, pid, database, user, application, state, query, seconds, since = row
    if usage < FULL_QUEUE_SHARE:
        yield ok("notification queue", f"{usage:.0%} full")
        return
    detail = (
        f"the server's queue is {usage:.0%} full: syncd does not notify and finds changes by its "
        "poll; "
        "if the queue is full, every NOTIFY of another program fails at COMMIT"
    )
    search = (
        "as a superuser, find the oldest transaction of a session that listens: "
        "SELECT pid, xact_start, query FROM pg_stat_activity "
        "WHERE xact_start IS NOT NULL ORDER BY 2; end it: SELECT pg_terminate_backend(PID);"
    )
    if pid is None:
        yield warn("notification queue", detail, search)
        return
    who = session(pid, user, application, state, since)
    detail += (
        f"; a listener in a transaction keeps it full, most likely {who}, database {database}, "
        f"in a transaction for {ago(seconds)}; last query: {query or 'hidden'}"
    )
    yield warn("notification queue", detail, f"let it end, or: SELECT pg_terminate_backend({pid});")


def check_prepared_transactions(
    look: Look, sources: Sequence[Source] | None = None, *, old_seconds: float | None = None
) -> Iterator[Finding]:
    """No prepared transaction was forgotten.

    With ``sources``: only transactions that have written to one of them.
    """
    relations = look.relations(look.sources if sources is None else sources)
    rows = look.rows("read_prepared_transactions", [relations])
    limit = ORPHAN_SECONDS if old_seconds is None else old_seconds
    old = [row for row in rows if row[3] >= limit and (sources is None or row[5])]
    for gid, owner, database, seconds, since, tables in old:
        quoted = gid.replace("'", "''")
        on = (
            f", with changes of {', '.join(tables)} that are invisible until it ends"
            if tables
            else ""
        )
        detail = (
            f"{gid!r} of user {owner} in database {database} was prepared at {since}, "
            f"{ago(seconds)} ago{on}"
        )
        fix = (
            f"in database {database}, as {owner}: ROLLBACK PREPARED '{quoted}'; "
            f"or COMMIT PREPARED '{quoted}';"
        )
        yield warn("prepared transactions", detail, fix)
    if not old:
        yield ok("prepared transactions", f"{len(rows)}, none forgotten" if rows else "none")
