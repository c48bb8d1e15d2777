"""The processes of the readers: started, watched, ended, and started again.

Invariant: a reader's end costs its own connections only. It is logged and counted, and another
process takes its seat.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import anyio
import structlog
from anyio import to_thread

from syncd.protocol.status_messages import ReaderStatus
from syncd.readers.board import Board
from syncd.readers.link import take_links
from syncd.readers.process import Order, ReaderSettings
from syncd.readers.running import ReaderLost, ReaderProcess
from syncd.supervision import FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS, SETTLED_SECONDS, Tasks

TOGETHER_SECONDS = 1.0
"""How long the first reader that is ready waits for the others."""
STOP_SECONDS = 2.0
"""How long a reader may take to end, beyond the time that its requests may take."""
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
logger = structlog.get_logger()

Inherited = tuple[ReaderSettings, list[int], list[socket.socket]]
"""A reader's settings, the descriptors of shared memories, and the listening sockets."""


class Seats:
    """The seats of ``number`` readers, and the process in each.

    ``inherited`` gives what the next process gets, ``adopt`` takes the main process's end of each
    link with its kind.
    """

    def __init__(
        self,
        number: int,
        board: Board,
        tasks: Tasks,
        inherited: Callable[[], Inherited],
        adopt: Callable[[bytes, socket.socket], None],
    ) -> None:
        self.number = number
        self.board = board
        self.tasks = tasks
        self.inherited = inherited
        self.adopt = adopt
        self.processes: dict[int, ReaderProcess] = {}
        self.restarts = 0
        self.begun = False
        """Whether the first readers accept connections."""
        self.stopping = anyio.Event()
        self.changed = anyio.Event()

    async def run(self) -> None:
        """Keep a reader in each seat until cancelled; then end them."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.end_frozen)
            for seat in range(1, self.number + 1):
                tasks.start_soon(self.keep, seat)

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
                self.adopt(kind, link)
        except BlockingIOError:
            return
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(reader.control)
            reader.ended.set()

    async def ready(self, seat: int) -> None:
        """Note that a reader is ready; return when it may accept connections.

        At a start the readers begin together: the first one would take all clients that wait.
        """
        reader = self.processes.get(seat)
        if reader is None:  # it has ended since
            return
        reader.is_ready = True
        logger.info("reader_ready", reader=reader.seat, pid=reader.process.pid)
        self.note_change()
        if not self.begun:
            with anyio.move_on_after(TOGETHER_SECONDS):
                while self.count_ready() < self.number:
                    await self.changed.wait()
            self.begun = True

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
        """End the readers that began the oldest search: they do not run."""
        busy = self.board.busy()
        oldest = min((epoch for epoch in busy if epoch), default=0)
        for seat, reader in self.processes.items():
            if oldest and busy[seat] == oldest:
                logger.warning("reader_stuck", reader=seat, pid=reader.process.pid)
                reader.kill()

    async def stop(self, seconds: float) -> None:
        """Have the readers finish the requests under way within ``seconds``, then end them."""
        self.stopping.set()
        self.order(Order("stop"))
        with anyio.move_on_after(seconds + STOP_SECONDS):
            for each in list(self.processes.values()):
                await each.ended.wait()
        for each in self.processes.values():
            each.kill()

    def order(self, order: Order) -> None:
        """Send an order to every reader."""
        for each in self.processes.values():
            each.order(order)

    def note_change(self) -> None:
        """Let ``fall_back`` look again."""
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def count_ready(self) -> int:
        """Number of readers that accept connections."""
        return sum(each.is_ready for each in self.processes.values())

    def status(self) -> list[ReaderStatus]:
        """The running readers, by seat."""
        return [
            ReaderStatus(each.process.pid, self.board.connections_of(each.seat), each.memory_bytes)
            for _, each in sorted(self.processes.items())
            if each.is_ready
        ]
