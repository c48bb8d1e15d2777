"""The main process's side of its readers: it starts them, watches them, and starts them again.

Invariant: a reader's end costs its own connections only. It is logged and counted, and another
process takes its seat. Without a reader, the main process accepts connections itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import numpy as np
import structlog
from anyio import to_thread

from syncd.errors import RequestError
from syncd.index.filter.language import parse_filter
from syncd.protocol.messages import Params
from syncd.protocol.status_messages import ReaderStatus
from syncd.protocol.wire import key_from_wire
from syncd.readers.answering import AskedQuery, ReportParams
from syncd.readers.board import Board
from syncd.readers.handing_over import REACH, ReachParams
from syncd.readers.link import CLIENT, take_links
from syncd.readers.process import Order, ReaderSettings
from syncd.readers.publishing import Publisher
from syncd.readers.running import ReaderLost, ReaderProcess
from syncd.rpc.methods import Methods
from syncd.rpc.protocol import Method
from syncd.rpc.server import Server
from syncd.rpc.stream_server import StreamServer
from syncd.supervision import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, SETTLED_SECONDS, Tasks
from syncd.sync.registry.counters import OTHER, Searches
from syncd.sync.registry.datasets import Dataset
from syncd.types import full_dataset_name

if TYPE_CHECKING:
    from syncd.pgwire.server import SqlServer
    from syncd.readers.sql import Cancels

FALL_BACK_SECONDS = 3.0
"""Time without a reader after which the main process accepts connections itself.

A reader starts within a second. A connection stays with the process that accepted it, so the main
process does not take clients that connect in the meantime.
"""
TOGETHER_SECONDS = 1.0
"""How long the first reader that is ready waits for the others."""
STOP_SECONDS = 2.0
"""How long a reader may take to end, beyond the time that its requests may take."""
SHARE_AGAIN_SECONDS = 0.1
"""Time between two looks for datasets whose index was replaced."""
STUCK_BYTES = 1 << 30
"""Bytes of shared memory that readers may keep from being used again by not ending a search."""
COLLECT_SECONDS = 0.5
"""How long a scrape waits for the counts of the readers."""
LOOK_SECONDS = 1.0
"""Time between two looks at the readers' beats."""
FROZEN_LOOKS = 10
"""Looks without a beat after which a reader is frozen: it is ended, and started again.

A reader beats once a second. Its event loop runs no search longer than a few hundredths of a
second, but a slow disk or a busy machine may delay it. Looks count, not seconds: if the whole
machine was stopped, the main process has not looked either.
"""
STARTING_LOOKS = 60
"""The same for a reader that is not ready yet: it may still import its modules."""
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
        self.number = number
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
        self.registry = methods.registry
        self.publisher = publisher
        self.reports = 0
        self.report_came = anyio.Event()
        self.tasks = tasks
        self.restarts = 0
        self.sharing = anyio.CapacityLimiter(1)
        self.begun = False
        """Whether the first readers accept connections."""
        self.processes: dict[int, ReaderProcess] = {}
        self.stopping = anyio.Event()
        self.changed = anyio.Event()
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
            "reader.report": Method(ReportParams, bool, self.report, "Counts and queries."),
            **({} if self.cancels is None else self.cancels.table()),
        }

    async def run(self) -> None:
        """Keep the readers running until cancelled."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self.handed.serve)
            await tasks.start(self.own.serve)
            try:
                tasks.start_soon(self.fall_back)
                tasks.start_soon(self.share_again)
                tasks.start_soon(self.end_frozen)
                for seat in range(1, self.number + 1):
                    tasks.start_soon(self.keep, seat)
                await anyio.sleep_forever()
            finally:
                for each in self.processes.values():
                    each.kill()

    async def keep(self, seat: int) -> None:
        """Keep a reader in one seat."""
        failures = 0
        while not self.stopping.is_set():
            begun = time.monotonic()
            try:
                reader = ReaderProcess(seat, *self.inherited())
            except OSError as error:
                lost = ReaderLost.not_started(seat, error)
            else:
                lost = ReaderLost.ended(seat, await self.watch(reader))
            if self.stopping.is_set():
                return
            failures = failures + 1 if time.monotonic() < begun + SETTLED_SECONDS else 1
            self.restarts += 1
            delay = min(FIRST_RETRY_SECONDS * 2 ** min(failures - 1, 16), LAST_RETRY_SECONDS)
            self.tasks.failed("readers", lost, delay)
            logger.warning(
                "reader_lost",
                reader=seat,
                reason=lost.reason,
                retry_in_seconds=delay,
                hint=lost.hint,
            )
            await anyio.sleep(delay)

    async def watch(self, reader: ReaderProcess) -> int:
        """Take a reader's links until it ends; returns its exit status."""
        loop = asyncio.get_running_loop()
        self.processes[reader.seat] = reader
        loop.add_reader(reader.control, self.take_links, reader)
        try:
            await reader.ended.wait()
        finally:
            loop.remove_reader(reader.control)
            reader.kill()
            del self.processes[reader.seat]
            with anyio.CancelScope(shield=True):
                status = await to_thread.run_sync(reader.process.wait)
            reader.close()
            self.board.clear(reader.seat)
            self.note_change()
        return status

    def take_links(self, reader: ReaderProcess) -> None:
        """Serve the links that a reader has made; note its end."""
        try:
            for kind, link in take_links(reader.control):
                (self.handed if kind == CLIENT else self.own).adopt(link)
        except BlockingIOError:
            return
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(reader.control)
            reader.ended.set()

    async def ready(self, params: ReadyParams) -> bool:
        """Note that a reader is ready; return when it may accept connections.

        At a start the readers begin together: the first one would take all clients that wait.
        """
        reader = self.processes[params.seat]
        reader.is_ready = True
        logger.info("reader_ready", reader=reader.seat, pid=reader.process.pid)
        self.note_change()
        if not self.begun:
            with anyio.move_on_after(TOGETHER_SECONDS):
                while self.count_ready() < self.number:
                    await self.changed.wait()
            self.begun = True
        return True

    def inherited(self) -> tuple[ReaderSettings, list[int], list[socket.socket]]:
        """A reader's settings, the descriptors of shared memories, and the listening sockets."""
        sql = [] if self.sql is None else self.sql.bound
        settings = msgspec.structs.replace(self.settings, sql_sockets=len(sql))
        return settings, self.shared, [*self.server.bound, *sql]

    @property
    def shared(self) -> list[int]:
        """Descriptors of the shared memories, in the order of a reader's arguments."""
        return [self.board.descriptor, self.publisher.arena.descriptor]

    async def share(self, params: ShareParams) -> int | None:
        """Share a dataset; returns the number of its word."""
        name = full_dataset_name(params.dataset)
        if name not in self.registry.by_name:  # clients can invent any number of names
            return None
        return await to_thread.run_sync(self.publisher.share, name, limiter=self.sharing)

    async def share_again(self) -> None:
        """Share the indexes that have replaced shared ones, and free what no reader reads."""
        while True:
            await anyio.sleep(SHARE_AGAIN_SECONDS)
            while self.publisher.replaced:
                name = self.publisher.replaced.popleft()
                await to_thread.run_sync(self.publisher.share, name, limiter=self.sharing)
            self.publisher.arena.collect()
            self.end_stuck()

    async def end_frozen(self) -> None:
        """End the readers whose event loop does not run, forever: their clients would wait."""
        while True:
            await anyio.sleep(LOOK_SECONDS)
            for seat, reader in self.processes.items():
                beats = self.board.beats_of(seat)
                reader.looks = 0 if beats != reader.beats else reader.looks + 1
                reader.beats = beats
                if reader.looks >= (FROZEN_LOOKS if reader.is_ready else STARTING_LOOKS):
                    logger.warning("reader_frozen", reader=seat, pid=reader.process.pid)
                    reader.kill()

    def end_stuck(self) -> None:
        """End the readers that keep much memory from being used again, because they do not run."""
        if self.publisher.arena.waiting_bytes < STUCK_BYTES:
            return
        busy = self.board.busy()
        oldest = min((epoch for epoch in busy if epoch), default=0)
        for seat, reader in self.processes.items():
            if oldest and busy[seat] == oldest:
                logger.warning("reader_stuck", reader=seat, pid=reader.process.pid)
                reader.kill()

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

    def report(self, params: ReportParams) -> bool:
        """Add a reader's counts and queries to those of this process."""
        counters, datasets = self.registry.counters, self.registry.by_name
        for name, counted in params.searches.items():
            searches = Searches()
            searches.seconds.counts, searches.seconds.sum = counted.counts, counted.seconds
            searches.outcomes.update(counted.outcomes)
            counters.searches_of(name if name in datasets else OTHER).add(searches)
        for asked in params.queries:
            dataset = datasets.get(asked.dataset)
            if dataset is not None:
                note_query(dataset, asked)
        reader = self.processes.get(params.seat)
        if reader is not None and params.answers:
            reader.reported = params.answers
            came, self.report_came = self.report_came, anyio.Event()
            came.set()
        return True

    async def collect(self) -> None:
        """Return when every reader has reported, or after ``COLLECT_SECONDS``."""
        self.reports += 1
        number = self.reports
        for each in self.processes.values():
            each.order(Order("report", number))
        with anyio.move_on_after(COLLECT_SECONDS):
            while any(each.is_ready and each.reported < number for each in self.processes.values()):
                await self.report_came.wait()

    def note_change(self) -> None:
        """Let ``fall_back`` look again."""
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def count_ready(self) -> int:
        """Number of readers that accept connections."""
        return sum(each.is_ready for each in self.processes.values())

    async def fall_back(self) -> None:
        """Accept connections in this process if no reader is left."""
        while not self.stopping.is_set():
            changed = self.changed
            if self.count_ready():
                for server in self.servers:
                    server.pause()
                self.board.note_open(is_open=False)
                await changed.wait()
                continue
            with anyio.move_on_after(FALL_BACK_SECONDS):
                while not self.count_ready():
                    await self.changed.wait()
                continue
            if self.stopping.is_set():
                return
            logger.warning("no_reader", hint="the main process answers; see the log for the reason")
            self.board.note_open(is_open=True)
            for server in self.servers:
                server.accept()
            while not self.count_ready():
                await self.changed.wait()

    async def stop(self) -> None:
        """Have the readers finish the requests under way, then end them."""
        self.stopping.set()
        readers = list(self.processes.values())
        for each in readers:
            each.order(Order("stop"))
        with anyio.move_on_after(self.settings.stop_seconds + STOP_SECONDS):
            for each in readers:
                await each.ended.wait()
        for each in readers:
            each.kill()
        self.handed.stop()
        self.own.stop()

    def status(self) -> list[ReaderStatus]:
        """The running readers, by seat."""
        return [
            ReaderStatus(each.process.pid, self.board.connections_of(each.seat), each.memory_bytes)
            for _, each in sorted(self.processes.items())
            if each.is_ready
        ]


def note_query(dataset: Dataset, asked: AskedQuery) -> None:
    """Sample a query that a reader answered, unless the dataset has changed its columns."""
    with contextlib.suppress(RequestError):
        view = dataset.index.view
        wanted = parse_filter(msgspec.json.decode(asked.filter) or {}, view.columns, dataset.name)
        key = msgspec.json.decode(asked.key)
        own = None if key is None else key_from_wire(dataset.key_kind, key, dataset.key_kinds)
        query = np.frombuffer(asked.vector, dtype="<f4")[None]
        dataset.index.asked.note(query, wanted, own)
