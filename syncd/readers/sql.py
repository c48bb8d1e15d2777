"""PostgreSQL clients of readers: the listener, and the way of a cancel request.

A cancel request comes on a connection of its own, which any process may accept. A reader sends the
request to the main process, and each reader asks the main process for those that are for itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from syncd.pgwire.server import SEATS, SqlServer
from syncd.protocol.messages import Params
from syncd.readers.link import Link
from syncd.rpc.dispatch import Dispatcher
from syncd.rpc.protocol import Method

MOST_CANCELS = 1000
"""Cancel requests that wait for one reader; further ones replace the oldest."""
CANCEL, CANCELS = "reader.cancel", "reader.cancels"


class CancelParams(Params, frozen=True):
    """A cancel request: its connection's number and key."""

    process: int
    key: bytes


class CancelsParams(Params, frozen=True):
    """A reader waits for cancel requests."""

    seat: int


class CancelsAnswer(msgspec.Struct):
    """An answer with cancel requests."""

    result: list[CancelParams]


_cancels = msgspec.json.Decoder(CancelsAnswer)


class Cancels:
    """The main process's side: the requests that wait for each reader."""

    def __init__(self, sql: SqlServer, readers: int) -> None:
        self._sql = sql
        self._waiting = [deque[CancelParams](maxlen=MOST_CANCELS) for _ in range(readers + 1)]
        self._came = anyio.Event()
        sql.cancel_elsewhere = self._elsewhere

    def table(self) -> dict[str, Method[Any, Any]]:
        """The methods that readers call."""
        return {
            CANCEL: Method(CancelParams, bool, self._cancel, "Cancel a statement."),
            CANCELS: Method(
                CancelsParams, list[CancelParams], self._take, "Wait for cancel requests."
            ),
        }

    async def _cancel(self, params: CancelParams) -> bool:
        waited = self._sql.cancel(params.process, params.key)
        if waited is not None:
            await waited
        return True

    async def _elsewhere(self, process: int, key: bytes) -> None:
        seat = process % SEATS
        if seat < len(self._waiting):
            self._waiting[seat].append(CancelParams(process, key))
            came, self._came = self._came, anyio.Event()
            came.set()

    async def _take(self, params: CancelsParams) -> list[CancelParams]:
        waiting = self._waiting[params.seat]
        while not waiting:
            await self._came.wait()
        taken = list(waiting)
        waiting.clear()
        return taken


class ReaderSqlServer(SqlServer):
    """The listener of a reader. ``link`` is the reader's own link to the main process."""

    def __init__(self, link: Callable[[], Link], dispatcher: Dispatcher, **options: Any) -> None:
        super().__init__(dispatcher, listen=None, accepts=False, **options)
        self._link = link
        self.cancel_elsewhere = self._send

    async def take_cancels(self) -> None:
        """Cancel the statements for which another process got a request, forever."""
        while True:
            params = msgspec.json.encode(CancelsParams(self.seat))
            answer = await self._link().ask(CANCELS, params)
            for each in _cancels.decode(b"{" + answer[1:]).result:
                self.cancel(each.process, each.key)

    async def _send(self, process: int, key: bytes) -> None:
        await self._link().ask(CANCEL, msgspec.json.encode(CancelParams(process, key)))
