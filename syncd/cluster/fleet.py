"""The shards that are asked: found in the database, and probed.

Invariant: while the database cannot be reached, the last known shards are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import anyio
import psycopg
import structlog
from anyio import TASK_STATUS_IGNORED, fail_after
from anyio.abc import TaskStatus

from syncd.cluster.layout import Layout, Registered
from syncd.cluster.replica import Replica
from syncd.errors import DatabaseError
from syncd.postgres import session
from syncd.postgres.connection import connect, translated, translated_errors
from syncd.postgres.listener import backoff_delays
from syncd.postgres.schema import check_installed
from syncd.shard import Shard
from syncd.statements import statement

POLL_SECONDS = 2.0
"""Time between two readings of the layout if no notification arrives."""
QUERY_SECONDS = 5.0
"""Time in which the database must answer."""
PROBE_INTERVAL_SECONDS = 1.0
"""A replica that has not answered for this long is probed."""
LEFT_SECONDS = 30.0
"""How long the connection of a replica stays open that is not asked any more."""
NAME = "router"
"""Name of the router's connection, in place of a consumer's."""

logger = structlog.get_logger()


class Fleet:
    """The replicas of the layout that answers. ``token`` is the one that all of them have."""

    def __init__(self, conninfo: str, token: str | None, *, listens: bool = True) -> None:
        self.conninfo = conninfo
        self.token = token
        self.listens = listens
        """Whether it listens; behind a pooler it only polls."""
        self.layout = Layout()
        self.shards: Mapping[Shard, Sequence[Replica]] = {}
        """Replaced as a whole when the layout changes."""
        self.is_listening = False
        self.database_error: str | None = "the database has not been reached yet"
        self.reconnects = 0
        self.left: list[tuple[float, Replica]] = []
        """Replicas that are not asked any more, and since when: requests may be under way."""

    @property
    def replicas(self) -> list[Replica]:
        """All replicas."""
        return [each for replicas in self.shards.values() for each in replicas]

    async def watch(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Keep the shards up to date until cancelled.

        An error before the first reading ends the start; later ones are retried.
        """
        started, delays = False, backoff_delays()
        while True:
            try:
                async with connect(self.conninfo, NAME) as connection:
                    await self.begin(connection)
                    while True:
                        await self.read(connection)
                        delays = backoff_delays()
                        if not started:
                            task_status.started()
                            started = True
                        await self.rest(connection)
            except (psycopg.Error, DatabaseError, TimeoutError) as error:
                if isinstance(error, psycopg.Error):
                    error = translated(error, self.conninfo)
                if not started:
                    raise error from None
                delay = next(delays)
                self.reconnects += 1
                self.database_error = str(error).strip() or "the database does not answer"
                logger.warning("layout_not_read", retry_in_seconds=delay, error=self.database_error)
                await anyio.sleep(delay)
            finally:
                self.is_listening = False

    async def begin(self, connection: psycopg.AsyncConnection) -> None:
        """Check the schema's version, and listen."""
        with fail_after(QUERY_SECONDS), translated_errors(self.conninfo):
            if self.listens:
                await connection.execute(
                    session.own_session_settings(connection, "service_settings")
                )
            row = await (await connection.execute(statement("schema", "read_revision"))).fetchone()
            check_installed(None if row is None else str(row[0]))
            if self.listens:
                await connection.execute(statement("cluster", "listen"))
                self.is_listening = True

    async def read(self, connection: psycopg.AsyncConnection) -> None:
        """Read the layout, and take up the shards that it names."""
        with fail_after(QUERY_SECONDS), translated_errors(self.conninfo):
            await connection.execute(session.beginning(connection))
            rows = await (await connection.execute(statement("cluster", "read_layout"))).fetchall()
            await connection.execute(statement("passes", "commit"))
        self.database_error = None
        await self.take_up(Layout.of_rows(rows))

    async def rest(self, connection: psycopg.AsyncConnection) -> None:
        """Wait for a notification, or for the poll."""
        if not self.listens:
            await anyio.sleep(POLL_SECONDS)
            return
        async for _ in connection.notifies(timeout=POLL_SECONDS, stop_after=1):
            logger.debug("layout_changed")

    async def take_up(self, layout: Layout) -> None:
        """Ask the shards of a layout from now on. New replicas are probed before."""
        known = {each.registered: each for each in self.replicas}
        new: list[Replica] = []

        def replica(registered: Registered) -> Replica:
            found = known.pop(registered, None)
            if found is None:
                found = Replica(registered, self.token)
                new.append(found)
            found.registered = registered
            return found

        shards = {
            shard: [replica(each) for each in registered]
            for shard, registered in layout.replicas.items()
        }
        if new:
            async with anyio.create_task_group() as tasks:
                for each in new:
                    tasks.start_soon(each.probe)
        if new or known or layout.of != self.layout.of:
            logger.info(
                "layout",
                shards=layout.of,
                replicas={
                    each.name: each.registered.address
                    for replicas in shards.values()
                    for each in replicas
                },
            )
        self.layout, self.shards = layout, shards
        self.left += [(anyio.current_time(), each) for each in known.values()]

    async def close_left(self) -> None:
        """Close the connections of replicas that have not been asked for long."""
        until = anyio.current_time() - LEFT_SECONDS
        closing = [each for since, each in self.left if since < until]
        self.left = [(since, each) for since, each in self.left if since >= until]
        for each in closing:
            await each.close()

    async def probe(self) -> None:
        """Probe the replicas that have not answered lately, until cancelled."""
        while True:
            await self.close_left()
            async with anyio.create_task_group() as tasks:
                for each in self.replicas:
                    if each.is_due(PROBE_INTERVAL_SECONDS):
                        tasks.start_soon(each.probe)
            await anyio.sleep(PROBE_INTERVAL_SECONDS)
