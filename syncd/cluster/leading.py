"""The database's side of a cut: one leader at a time exports a snapshot that shards import.

Invariant: the leader locks the tables that a shard has to read before it takes the snapshot, and
its locks last until each shard has its own. So no table is rewritten or emptied in between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import anyio
import psycopg
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import DatabaseError, NotReady, SyncdError
from syncd.postgres import session
from syncd.postgres.connection import connect, first_line, translated
from syncd.postgres.outbox import unseen
from syncd.postgres.source import Source
from syncd.protocol.messages import WirePosition
from syncd.statements import statement

IDLE_SECONDS = 10.0
"""The connection is closed after this time without a cut."""
MOST_TABLES = 64
"""Number of tables that are locked for a verify; all sessions share the server's lock table."""
ROUNDS = 5
"""Snapshots that are taken at most until one has no change of a table that is not locked."""


class TooManyTables(NotReady):
    """There are more tables than one transaction locks."""


@dataclass(slots=True)
class Exported:
    """A snapshot while the leader's transaction is open; see ``CutParams``."""

    snapshot: str = ""
    position: WirePosition = field(default_factory=lambda: WirePosition("", 0))
    tables: set[int] = field(default_factory=set)
    blocked: dict[int, str] = field(default_factory=dict)


class Leader:
    """A leader with a connection of its own, which is opened for its first cut."""

    def __init__(self, conninfo: str, name: str) -> None:
        self.conninfo = conninfo
        self.name = name
        """Name of the connection, in place of a consumer's."""
        self._stack = AsyncExitStack()
        self._connection: psycopg.AsyncConnection | None = None
        self._used_at = 0.0

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """Be the only leader, in a transaction that has no snapshot yet.

        Raises ``NotReady`` for every trouble of the database.
        """
        try:
            connection = await self._open()
            self._used_at = anyio.current_time()
            await connection.execute(
                session.beginning(connection, statement("cluster", "lead_limits"))
            )
            await connection.execute(statement("cluster", "lead"))
            yield connection
            await connection.execute(statement("passes", "commit"))
            self._used_at = anyio.current_time()
        except (psycopg.Error, DatabaseError) as error:
            await self.close()
            raise self._not_led(error) from None
        except SyncdError:  # of a shard
            with suppress(psycopg.Error):
                await connection.execute(statement("passes", "rollback"))
            raise
        except BaseException:  # the transaction may be in any state: its end is the connection's
            with anyio.CancelScope(shield=True):
                await self.close()
            raise

    async def export(
        self, connection: psycopg.AsyncConnection, oldest: WirePosition, *, every: bool = False
    ) -> Exported:
        """Lock what changed since ``oldest``, the oldest position of a shard, and take a snapshot.

        With ``every`` all tables are locked. Raises ``NotReady`` if ever more tables change.
        """
        await connection.execute(statement("passes", "lock_outbox"))
        exported, sources = Exported(), await self._sources(connection)
        if every and len(sources) > MOST_TABLES:
            raise TooManyTables(f"{len(sources)} tables are more than one transaction locks")
        bounds = unseen(oldest.position().snapshot)
        for _ in range(ROUNDS):
            cursor = await connection.execute(statement("cluster", "export_snapshot"), bounds)
            row = await cursor.fetchone()
            assert row is not None
            exported.snapshot, exported.position = row[0], WirePosition(row[1], row[2])
            changed = [sources[one] for one in (sources if every else row[3]) if one in sources]
            known = exported.tables | exported.blocked.keys()
            unlocked = [each for each in changed if each.oid not in known]
            if not unlocked:
                return exported
            for each in unlocked:
                await self._lock(connection, each, exported)
        raise NotReady("more tables change than can be locked in time", hint="try again")

    async def close_idle(self) -> None:
        """Close the connection if no cut was asked for lately."""
        if self._connection is not None and (anyio.current_time() - self._used_at > IDLE_SECONDS):
            await self.close()

    async def close(self) -> None:
        """Close the connection; the next cut opens another."""
        self._connection = None
        stack, self._stack = self._stack, AsyncExitStack()
        with suppress(psycopg.Error, OSError):
            await stack.aclose()

    async def _open(self) -> psycopg.AsyncConnection:
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            self._connection = await self._stack.enter_async_context(
                connect(self.conninfo, self.name)
            )
        return self._connection

    async def _sources(self, connection: psycopg.AsyncConnection) -> dict[int, Source]:
        cursor = await connection.execute(statement("sources", "read_attachments"))
        found = [Source(*row) for row in await cursor.fetchall()]
        return {each.id: each for each in found if each.table is not None}

    async def _lock(
        self, connection: psycopg.AsyncConnection, source: Source, exported: Exported
    ) -> None:
        await connection.execute(statement("passes", "savepoint"))
        try:
            await connection.execute(source.lock())
        except (pg.LockNotAvailable, pg.InsufficientPrivilege, pg.UndefinedTable) as error:
            await connection.execute(statement("passes", "rollback_to_savepoint"))
            role = sql.Identifier(connection.info.user).as_string()
            exported.blocked[source.oid] = (
                f"the router's role {role} may not read {source.name}: "
                f"GRANT SELECT ON {source.identifier.as_string()} TO {role};"
                if isinstance(error, pg.InsufficientPrivilege)
                else f"another transaction holds a lock on {source.name}"
            )
        else:
            exported.tables.add(source.oid)
        await connection.execute(statement("passes", "release_savepoint"))

    def _not_led(self, error: Exception) -> NotReady:
        if isinstance(error, pg.LockNotAvailable):
            return NotReady(
                "another router takes a snapshot, or another session has locked the outbox",
                hint="try again",
            )
        if isinstance(error, psycopg.Error):
            error = translated(error, self.conninfo)
        hint = getattr(error, "hint", "")
        return NotReady(f"no snapshot for all shards can be taken: {first_line(error)}", hint=hint)
