"""The main process's side of its readers: it answers what they hand over.

Invariant: a request that a reader hands over is answered as if the client were connected here.
Without a reader, the main process accepts connections itself.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import structlog
from anyio import to_thread

from syncd.protocol.messages import Params
from syncd.readers.answering import ReportParams
from syncd.readers.board import Board
from syncd.readers.handing_over import REACH, ReachParams
from syncd.readers.link import CLIENT
from syncd.readers.process import ReaderSettings
from syncd.readers.publishing import Publisher
from syncd.readers.reports import Reports
from syncd.readers.seats import Inherited, Seats
from syncd.rpc.methods import Methods
from syncd.rpc.protocol import Method
from syncd.rpc.server import Server
from syncd.rpc.stream_server import StreamServer
from syncd.supervision import Tasks
from syncd.types import full_dataset_name

if TYPE_CHECKING:
    from syncd.pgwire.server import SqlServer
    from syncd.readers.sql import Cancels

FALL_BACK_SECONDS = 3.0
"""Time without a reader after which the main process accepts connections itself.

A reader starts within a second. A connection stays with the process that accepted it, so the main
process does not take clients that connect in the meantime.
"""
SHARE_AGAIN_SECONDS = 0.1
"""Time between two looks for datasets whose index was replaced, and for memory that is free.

Without either, the next look comes after the next pass: only a pass replaces an index. Ten looks a
second cost 0.1 % of a core.
"""
STUCK_BYTES = 1 << 30
"""Bytes of shared memory that readers may keep from being used again by not ending a search."""
ENVELOPE_BYTES = 1024
"""Bytes by which a line may grow when a reader hands it over."""
logger = structlog.get_logger()


class ReadyParams(Params, frozen=True):
    """A reader is ready to accept connections."""

    seat: int


class ShareParams(Params, frozen=True):
    """Share a dataset with readers."""

    dataset: str


class Readers:
    """All readers of a service.

    ``methods`` are the methods that readers hand over. ``server`` and ``sql`` have the listening
    sockets, and accept if no reader is left.
    """

    def __init__(
        self,
        number: int,
        settings: ReaderSettings,
        board: Board,
        server: Server,
        sql: SqlServer | None,
        methods: Methods,
        publisher: Publisher,
        tasks: Tasks,
    ) -> None:
        self.settings = settings
        self.board = board
        self.server = server
        self.sql = sql
        self.servers: list[StreamServer[Any]] = [server]
        self.cancels: Cancels | None = None
        if sql is not None:
            self.servers.append(sql)
            from syncd.readers.sql import Cancels  # imported late: its parser loads slowly

            self.cancels = Cancels(sql, number)
        self.methods = methods
        self.publisher = publisher
        self.sharing = anyio.CapacityLimiter(1)
        self.seats = Seats(number, board, tasks, self.inherited, self.adopt)
        self.reports = Reports(methods.registry, self.seats)
        limits = replace(
            server.limits,
            connections=sys.maxsize,
            line_bytes=server.limits.line_bytes + ENVELOPE_BYTES,
        )
        served = {
            **methods.table(),
            REACH: Method(
                ReachParams, bool, self.reach, "Wait for a search's position.", listed=False
            ),
        }
        self.handed = Server(
            served, socket=None, limits=limits, inputs=server.inputs, version=version("syncd")
        )
        self.own = Server(self.table(), socket=None, limits=limits)

    def table(self) -> dict[str, Method[Any, Any]]:
        """The methods that only readers call."""
        return {
            "reader.ready": Method(ReadyParams, bool, self.ready, "Ready to accept."),
            "reader.share": Method(ShareParams, int, self.share, "Share a dataset."),
            "reader.report": Method(ReportParams, bool, self.reports.note, "Counts and queries."),
            **({} if self.cancels is None else self.cancels.table()),
        }

    async def run(self) -> None:
        """Keep the readers running until cancelled."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self.handed.serve)
            await tasks.start(self.own.serve)
            tasks.start_soon(self.fall_back)
            tasks.start_soon(self.share_again)
            tasks.start_soon(self.seats.run)
            await anyio.sleep_forever()

    async def stop(self) -> None:
        """Have the readers finish the requests under way, then end them."""
        await self.seats.stop(self.settings.stop_seconds)
        self.handed.stop()
        self.own.stop()

    def adopt(self, kind: bytes, link: socket.socket) -> None:
        """Serve a link that a reader has made."""
        (self.handed if kind == CLIENT else self.own).adopt(link)

    def inherited(self) -> Inherited:
        """What a reader gets from this process."""
        sql = [] if self.sql is None else self.sql.bound
        settings = msgspec.structs.replace(self.settings, sql_sockets=len(sql))
        memories = [self.board.descriptor, self.publisher.arena.descriptor]
        return settings, memories, [*self.server.bound, *sql]

    async def ready(self, params: ReadyParams) -> bool:
        """A reader is ready; return when it may accept connections."""
        await self.seats.ready(params.seat)
        return True

    async def share(self, params: ShareParams) -> int | None:
        """Share a dataset; returns the number of its word."""
        name = full_dataset_name(params.dataset)
        if name not in self.methods.registry.by_name:  # clients can invent any number of names
            return None
        return await to_thread.run_sync(self.publisher.share, name, limiter=self.sharing)

    async def share_again(self) -> None:
        """Share the indexes that have replaced shared ones, and free what no reader reads."""
        while True:
            passed = self.publisher.progress.pass_done
            while self.publisher.replaced:
                name = self.publisher.replaced.popleft()
                await to_thread.run_sync(self.publisher.share, name, limiter=self.sharing)
            self.publisher.arena.collect()
            waiting_bytes = self.publisher.arena.waiting_bytes
            if waiting_bytes >= STUCK_BYTES:
                self.seats.end_stuck()
            if not waiting_bytes:
                await passed.wait()
            await anyio.sleep(SHARE_AGAIN_SECONDS)

    async def reach(self, params: ReachParams) -> bool:
        """Return when the position that a search asks for is published.

        If it is not reached, no reader counts the search.
        """
        try:
            await self.methods.reach(
                params.dataset, params.after, params.consistency, params.timeout_ms / 1000
            )
        except BaseException as error:
            self.methods.count_failure(params.dataset, error)
            raise
        return True

    async def fall_back(self) -> None:
        """Accept connections in this process if no reader is left."""
        seats = self.seats
        while not seats.stopping.is_set():
            changed = seats.changed
            if seats.count_ready():
                for server in self.servers:
                    server.pause()
                self.board.note_open(is_open=False)
                await changed.wait()
                continue
            with anyio.move_on_after(FALL_BACK_SECONDS):
                while not seats.count_ready():
                    await seats.changed.wait()
                continue
            if seats.stopping.is_set():
                return
            logger.warning("no_reader", hint="the main process answers; see the log for the reason")
            self.board.note_open(is_open=True)
            for server in self.servers:
                server.accept()
            while not seats.count_ready():
                await seats.changed.wait()
