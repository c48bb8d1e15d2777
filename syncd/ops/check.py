"""Checks that change nothing: versions, machine, service, database and each source.

``examine`` reports each problem as a finding and does not raise: an unreachable database is one
``fail``, and a check that raises an error is a ``warn`` with the error.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from psycopg import sql

from syncd.errors import DatabaseError, DatabaseUnreachable
from syncd.ops.amounts import ago, amount
from syncd.ops.check_database import (
    check_encoding,
    check_publications,
    check_read_only,
    check_search,
)
from syncd.ops.check_machine import (
    check_clock,
    check_data_directory,
    check_disk,
    check_program,
    index_bytes,
)
from syncd.ops.check_service import LAG_SECONDS, check_service
from syncd.ops.check_sources import READING_CHECKS, SOURCE_CHECKS
from syncd.ops.findings import Finding, fail, guarded, ok, warn
from syncd.ops.look import Look, ask_service, looking
from syncd.ops.sessions import (
    check_locks,
    check_notification_queue,
    check_oldest_transaction,
    check_prepared_transactions,
    check_writers,
)
from syncd.postgres import schema
from syncd.postgres.layout import read_sources
from syncd.postgres.rights import grant_own_tables
from syncd.postgres.source import Source
from syncd.settings import Settings
from syncd.sync.background.reports import MAX_REPORTED_ROWS

NEWEST_SERVER_VERSION = 18
STALE_CONSUMER_SECONDS = 600.0
OUTBOX_ROW_BYTES = 60
OUTBOX_SHARE = 0.5


def examine(settings: Settings, socket: Path | str) -> list[Finding]:
    """All findings, in the order in which an operator should read them."""
    service = ask_service(socket)
    found = guarded("program", check_program)
    try:
        with looking(settings, service) as look:
            found += [
                *guarded("server", lambda: check_server(look)),
                *guarded("encoding", lambda: check_encoding(look)),
                *guarded("read-only", lambda: check_read_only(look)),
                *guarded("clock", lambda: check_clock(look)),
                *check_schema(look),
            ]
    except DatabaseError as error:
        found.append(fail("database", error.message, error.hint))
        need = 0
    else:
        need = sum(index_bytes(look, source) for source in look.sources)
    return [
        *found,
        *guarded("service", lambda: check_service(settings, service)),
        *guarded("data directory", lambda: check_data_directory(settings, service)),
        *guarded("disk", lambda: check_disk(settings, service, need)),
    ]


def check_server(look: Look) -> Iterator[Finding]:
    """The server has a version that syncd knows, and it is not a standby."""
    shown, number, look.role, in_recovery, pgvector = look.row("read_server")
    with_pgvector = f", pgvector {pgvector}" if pgvector else ""
    if number < schema.MINIMUM_SERVER_VERSION:
        yield fail("server", f"PostgreSQL {shown}: syncd needs 14 or later", "upgrade the server")
    elif in_recovery:
        yield fail(
            "server",
            f"PostgreSQL {shown} is a standby",
            "name the primary, or all hosts, in SYNCD_DSN",
        )
    elif number // 10000 > NEWEST_SERVER_VERSION:
        detail = (
            f"PostgreSQL {shown} is newer than the versions that this syncd was tried with "
            f"({NEWEST_SERVER_VERSION})"
        )
        yield warn("server", detail, "pip install --upgrade syncd")
    else:
        yield ok("server", f"PostgreSQL {shown}{with_pgvector}")


def check_schema(look: Look) -> list[Finding]:
    """Checks of schema syncd, and the checks that need it."""
    found = guarded("schema", lambda: check_revision(look))
    if any(finding.level == "fail" for finding in found) or not found:
        return found
    found += guarded("rights", lambda: check_own_rights(look))
    found += guarded("sources", lambda: load_sources(look))
    for source in look.sources:
        found += check_source(look, source)
    for what, check in (
        ("notify", check_notify),
        ("notification queue", check_notification_queue),
        ("outbox", check_outbox),
        ("publications", check_publications),
        ("search from SQL", check_search),
        ("consumers", check_consumers),
        ("quarantine", check_quarantine),
        ("locks", check_locks),
        ("idle in transaction", check_writers),
        ("transactions", check_oldest_transaction),
        ("prepared transactions", check_prepared_transactions),
    ):
        found += guarded(what, partial(check, look))
    return found


def check_source(look: Look, source: Source) -> list[Finding]:
    """All checks of one source; without the checks that read rows if they cannot be read."""
    found: list[Finding] = []
    for words, check in SOURCE_CHECKS:
        if words in READING_CHECKS and unreadable(found, source):
            continue
        found += guarded(f"{words} {source.name}", partial(check, look, source))
    return found


def unreadable(found: list[Finding], source: Source) -> bool:
    """Whether a finding already explains why no row can be read."""
    causes = (f"rights on {source.name}", f"columns of {source.name}")
    return any(finding.level != "ok" and finding.what in causes for finding in found)


def check_revision(look: Look) -> Iterator[Finding]:
    """Schema syncd exists, at the revision that this program needs."""
    row = look.row("read_schema_rights")
    if row is None:
        yield fail("schema", "the database has no schema syncd", "syncd init")
        return
    owner, may_enter = row
    if not may_enter:
        detail = f'role "{look.role}" may not use schema syncd, which belongs to "{owner}"'
        yield fail("schema", detail, grant_all(look.role, str(owner)))
        return
    try:
        with look.transaction():
            schema.check_installed(schema.installed_revision(look.connection))
    except DatabaseUnreachable:
        raise
    except DatabaseError as error:
        yield fail("schema", error.message, error.hint)
    else:
        yield ok("schema", f"syncd at {schema.newest_revision()}")


def check_own_rights(look: Look) -> Iterator[Finding]:
    """The role has the rights on syncd's own tables that a service needs."""
    missing = look.rows("read_missing_rights")
    gone = sorted({name for name, privilege in missing if privilege is None})
    if gone:
        detail = f"schema syncd lacks {', '.join(gone)}"
        yield fail("rights", detail, "syncd uninstall && syncd init, and attach again")
    lacking = [
        f"{privilege} on syncd.{name}" for name, privilege in missing if privilege is not None
    ]
    if lacking:
        owner, _ = look.row("read_schema_rights")
        yield fail(
            "rights", f'role "{look.role}" lacks {", ".join(lacking)}', grant_all(look.role, owner)
        )
    if not missing:
        yield ok("rights", f'role "{look.role}" may use syncd\'s own tables')


def grant_all(role: str, owner: str) -> str:
    """Fix that grants a role the rights of a service, or names the role that has them."""
    to = sql.Identifier(role).as_string()
    return f'connect syncd as "{owner}", or as that role: {grant_own_tables(to)}'


def load_sources(look: Look) -> Iterator[Finding]:
    """Read the attached sources, for the next checks."""
    with look.transaction():
        look.sources = read_sources(look.connection)
    look.arguments = dict(look.rows("read_arguments"))
    look.table_rows = {
        source.id: row[-1]
        for source in look.sources
        if (row := look.row("read_source", [source.oid]))
    }
    if not look.sources:
        yield warn("sources", "nothing is attached", "syncd attach TABLE")


def check_notify(look: Look) -> Iterator[Finding]:
    """How writers wake the service: by NOTIFY, or not at all."""
    mode, prepared = look.row("read_notify")
    listening = look.service.status is None or look.service.status.listener_connected
    if mode == schema.NOTIFY_GUARDED and prepared:
        detail = (
            f"on, while max_prepared_transactions is {prepared}: "
            "a PREPARE TRANSACTION after a write to a source fails"
        )
        yield warn(
            "notify",
            detail,
            "if you use PREPARE TRANSACTION: SYNCD_NOTIFY=off syncd init, and restart syncd serve",
        )
    elif mode == schema.NOTIFY_OFF or prepared:
        why = (
            "as set"
            if mode == schema.NOTIFY_OFF
            else f"since max_prepared_transactions is {prepared}"
        )
        yield ok("notify", f"off, {why}: changes are looked for every 0.02 s")
    elif listening:
        yield ok(
            "notify",
            "guarded" + ("" if look.service.status is None else ", and the service listens"),
        )
    else:
        detail = (
            "the running service's listener is not connected: changes are found by the poll alone"
        )
        yield warn(
            "notify",
            detail,
            "see listener_lost in the log of syncd serve; "
            "if it connects through a transaction pooler, set SYNCD_NOTIFY=off",
        )


def check_outbox(look: Look) -> Iterator[Finding]:
    """The outbox is well below its cap; otherwise the consumer that still needs its rows."""
    cap, size = look.row("read_outbox")
    rows = size // OUTBOX_ROW_BYTES
    detail = f"{amount(size)}, at most about {rows:,} rows, of {cap:,} allowed"
    if rows < cap * OUTBOX_SHARE or size <= 3 * 8192:
        yield ok("outbox", detail)
        return
    consumers = look.rows("read_consumers")
    held = (
        f"; consumer {consumers[0][0]!r}{of_shard(consumers[0])} needs the oldest part of it"
        if consumers
        else "; no consumer reads it"
    )
    fix = (
        "start the consumer (syncd serve), or remove a consumer that is gone (see consumers), "
        "or raise SYNCD_OUTBOX_MAX_ROWS"
    )
    yield warn("outbox", detail + held, fix)


def check_consumers(look: Look) -> Iterator[Finding]:
    """Each consumer reports, and none is behind."""
    for row in look.rows("read_consumers"):
        name, state, lag_rows, lag_seconds, silent, checkpoint_age = row[:6]
        what = f"consumer {name}"
        checkpoint = (
            f"checkpoint {ago(checkpoint_age)} old"
            if checkpoint_age is not None
            else "no checkpoint yet"
        )
        if silent > STALE_CONSUMER_SECONDS:
            literal = sql.Literal(name).as_string()
            gone = f"DELETE FROM syncd.consumers WHERE name = {literal};"  # noqa: S608 - only text
            fix = f"start it: {start_of(row)}; or, if it is gone for good: {gone}"
            yield warn(
                what,
                f"has not reported for {ago(silent)}{of_shard(row)}; the outbox is kept for it; "
                f"{checkpoint}",
                fix,
            )
        elif state in ("failed", "must_rebuild"):
            yield fail(what, f"is {state}", "syncd datasets, then syncd why DATASET")
        elif lag_seconds > LAG_SECONDS:
            detail = f"is {state}, {lag_rows} rows behind, its last pass is {ago(lag_seconds)} old"
            yield warn(what, detail, "syncd datasets, then syncd why DATASET")
        else:
            yield ok(
                what, f"{state}, {lag_rows} rows behind, {checkpoint}, reported {ago(silent)} ago"
            )


def of_shard(consumer: Sequence[Any]) -> str:
    """Words about the shard that a row of ``read_consumers`` is; empty if it is none."""
    _, _, _, _, _, _, _, shard, layout, _, address, present = consumer
    if shard is None:
        return ""
    left = "" if layout == present else f"; the layout that answers has {present} shards"
    return f" (shard {shard}/{layout} at {address}{left})"


def start_of(consumer: Sequence[Any]) -> str:
    """Command that starts the syncd of a row of ``read_consumers``."""
    name, shard, layout, replica = consumer[0], *consumer[7:10]
    command = f"SYNCD_CONSUMER={shlex.quote(name)} syncd serve"
    if shard is None:
        return command
    return f"{command} --shard {shard}/{layout}" + (f" --replica {replica}" if replica else "")


def check_quarantine(look: Look) -> Iterator[Finding]:
    """No live row is in quarantine."""
    consumer = (
        look.settings.consumer if look.service.status is None else look.service.status.consumer
    )
    rows = look.rows("read_quarantine", [consumer])
    at_least = "at least " if sum(row[2] for row in rows) >= MAX_REPORTED_ROWS else ""
    for dataset, reason, count, sample in rows[:20]:
        name = dataset or "(no dataset)"
        rows_are = f"{at_least}{count} row{'s' if count > 1 else ''}"
        detail = f"{rows_are} with {reason}, such as key {sample[0]}"
        yield warn(
            f"quarantine of {name}",
            detail,
            f"syncd why {dataset}" if dataset else "see syncd.quarantine",
        )
    if not rows:
        yield ok("quarantine", "no row")
