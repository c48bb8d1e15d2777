"""A reader process, from its start by the main process to its end.

Invariant: a reader never outlives the main process. Its input is a pipe from the main process: each
line is an order, and the end of the pipe is the end of the reader. The kernel ends it as well.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import msgspec
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from syncd.index.shared.taking import TakenIndex
from syncd.index.storage.arena import ArenaView
from syncd.log import configure_logging
from syncd.readers.answering import Answering
from syncd.readers.board import Board
from syncd.readers.handing_over import HandingOver
from syncd.readers.link import OWN, Link, open_link
from syncd.readers.shelf import Busy, Shelf
from syncd.rpc.dispatch import Dispatcher, Limits
from syncd.rpc.inputs import Inputs
from syncd.rpc.protocol import Method
from syncd.rpc.server import Server
from syncd.rpc.stream_server import StreamServer
from syncd.shard import Shard
from syncd.types import DatasetName

if TYPE_CHECKING:
    from syncd.readers.sql import ReaderSqlServer

PR_SET_PDEATHSIG = 1
"""``prctl``'s number for the signal that a process gets when its parent ends: prctl(2)."""
SWITCH_SECONDS = 0.001
"""Python's thread switch interval: how long a search's thread may delay the event loop."""
LEFT_TO_MAIN = frozenset({"rpc.discover"})
"""Methods of every server that only the main process can answer."""
ORDER_BYTES = 1 << 16
REPORT_SECONDS = 1.0
"""Time between two reports to the main process."""
NOT_LOADED_HINT = (
    "the main process answers for this dataset; if it is for lack of memory, raise the limit "
    "(ulimit -v), or set a lower SYNCD_READERS"
)
BEAT_SECONDS = 1.0
"""Time between two beats: see ``Board.beat``."""

logger = structlog.get_logger()


class ReaderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a reader: the first line of its input."""

    main_pid: int
    token: str | None
    tls: tuple[str, str] | None
    connections: int
    """Most connections of all processes together."""
    stop_seconds: float
    held_bytes: int
    """See ``Limits``; the readers share what one process would have."""
    uvloop: bool
    recall: float
    """Recall of searches that name none."""
    sql_sockets: int = 0
    """Number of the inherited sockets, the last ones, that are for PostgreSQL clients."""
    shard: str
    """The shard whose rows the service has."""
    verbose: bool = False


class Order(msgspec.Struct, frozen=True):
    """An order of the main process: a line of a reader's input."""

    do: Literal["stop", "report"]
    number: int = 0
    """Number of an order to report."""


class ReaderServer(Server):
    """The server of a reader: it hands over what it does not answer."""

    def __init__(
        self, methods: Mapping[str, Method[Any, Any]], control: socket.socket, **options: Any
    ) -> None:
        self._control = control
        super().__init__(methods, socket=None, accepts=False, **options)

    def make_dispatcher(
        self, methods: Mapping[str, Method[Any, Any]], limits: Limits
    ) -> Dispatcher:
        """See ``Server``."""
        mine = {name: method for name, method in methods.items() if name not in LEFT_TO_MAIN}
        return HandingOver(mine, limits, self._control)


class Reader:
    """The parts of one reader."""

    def __init__(
        self,
        settings: ReaderSettings,
        control: socket.socket,
        board: Board,
        arena: ArenaView,
        listening: Sequence[socket.socket],
    ) -> None:
        self.control = control
        self.board = board
        self.stopping = anyio.Event()
        self.link: Link
        self.tasks: TaskGroup
        self.loader: Loader
        inputs = Inputs()
        self.answering = Answering(
            lambda answering: Shelf(
                arena,
                ask=self.share_soon,
                load=lambda index: self.loader.load_soon(index),
                note_queries=answering.note_queries,
            ),
            Busy(arena, board),
            inputs,
            settings.recall,
            Shard.parse(settings.shard),
        )
        tls = settings.tls
        certificate = None if tls is None else (Path(tls[0]), Path(tls[1]))
        self.server = ReaderServer(
            self.answering.table(),
            control,
            inherited=listening[: len(listening) - settings.sql_sockets],
            token=settings.token,
            tls=certificate,
            limits=Limits(
                connections=settings.connections,
                stop_seconds=settings.stop_seconds,
                held_bytes=settings.held_bytes,
            ),
            inputs=inputs,
            places=board.rpc,
        )
        self.servers: list[StreamServer[Any]] = [self.server]
        self.sql: ReaderSqlServer | None = None
        if settings.sql_sockets:
            # imported only here: its SQL parser takes 11 MB and 0.1 s
            from syncd.readers.sql import ReaderSqlServer

            self.sql = ReaderSqlServer(
                lambda: self.link,
                self.server.dispatcher,
                token=settings.token or "",
                tls=certificate,
                seat=board.seat,
                inputs=inputs,
                inherited=listening[-settings.sql_sockets :],
                places=board.sql,
            )
            self.servers.append(self.sql)

    async def run(self) -> None:
        """Serve until the order to stop."""
        async with anyio.create_task_group() as self.tasks:
            self.loader = Loader(self.tasks)
            self.tasks.start_soon(self.beat_often)
            self.link = await open_link(self.control, OWN)
            Orders(self.obey).start()
            async with anyio.create_task_group() as serving:
                for server in self.servers:
                    await serving.start(server.serve)
                self.board.note_open(is_open=True)  # or a faster reader takes all that wait
                await self.link.ask("reader.ready", b'{"seat":%d}' % self.board.seat)
                for server in self.servers:
                    server.accept()
                self.tasks.start_soon(self.report_often)
                if self.sql is not None:
                    self.tasks.start_soon(self.sql.take_cancels)
                await self.stopping.wait()
                self.board.note_open(is_open=False)
                for server in self.servers:
                    server.stop()
            await self.report(0)
            self.tasks.cancel_scope.cancel()

    def obey(self, order: Order) -> None:
        """Carry out an order of the main process."""
        if order.do == "stop":
            self.stopping.set()
        else:
            self.tasks.start_soon(self.report, order.number)

    async def beat_often(self) -> None:
        """Say each second that the event loop runs: else the main process ends this process.

        Nothing else is awaited here, so a main process that is slow to answer delays no beat.
        """
        while True:
            self.board.beat()
            await anyio.sleep(BEAT_SECONDS)

    async def report_often(self) -> None:
        """Report each second."""
        while True:
            await anyio.sleep(REPORT_SECONDS)
            await self.report(0)

    async def report(self, answers: int) -> None:
        """Tell the main process what happened since the last report."""
        self.answering.tidy()
        report = self.answering.report(self.board.seat, answers)
        if report.searches or report.queries or answers:
            await self.link.ask("reader.report", msgspec.json.encode(report))

    def share_soon(self, name: DatasetName) -> None:
        """Have a dataset shared, without waiting."""
        self.tasks.start_soon(self.share, name)

    async def share(self, name: DatasetName) -> None:
        """Have the main process share a dataset."""
        answer = await self.link.ask("reader.share", msgspec.json.encode({"dataset": name}))
        _, found, word = answer.rstrip(b"}\n").partition(b',"result":')
        is_shared = bool(found) and word.isdigit()
        self.answering.shelf.answered(name, int(word) if is_shared else None)


class Loader:
    """Loads codes in a worker thread, one index at a time."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._limiter = anyio.CapacityLimiter(1)

    def load_soon(self, index: TakenIndex) -> None:
        """Have the codes of an index loaded. Any thread may call it."""
        self._loop.call_soon_threadsafe(
            self._tasks.start_soon,
            self._load,
            index,
            context=self._context,  # in a worker thread's context, anyio finds no event loop
        )

    async def _load(self, index: TakenIndex) -> None:
        try:
            await to_thread.run_sync(index.load, limiter=self._limiter)
        except Exception:  # an error of FAISS, too little memory, or no further thread
            logger.exception("codes_not_loaded", hint=NOT_LOADED_HINT)


class Orders:
    """The orders of the main process, from this process's input."""

    def __init__(self, obey: Callable[[Order], None]) -> None:
        self._obey = obey
        self._rest = b""
        self._decoder = msgspec.json.Decoder(Order)

    def start(self) -> None:
        """Read from now on, until the main process ends: then this process ends as well."""
        os.set_blocking(sys.stdin.fileno(), False)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._read)

    def _read(self) -> None:
        try:
            some = os.read(sys.stdin.fileno(), ORDER_BYTES)
        except BlockingIOError:
            return
        if not some:
            os._exit(1)  # at once: no request can be handed over any more
        *lines, self._rest = (self._rest + some).split(b"\n")
        for line in lines:
            self._obey(self._decoder.decode(line))


def main(arguments: Sequence[str]) -> None:
    """Run a reader; the arguments are its seat, and the descriptors that it inherits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the main process says when to stop
    seat, control, board, arena, *listening = map(int, arguments)
    with open(0, "rb", buffering=0, closefd=False) as orders:  # unbuffered: leaves the others
        first = orders.readline()
    if not first:
        os._exit(1)
    settings = msgspec.json.decode(first, type=ReaderSettings)
    end_with(settings.main_pid)
    configure_logging(verbose=settings.verbose)
    structlog.contextvars.bind_contextvars(reader=seat)
    sys.setswitchinterval(SWITCH_SECONDS)

    async def run() -> None:
        await Reader(
            settings,
            socket.socket(fileno=control),
            Board(board, seat),
            ArenaView(arena),
            [socket.socket(fileno=each) for each in listening],
        ).run()

    anyio.run(run, backend_options={"use_uvloop": settings.uvloop})
    sys.stderr.flush()
    os._exit(0)  # a thread may still search for a client that left


def end_with(main_pid: int) -> None:
    """Have the kernel end this process when the main process has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != main_pid:  # it ended before the kernel was told
        os._exit(1)
