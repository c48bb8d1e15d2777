"""LISTEN on its own connection, in autocommit mode: it gets each wake-up or detects the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import psycopg
import structlog
from anyio import TASK_STATUS_IGNORED, fail_after, move_on_after, sleep, wait_readable
from anyio.abc import TaskStatus
from psycopg.pq.abc import PGconn

from syncd.errors import DatabaseError
from syncd.postgres import session
from syncd.postgres.connection import connect
from syncd.statements import statement

PING_INTERVAL_SECONDS = 10.0
PING_TIMEOUT_SECONDS = 5.0
FIRST_DELAY_SECONDS = 0.1
LAST_DELAY_SECONDS = 10.0

logger = structlog.get_logger()


def backoff_delays() -> Iterator[float]:
    """Endless growing delays between attempts to connect, in seconds."""
    delay = FIRST_DELAY_SECONDS
    while True:
        yield delay
        delay = min(delay * 2, LAST_DELAY_SECONDS)


class Listener:
    """Calls ``wake`` after every (re)connect and every NOTIFY, until cancelled."""

    def __init__(
        self, conninfo: str, consumer: str, wake: Callable[[Literal["connect", "notify"]], None]
    ) -> None:
        self.conninfo = conninfo
        self.consumer = consumer
        self.wake = wake
        self.connected = False
        self.reconnects = 0

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Listen. An error before the first success stops the start; later ones are retried."""
        started, delays = False, backoff_delays()
        while True:
            try:
                async with connect(self.conninfo, self.consumer) as connection:
                    with fail_after(PING_TIMEOUT_SECONDS):
                        await connection.execute(
                            session.own_session_settings(connection, "service_settings")
                        )
                        await connection.execute(statement("consumer", "listen"))
                    self.connected = True
                    if not started:
                        task_status.started()
                        started = True
                    delays = backoff_delays()
                    self.wake("connect")  # LISTEN first, then look: no commit can fall in between
                    connection.add_notify_handler(lambda _: self.wake("notify"))
                    while True:
                        await self.hear(connection.pgconn)
                        # A half-open socket never reports an error.
                        with fail_after(PING_TIMEOUT_SECONDS):
                            await connection.execute(statement("consumer", "ping"))
            except (psycopg.Error, DatabaseError, TimeoutError) as error:
                self.connected = False
                if not started:
                    raise
                self.reconnects += 1
                delay = next(delays)
                logger.warning("listener_lost", retry_in_seconds=delay, error=str(error).strip())
                await sleep(delay)
            finally:
                self.connected = False

    async def hear(self, connection: PGconn) -> None:
        """Call ``wake`` at each notification, until it is time for a ping.

        psycopg's own ``notifies`` wakes up ten times a second, which costs 0.2 % of a core.
        """
        with move_on_after(PING_INTERVAL_SECONDS):
            while True:
                await wait_readable(connection.socket)
                connection.consume_input()
                while connection.notifies() is not None:
                    self.wake("notify")
