"""The connection for reports, beside the passes. It is opened when needed and again after it was lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import LiteralString

import anyio
import psycopg

from syncd.errors import DatabaseUnreachable
from syncd.postgres import session
from syncd.postgres.connection import connect, translated_errors
from syncd.statements import statement

SILENCE_SECONDS = 40.0
"""For a whole transaction: a few short statements."""


class Control:
    """Short transactions, one at a time. ``owns_session`` says whether a connection is a session of our own, as it is but behind a pooler."""

    def __init__(
        self, conninfo: str, consumer: str, owns_session: Callable[[], bool] = lambda: False
    ) -> None:
        self.conninfo = conninfo
        self.consumer = consumer
        self.owns_session = owns_session
        self.lock = anyio.Lock()
        self.stack = AsyncExitStack()
        self.connection: psycopg.AsyncConnection | None = None
        self.opened = 0
        """How many connections there have been: what was written over another one may be gone."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """A transaction whose loss in a crash would not matter; raises ``DatabaseUnreachable`` or ``DatabaseError``."""
        async with self.lock:
            try:
                with anyio.fail_after(SILENCE_SECONDS):
                    connection = await self.begin()
                    with translated_errors(self.conninfo):
                        yield connection
                        await connection.execute(statement("passes", "commit"))
            except TimeoutError as error:
                await self.close()
                raise DatabaseUnreachable(
                    f"the database has not answered for {SILENCE_SECONDS:g} s",
                    hint="see the server's log",
                ) from error
            except BaseException:
                await self.close()  # whatever happened, the next one starts clean
                raise

    async def begin(self) -> psycopg.AsyncConnection:
        """Open a transaction; over a new connection where the one there was has been lost meanwhile."""
        if self.connection is not None:
            try:
                await self.connection.execute(report_beginning(self.connection))
                return self.connection
            except psycopg.Error:
                await self.close()
        self.connection = await self.stack.enter_async_context(
            connect(self.conninfo, self.consumer)
        )
        self.opened += 1
        with translated_errors(self.conninfo):
            if self.owns_session():  # for its rests between transactions, which a time-out may end
                await self.connection.execute(
                    session.own_session_settings(self.connection, "service_settings")
                )
            await self.connection.execute(report_beginning(self.connection))
        return self.connection

    async def close(self) -> None:
        """Close the connection, if there is one."""
        self.connection = None
        stack, self.stack = self.stack, AsyncExitStack()
        with anyio.CancelScope(shield=True):
            await stack.aclose()


def report_beginning(connection: psycopg.AsyncConnection) -> LiteralString:
    """What opens each of its transactions."""
    return session.beginning(connection, statement("consumer", "report_limits"))
