"""Identity of the database: may it be followed, and was a checkpoint made against it.

The proof is a nonce that is committed durably before its checkpoint. If its row is there, written
by the transaction that the checkpoint names, then all rows that the checkpoint saw are there. The
row is missing after a failover without the last commits, after a restore, and with another
database's checkpoint. Server identifiers and WAL positions would need privileges that managed
servers do not give. They would also miss a crash that lost asynchronous commits.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg
import structlog
from psycopg import errors as pg

from syncd.errors import DatabaseUnreachable
from syncd.postgres import session
from syncd.postgres.connection import not_installed
from syncd.postgres.layout import read_sources
from syncd.postgres.publications import foreign_rows, read_subscriptions
from syncd.postgres.schema import (
    NOTIFY_GUARDED,
    NOTIFY_GUARDED_BY_DEFAULT,
    check_encoding,
    check_installed,
    check_server_version,
    store_settings,
)
from syncd.postgres.source import Source
from syncd.settings import Settings
from syncd.shard import Shard
from syncd.statements import statement
from syncd.types import Position, Snapshot

FORGET_ANOTHER_CLUSTER = (
    "forget_freed",
    "forget_needs",
    "forget_checkpoints",
    "forget_identity",
    "new_identity",
)

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Nonce:
    """A row of ``syncd.checkpoints``, and the transaction that wrote it."""

    value: str
    xid: int


def check_server(connection: psycopg.Connection) -> int:
    """Raise unless the server can be followed; returns its ``max_prepared_transactions``."""
    row = connection.execute(statement("consumer", "read_server")).fetchone()
    assert row is not None
    in_recovery, version, prepared_transactions, installed, encoding = row
    if in_recovery:
        raise DatabaseUnreachable(
            "the server is a standby", hint="name the primary, or all hosts, in SYNCD_DSN"
        )
    check_server_version(version)
    check_encoding(encoding)
    revision = None
    if installed:
        found = connection.execute(statement("consumer", "read_revision")).fetchone()
        revision = None if found is None else str(found[0])
    check_installed(revision)
    return int(prepared_transactions)


def read_incarnation(connection: psycopg.Connection) -> str:
    """The database's own identity.

    A restored copy first gets a new identity, and its outbox, which holds another cluster's ids, is
    emptied.
    """
    with session.transaction(connection, "service_settings"):
        incarnation, original = fetch_identity(connection)
    if original:
        return incarnation
    with session.transaction(connection, "service_settings"):
        connection.execute(statement("consumer", "lock_identity"))
        # Another consumer may have been first.
        incarnation, original = fetch_identity(connection)
        if not original:
            forget_outbox(connection)
            for name in FORGET_ANOTHER_CLUSTER:
                connection.execute(statement("consumer", name))
            logger.warning(
                "database_restored",
                reason="the database is a restored copy: every index is compared with its table",
            )
            incarnation, _ = fetch_identity(connection)
    return incarnation


def refuse_foreign_rows(connection: psycopg.Connection) -> None:
    """Raise ``DatabaseError`` if a subscription writes syncd's own tables.

    After the subscription is gone, the outbox is emptied and every row compared.
    """
    with session.transaction(connection, "service_settings"):
        subscriptions = read_subscriptions(connection)
        if subscriptions:
            connection.execute(statement("consumer", "doubt_identity"))
    if subscriptions:
        raise foreign_rows(subscriptions)


def forget_outbox(connection: psycopg.Connection) -> None:
    """Remove another cluster's transaction ids, inside a transaction.

    No writer waits: if a writer is open, the rows are deleted one by one.
    """
    try:
        with connection.transaction():
            connection.execute(statement("consumer", "lock_outbox"))
            connection.execute(statement("consumer", "forget_outbox"))
    except pg.LockNotAvailable:
        connection.execute(statement("consumer", "forget_outbox_rows"))


def fetch_identity(connection: psycopg.Connection) -> tuple[str, bool]:
    """Incarnation, and whether its row was written in this cluster."""
    row = connection.execute(statement("consumer", "read_identity")).fetchone()
    if row is None:  # init writes the row, so a dump is being restored
        raise not_installed()
    return str(row[0]), bool(row[1])


def register_shard(connection: psycopg.Connection, settings: Settings, address: str) -> None:
    """Note in the consumer's row which shard it is and where, inside a transaction.

    A consumer that is not a shard says so: it may have the name of one.
    """
    shard = settings.own_shard
    about = [None] * 4 if shard is None else [shard.number, shard.of, settings.replica, address]
    connection.execute(statement("cluster", "register_shard"), [*about, settings.consumer])
    if shard is not None:
        connection.execute(statement("cluster", "set_first_layout"), [shard.of])
        connection.execute(statement("cluster", "notify"))


def take_name(
    connection: psycopg.Connection, settings: Settings, run_id: str, address: str
) -> tuple[bool, datetime]:
    """Take the consumer's name, and with it the rows of the outbox that the consumer needs.

    Returns whether the consumer has to rebuild, and the time of the take.
    """
    connection.execute(session.beginning(connection, statement("consumer", "start_limits")))
    row = connection.execute(
        statement("consumer", "take_consumer_name"), [settings.consumer, run_id]
    ).fetchone()
    assert row is not None
    register_shard(connection, settings, address)
    connection.execute(statement("passes", "commit"))
    return bool(row[0]), datetime.fromisoformat(str(row[1]))


def keep_name(
    connection: psycopg.Connection, settings: Settings, run_id: str, since: datetime, address: str
) -> None:
    """Take the name again in a database that was turned back to before this start.

    If another process has taken it since, it keeps it; the next pass detects that.
    """
    kept = connection.execute(
        statement("consumer", "keep_consumer_name"), [settings.consumer, run_id, since]
    )
    if kept.rowcount:
        logger.warning("name_kept", reason="the database has been turned back to before this start")
        store_settings(connection, settings)
        register_shard(connection, settings, address)


def notifies(connection: psycopg.Connection, prepared_transactions: int) -> bool:
    """Whether the triggers of this database notify."""
    row = connection.execute(statement("consumer", "read_notify_mode")).fetchone()
    assert row is not None
    mode = row[0]
    return bool(
        mode == NOTIFY_GUARDED or (mode == NOTIFY_GUARDED_BY_DEFAULT and prepared_transactions == 0)
    )


def has_nonce(connection: psycopg.Connection, nonce: Nonce) -> bool:
    """Whether a checkpoint's nonce is here, and the checkpoint's transaction wrote it."""
    result = connection.execute(statement("consumer", "has_nonce"), [nonce.value, str(nonce.xid)])
    return result.fetchone() is not None


def write_nonce(
    connection: psycopg.Connection, consumer: str, position: Position, kept: Sequence[str]
) -> Nonce:
    """Commit a new nonce durably: the commit flushes all rows that were visible before it.

    ``kept`` are the nonces of the checkpoints on disk: their rows stay, with the rows of the outbox
    that those checkpoints need.

    It must use the connection on which the position was read. Another connection might reach a
    server that has crashed since and lost commits: the nonce would then prove rows that are gone.
    """
    value = str(uuid.uuid4())
    connection.execute(session.beginning(connection, statement("consumer", "durable_limits")))
    try:
        row = connection.execute(
            statement("consumer", "write_nonce"), [value, consumer, str(position.snapshot)]
        ).fetchone()
        assert row is not None
        for name in ("forget_old_nonces", "note_needs"):
            connection.execute(
                statement("consumer", name), {"consumer": consumer, "kept": [value, *kept]}
            )
    except BaseException:
        if not connection.closed:
            connection.execute(statement("passes", "rollback"))
        raise
    connection.execute(statement("passes", "commit"))
    return Nonce(value, int(row[0]))


def read_doubts(connection: psycopg.Connection) -> int:
    """Value of the sequence that a writer advances if it cannot write to the outbox."""
    row = connection.execute(statement("consumer", "read_doubts")).fetchone()
    assert row is not None
    return int(row[0])


def read_registry(
    connection: psycopg.Connection, shard: Shard
) -> tuple[Position, list[Source], Snapshot | None]:
    """The sources at a snapshot, and a snapshot that sees all freed rows of the outbox.

    The second one is None if no row was freed.
    """
    connection.execute(
        ";\n".join((statement("passes", "begin_pass"), session.service_settings(connection)))
    )
    try:
        row = connection.execute(statement("consumer", "read_registry")).fetchone()
        assert row is not None
        position = Position(Snapshot.parse(row[0]), int(row[1]))
        sources = read_sources(connection, shard)
        freed = connection.execute(statement("consumer", "read_freed")).fetchone()
        assert freed is not None
    finally:
        if not connection.closed:
            connection.execute(statement("passes", "rollback"))
    return position, sources, None if freed[0] is None else Snapshot.parse(freed[0])


def read_fingerprint_probe(connection: psycopg.Connection) -> int:
    """A number that changes if the server hashes in another way, as fingerprints do.

    Hashes depend on the server's version and byte order.
    """
    row = connection.execute(statement("passes", "read_fingerprint_probe")).fetchone()
    assert row is not None
    return int(row[0])


def read_bucket_probe(connection: psycopg.Connection) -> int:
    """A number that changes if the server gives keys other buckets."""
    row = connection.execute(statement("passes", "read_bucket_probe")).fetchone()
    assert row is not None
    return int(row[0])
