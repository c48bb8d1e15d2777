"""The connection for reports, apart from the passes' connection.

It is opened when it is needed, and again after it was lost.
"""

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
"""Time limit of a whole transaction: it consists of a few short statements."""


class Control:
    """Short transactions, one at a time.

    ``owns_session`` tells whether a connection is its own session; behind a pooler it is not.
    """

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
        """Number of connections so far: the writes of an earlier connection may be lost."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[psycopg.AsyncConnection]:
        """A transaction whose loss in a crash is harmless.

        Raises ``DatabaseUnreachable`` or ``DatabaseError``.
        """
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
                await self.close()  # after any error the next transaction gets a new connection
                raise

    async def begin(self) -> psycopg.AsyncConnection:
        """Open a transaction, over a new connection if the previous one was lost."""
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
            if self.owns_session():  # no time-out of the user may end the session while it is idle
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
    """First message of each transaction for reports."""
    return session.beginning(connection, statement("consumer", "report_limits"))
