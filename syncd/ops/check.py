"""Everything that can be looked at without changing anything: the versions, the machine, the service, the database and each source.

``examine`` never raises for what it finds: a database that cannot be reached is one ``fail``, a check that fails is a ``warn`` that says so.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from psycopg import sql

from syncd.errors import DatabaseError, DatabaseUnreachable, ServiceUnavailable
from syncd.ops.check_database import check_encoding, check_publications, check_read_only
from syncd.ops.check_sources import READING_CHECKS, SOURCE_CHECKS
from syncd.ops.findings import Finding, ago, amount, fail, guarded, ok, since, warn
from syncd.ops.look import Look, Service, ask_service, looking
from syncd.ops.sessions import (
    check_locks,
    check_notification_queue,
    check_oldest_transaction,
    check_prepared_transactions,
    check_writers,
)
from syncd.postgres import schema
from syncd.postgres.rights import grant_own_tables
from syncd.postgres.source import Source, read_sources
from syncd.protocol.messages import VerifyStatus
from syncd.settings import Settings
from syncd.sync.background.reports import MAX_REPORTED_ROWS

NEWEST_SERVER_VERSION = 18
CLOCK_SECONDS = 5.0
LAG_SECONDS = 10.0
LATE_CHECKPOINTS = 3
STALE_CONSUMER_SECONDS = 600.0
OUTBOX_ROW_BYTES = 60
OUTBOX_SHARE = 0.5
MINIMUM_FREE_BYTES = 100_000_000
UNKNOWN_DIMENSION = 768
ROW_BYTES = 64
"""Beside its vector: key, fingerprint, bitmaps."""


def examine(settings: Settings, socket: Path | str) -> list[Finding]:
    """Every finding, in the order in which they are best read."""
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


def check_program() -> Iterator[Finding]:
    """The program itself, and the library that it can do nothing without."""
    try:
        import faiss  # it takes a moment to load, and only this command wants to know

        shown = f"faiss {faiss.__version__}"
    except ImportError as error:
        yield fail(
            "program", f"faiss cannot be loaded: {error}", "pip install --force-reinstall faiss-cpu"
        )
        return
    yield ok("program", f"syncd {version('syncd')}, Python {platform.python_version()}, {shown}")


def check_server(look: Look) -> Iterator[Finding]:
    """The server is one that syncd knows, and not a standby."""
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
        detail = f"PostgreSQL {shown} is newer than any that this syncd was tried with ({NEWEST_SERVER_VERSION})"
        yield warn("server", detail, "pip install --upgrade syncd")
    else:
        yield ok("server", f"PostgreSQL {shown}{with_pgvector}")


def check_clock(look: Look) -> Iterator[Finding]:
    """The server's clock and ours agree; nothing rests on it but what people read."""
    before = time.time()
    (there,) = look.row("read_clock")
    here = (before + time.time()) / 2
    difference = abs(there - here)
    if difference > CLOCK_SECONDS:
        detail = f"this machine's clock and the server's differ by {ago(difference)}: ages that are shown may be wrong"
        yield warn("clock", detail, "synchronise both machines' clocks, for example with chrony")
    else:
        yield ok("clock", f"differs from the server's by {ago(difference)}")


def check_schema(look: Look) -> list[Finding]:
    """Schema syncd, and everything that can be looked at only where it is there."""
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
        ("consumers", check_consumers),
        ("quarantine", check_quarantine),
        ("locks", check_locks),
        ("idle in transaction", check_writers),
        ("transactions", check_oldest_transaction),
        ("prepared transactions", check_prepared_transactions),
    ):
        found += guarded(what, bound(check, look))
    return found


def bound(
    check: Callable[[Look], Iterator[Finding]], look: Look
) -> Callable[[], Iterator[Finding]]:
    """A check that is ready to be run."""
    return lambda: check(look)


def check_source(look: Look, source: Source) -> list[Finding]:
    """All checks of one source; its rows are not read where it is clear that they cannot be."""
    found: list[Finding] = []
    for words, check in SOURCE_CHECKS:
        if words in READING_CHECKS and unreadable(found, source):
            continue
        found += guarded(f"{words} {source.name}", lambda check=check: check(look, source))  # type: ignore[misc]
    return found


def unreadable(found: list[Finding], source: Source) -> bool:
    """Whether a finding says already why no row can be read."""
    causes = (f"rights on {source.name}", f"columns of {source.name}")
    return any(finding.level != "ok" and finding.what in causes for finding in found)


def check_revision(look: Look) -> Iterator[Finding]:
    """Schema syncd is there, at the revision that this program needs."""
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
    """The role may use syncd's own tables as a service does."""
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
    """What gives a role the rights that a service needs of schema syncd, or the role that has them."""
    to = sql.Identifier(role).as_string()
    return f'connect syncd as "{owner}", or as that role: {grant_own_tables(to)}'


def load_sources(look: Look) -> Iterator[Finding]:
    """Read what is attached, for the checks that follow."""
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
    """How writers wake the service."""
    mode, prepared = look.row("read_notify")
    listening = look.service.status is None or look.service.status.listener_connected
    if mode == schema.NOTIFY_GUARDED and prepared:
        detail = f"on, while max_prepared_transactions is {prepared}: a PREPARE TRANSACTION after a write to a source fails"
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
            "see listener_lost in its log; behind a transaction pooler set SYNCD_NOTIFY=off",
        )


def check_outbox(look: Look) -> Iterator[Finding]:
    """The outbox is well below its cap; else who keeps it from being freed."""
    cap, size = look.row("read_outbox")
    rows = size // OUTBOX_ROW_BYTES
    detail = f"{amount(size)}, at most about {rows:,} rows, of {cap:,} allowed"
    if rows < cap * OUTBOX_SHARE or size <= 3 * 8192:
        yield ok("outbox", detail)
        return
    consumers = look.rows("read_consumers")
    held = (
        f"; consumer {consumers[0][0]!r} needs the oldest part of it"
        if consumers
        else "; no consumer reads it"
    )
    fix = "start the consumer (syncd serve), or remove one that is gone (see consumers), or raise SYNCD_OUTBOX_MAX_ROWS"
    yield warn("outbox", detail + held, fix)


def check_consumers(look: Look) -> Iterator[Finding]:
    """Every consumer reports, and none is behind."""
    for name, state, lag_rows, lag_seconds, silent, checkpoint_age, _ in look.rows(
        "read_consumers"
    ):
        what = f"consumer {name}"
        checkpoint = (
            f"checkpoint {ago(checkpoint_age)} old"
            if checkpoint_age is not None
            else "no checkpoint yet"
        )
        if silent > STALE_CONSUMER_SECONDS:
            literal = "'" + name.replace("'", "''") + "'"
            gone = f"DELETE FROM syncd.consumers WHERE name = {literal};"  # noqa: S608 - text for a person
            fix = f"start it: SYNCD_CONSUMER={shlex.quote(name)} syncd serve; or, if it is gone for good: {gone}"
            yield warn(
                what,
                f"has not reported for {ago(silent)}; the outbox is kept for it; {checkpoint}",
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


def check_quarantine(look: Look) -> Iterator[Finding]:
    """No live row is left out."""
    consumer = (
        look.settings.consumer if look.service.status is None else look.service.status.consumer
    )
    rows = look.rows("read_quarantine", [consumer])
    at_least = "at least " if sum(row[2] for row in rows) >= MAX_REPORTED_ROWS else ""
    for dataset, reason, count, sample in rows[:20]:
        name = dataset or "(no dataset)"
        detail = f"{at_least}{count} row{'s' if count > 1 else ''} with {reason}, such as key {sample[0]}"
        yield warn(
            f"quarantine of {name}",
            detail,
            f"syncd why {dataset}" if dataset else "see syncd.quarantine",
        )
    if not rows:
        yield ok("quarantine", "no row")


def check_service(settings: Settings, service: Service) -> Iterator[Finding]:
    """The service runs, is in step, and saves checkpoints."""
    status = service.status
    if status is None:
        assert service.error is not None
        report = (
            warn if isinstance(service.error, ServiceUnavailable) else fail
        )  # one that is there, and does not answer
        yield report(
            "service", service.error.message, service.error.hint or "see the log of syncd serve"
        )
        return
    for row in service.datasets:
        if row.state in ("failed", "must_rebuild"):
            yield fail(f"dataset {row.dataset}", f"is {row.state}", f"syncd why {row.dataset}")
        elif row.lag_seconds > LAG_SECONDS:
            yield warn(
                f"dataset {row.dataset}",
                f"is {row.state}, {ago(row.lag_seconds)} behind",
                f"syncd why {row.dataset}",
            )
        if row.in_sync is False:
            yield warn(
                f"dataset {row.dataset}",
                "the last verify found a difference",
                f"syncd verify {row.dataset} --repair",
            )
    detail = f"{status.state}, consumer {status.consumer}, version {status.version}, up {ago(status.uptime_seconds)}"
    if status.state == "failed":
        yield fail(
            "service",
            f"{detail}: a source cannot be read",
            "see the lines about each source and dataset",
        )
    elif status.database_error:
        yield fail(
            "service",
            f"{detail}: {status.database_error}; it answers from where it was",
            "mend that, and watch: syncd status --watch",
        )
    else:
        yield ok(
            "service", f"{detail}, lag {ago(status.lag_seconds) if status.lag_seconds else 'none'}"
        )
    for task in status.failing_tasks:
        detail = f"fails, {task.failures} time{'s' if task.failures > 1 else ''} in a row: {task.error}; tried again in {ago(task.retry_in_seconds)}"
        yield warn(
            f"task {task.task}",
            detail,
            "see task_failed in the log of syncd serve; watch: syncd status --watch",
        )
    if status.version != version("syncd"):
        detail = f"the running service is {status.version}, this program {version('syncd')}"
        yield warn("service", detail, "restart syncd serve")
    if status.verify is not None:
        yield check_verify(status.verify)
    checkpoint = status.checkpoint
    age = None if checkpoint.at is None else (datetime.now(UTC) - checkpoint.at).total_seconds()
    late = LATE_CHECKPOINTS * settings.checkpoint_seconds
    if checkpoint.error:
        yield fail(
            "checkpoint",
            f"the last attempt failed: {checkpoint.error}",
            "mend that, then: syncd checkpoint",
        )
    elif (
        min(status.uptime_seconds, math.inf if age is None else age) > late
    ):  # a start may load one that is days old
        shown = "none since the service started" if age is None else f"{ago(age)} old"
        yield warn(
            "checkpoint",
            f"{shown}, expected every {settings.checkpoint_seconds:.0f} s",
            "syncd checkpoint",
        )
    else:
        yield ok("checkpoint", "not due yet" if age is None else f"{ago(age)} old")


def check_verify(verify: VerifyStatus) -> Finding:
    """Every table is compared with its indexes now and then: drift that no verify looks for is never found."""
    age = since(verify.at)
    if verify.overdue:
        detail = f"the last whole one is {age}, more than twice SYNCD_VERIFY_SECONDS={verify.interval_seconds:g}: {verify.overdue}"
        return warn("verify", detail, "see to that, then: syncd verify")
    return ok(
        "verify",
        age
        if verify.interval_seconds
        else f"{age}; none in the background: SYNCD_VERIFY_SECONDS=0",
    )


def check_data_directory(settings: Settings, service: Service) -> Iterator[Finding]:
    """The data directory can be written, by this user at least."""
    path = settings.data_dir
    nearest = nearest_existing(path)
    fix = f"run as the user that owns it, or set SYNCD_DATA_DIR, or: sudo install -d -o $(id -un) -m 750 {path}"
    if not nearest.is_dir():
        yield fail(
            "data directory", f"{nearest} is not a directory", "set SYNCD_DATA_DIR to a directory"
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        report = (
            fail if service.status is None else warn
        )  # a service that runs has shown that it can write
        detail = f"user {os.geteuid()} may not write {nearest}, which belongs to user {nearest.stat().st_uid}"
        yield report("data directory", detail, fix)
    elif nearest != path:
        yield ok("data directory", f"{path} will be made by syncd serve")
    elif path.stat().st_mode & 0o002:
        yield warn("data directory", f"anybody may write {path}", f"chmod o-w {path}")
    else:
        yield ok("data directory", f"{path} can be written")


def check_disk(settings: Settings, service: Service, need: int) -> Iterator[Finding]:
    """There is place for the indexes, which take ``need`` bytes by the server's estimate of rows, once more while one is built aside."""
    free = shutil.disk_usage(nearest_existing(settings.data_dir)).free
    need = max(need, sum(row.bytes for row in service.datasets))
    detail = f"{amount(free)} free, the indexes need about {amount(need)}, and as much again while they are rebuilt"
    fix = (
        f"free some space on the disk of {settings.data_dir}, or set SYNCD_DATA_DIR to a larger one"
    )
    if free < MINIMUM_FREE_BYTES:
        yield fail("disk", detail, fix)
    elif free < need:
        yield warn("disk", detail, fix)
    else:
        yield ok("disk", detail)


def index_bytes(look: Look, source: Source) -> int:
    """The place that a source's indexes take, about."""
    dimension = source.dimension or look.dimensions.get(source.id, UNKNOWN_DIMENSION)
    return look.table_rows.get(source.id, 0) * (dimension * (2 if source.half else 4) + ROW_BYTES)


def nearest_existing(path: Path) -> Path:
    """The directory itself, or the one above it that it would be made in."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))
