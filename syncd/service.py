"""The service: all tasks of syncd serve, from the opening of its socket to the last checkpoint."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import anyio
import structlog
from anyio import TASK_STATUS_IGNORED, CancelScope, create_task_group
from anyio.abc import TaskGroup, TaskStatus

from syncd.cluster.own_shard import advertised, check_shard
from syncd.cores import available_cores, has_uvloop
from syncd.errors import DatabaseUnreachable, SyncdError
from syncd.index.storage.arena import Arena
from syncd.ops.notify import notify
from syncd.ops.parts import Parts
from syncd.ops.run import Ops
from syncd.postgres.control import Control
from syncd.postgres.listener import Listener
from syncd.readers.board import Board
from syncd.readers.pool import Readers
from syncd.readers.process import ReaderSettings
from syncd.readers.publishing import Publisher
from syncd.rpc.dispatch import Limits
from syncd.rpc.inputs import Inputs
from syncd.rpc.methods import Methods
from syncd.rpc.server import Server
from syncd.settings import Settings
from syncd.shard import WHOLE
from syncd.store.checkpoint import CheckpointStore
from syncd.store.data_dir import locked_data_dir
from syncd.supervision import Tasks, first_cause, stop_at_signal
from syncd.sync.background.builder import Builder
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.repairing import Repairer
from syncd.sync.background.reports import Reporter
from syncd.sync.background.rotation import Rotator
from syncd.sync.background.status import Status
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.consumer.session import Session
from syncd.sync.registry.datasets import Registry

if TYPE_CHECKING:
    from syncd.pgwire.server import SqlServer

START_SECONDS = 25.0
"""How long the database may take to answer at a start."""
SWITCH_SECONDS = 0.001
"""Python's thread switch interval: how long a pass's thread may delay the event loop.

The event loop answers searches.
"""
LAST_PROOF_SECONDS = 5.0
"""How long a stop waits for PostgreSQL to confirm the last checkpoint.

These limits end a stop after about 10 s, whatever the database does. Only writing a checkpoint's
files may take longer.
"""
LAST_REPORT_SECONDS = 2.0
"""How long a stop waits for the last report to the database."""
STOP_REQUESTS_SECONDS = 8.0
"""How long a stop waits for requests under way."""
FILES_IN_READER = 2
"""Descriptors of one connection in a reader: its own, and its link to the main process.

One reader may have all connections, while no other one runs.
"""
NO_READERS_HINT = (
    "the main process answers alone; raise the limit of addresses (ulimit -v) to have readers, or "
    "set SYNCD_READERS=0"
)
FILES_BESIDE_CONNECTIONS = 400
"""Descriptors for the database, a checkpoint's files, spare connections, and refused ones."""

logger = structlog.get_logger()


async def run(
    settings: Settings,
    *,
    once: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or SIGINT; with ``once``, catch up, save a checkpoint and return.

    ``say`` gets the one line ``ready <socket>``. Raises ``SyncdError`` if the service cannot start,
    or if another process takes the consumer's name. If the database is lost later, the service
    waits for it.
    """
    allow_many_files()
    sys.setswitchinterval(SWITCH_SECONDS)
    with locked_data_dir(settings.data_dir):
        await Service(settings, once=once, say=say).run()


async def run_with(settings: Settings, once: bool, say: Callable[[str], None]) -> None:
    """``run`` for callers that can only pass positional arguments."""
    await run(settings, once=once, say=say)


class Service:
    """The parts of the service, and the order in which they start and stop."""

    def __init__(self, settings: Settings, *, once: bool, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.once = once
        self.say = say
        self.store = CheckpointStore(settings.data_dir)
        manifest = self.store.load()
        check_shard(settings, manifest)
        removed = self.store.remove_leftovers()
        if removed:
            logger.info("leftovers_removed", files=removed)
        session = Session(settings, str(uuid.uuid4()))
        registry = Registry(settings.data_dir)
        self.consumer = Consumer(session, registry, manifest)
        self.tasks: Tasks = registry.tasks
        self.control = Control(settings.conninfo, settings.consumer, lambda: session.notifies)
        self.checkpointer = Checkpointer(self.consumer, session, self.control, self.store)
        self.listener = Listener(settings.conninfo, settings.consumer, self.consumer.wake)
        self.consumer.listens = lambda: self.listener.connected
        self.reporter = Reporter(self.consumer, session, self.control)
        self.verifier = Verifier(self.consumer, session)
        self.repairer = Repairer(self.consumer, self.control)
        self.builder = Builder(registry, self.consumer.rebuild, self.checkpointer, settings.recall)
        self.rotator = Rotator(self.consumer, session, self.control, self.checkpointer)
        self.stopping = anyio.Event()
        self.rpc_stopped = anyio.Event()
        self.sql_stopped = anyio.Event()
        inputs = Inputs()
        status = Status(
            self.consumer,
            session,
            self.checkpointer,
            self.verifier,
            self.builder,
            self.listener,
            version=version("syncd"),
        )
        methods = Methods(
            self.consumer,
            self.checkpointer,
            self.verifier,
            status,
            inputs=inputs,
            search_threads=available_cores(),
            recall=settings.recall,
            shard=session.shard,
        )
        shared = None if once else shared_memory(settings)
        connections = connections_within_files(
            settings.max_connections,
            listeners=1 + (settings.sql_address is not None),
            files_each=1 if shared is None else FILES_IN_READER,
        )
        self.server = Server(
            methods.table(),
            socket=settings.socket_path,
            listen=settings.tcp_listen,
            token=settings.token.get_secret_value() or None,
            tls=settings.tls,
            limits=Limits(
                connections=connections,
                stop_seconds=STOP_REQUESTS_SECONDS,
            ),
            inputs=inputs,
            version=version("syncd"),
            places=None if shared is None else shared[0].rpc,
            accepts=shared is None,
        )
        self.sql: SqlServer | None = None
        if settings.sql_address is not None:
            from syncd.pgwire.server import SqlServer  # imported late: its parser loads slowly

            self.sql = SqlServer(
                self.server.dispatcher,
                listen=settings.sql_address,
                token=settings.token.get_secret_value(),
                tls=settings.tls,
                inputs=inputs,
                places=None if shared is None else shared[0].sql,
                accepts=shared is None,
            )
        self.readers: Readers | None = None
        if shared is not None:
            board, arena = shared
            self.readers = Readers(
                settings.reader_count,
                reader_settings(settings, connections),
                board,
                self.server,
                self.sql,
                methods,
                Publisher(arena, self.consumer),
                self.tasks,
            )
            status.readers = self.readers.seats.status
        self.ops = Ops(
            Parts(
                settings,
                self.consumer,
                self.checkpointer,
                self.listener,
                self.reporter,
                self.verifier,
                self.rotator,
                status,
                methods,
                self.readers,
            )
        )

    async def run(self) -> None:
        """Run until a signal: open the socket, reach the database, then start all other tasks."""
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(stop_at_signal, self.stopping)
                await tasks.start(self.serve_rpc)
                await tasks.start(self.serve_sql)
                if self.readers is not None:
                    tasks.start_soon(self.tasks.keep, "readers", self.readers.run)
                self.advertise()
                await self.ops.start(tasks)
                started = await self.reach_database(tasks)
                async with create_task_group() as background:
                    if started:
                        self.start_background(background)
                        self.ops.observe(tasks)
                        tasks.start_soon(self.announce)
                    await self.stopping.wait()
                    self.ops.stopping()
                    self.server.stop()
                    if self.sql is not None:
                        self.sql.stop()
                    self.consumer.session.patience.stopping = True
                    background.cancel_scope.cancel()
                with CancelScope(shield=True):
                    # both at once: requests under way may wait for the database as well
                    async with create_task_group() as last:
                        last.start_soon(self.rpc_stopped.wait)
                        if self.readers is not None:
                            last.start_soon(self.readers.stop)
                        last.start_soon(self.sql_stopped.wait)
                        if started:
                            last.start_soon(self.save_last_checkpoint)
                    await self.ops.stop()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from group
        finally:
            await self.control.close()

    def advertise(self) -> None:
        """Let the consumer say where this syncd answers: it listens by now."""
        self.consumer.session.address = advertised(self.settings, self.server.tcp_addresses)

    async def reach_database(self, tasks: TaskGroup) -> bool:
        """Start the consumer and the listener; returns False if a stop came first.

        Raises ``DatabaseError``.
        """
        with anyio.move_on_after(START_SECONDS) as starting:
            tasks.start_soon(self.give_up, starting)
            await tasks.start(self.consumer.run)
            if self.consumer.session.notifies:
                await tasks.start(partial(self.tasks.keep_started, "listener", self.listener.run))
        if starting.cancelled_caught and not self.stopping.is_set():
            raise DatabaseUnreachable(
                f"the database has not answered for {START_SECONDS:.0f} s",
                hint="set SYNCD_DSN to a server that runs",
            )
        return not starting.cancelled_caught

    async def give_up(self, starting: CancelScope) -> None:
        """End a start after a request to stop."""
        await self.stopping.wait()
        starting.cancel()

    def start_background(self, tasks: TaskGroup) -> None:
        """Start the tasks that run alongside passes and requests.

        A stop ends them first: the last checkpoint must not wait for them.
        """
        kept: Mapping[str, Callable[[], Awaitable[None]]] = {
            "checkpointer": partial(self.checkpointer.run, self.settings.checkpoint_seconds),
            "reporter": self.reporter.run,
            "verifier": partial(self.verifier.run, self.settings.verify_seconds),
            "repairer": self.repairer.run,
            "rotator": self.rotator.run,
            "builder": self.builder.run,
        }
        for task, run in kept.items():
            tasks.start_soon(self.tasks.keep, task, run)

    async def announce(self) -> None:
        """Say ``ready`` when each dataset answers, or has failed."""
        await self.consumer.ready.wait()
        with contextlib.suppress(OSError, ValueError):  # stdout was closed
            self.say(f"ready {self.settings.socket_path}")
        notify("READY=1\nSTATUS=every dataset answers, or has failed")
        if self.once:
            self.stopping.set()

    async def serve_rpc(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve until a stop. The server finishes requests under way, within its own time limit."""
        try:
            await self.tasks.keep_started("rpc", self.server.serve, task_status=task_status)
        finally:
            self.rpc_stopped.set()

    async def serve_sql(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve PostgreSQL clients until a stop, if there is an address for them."""
        try:
            if self.sql is None:
                task_status.started()
            else:
                await self.tasks.keep_started("sql", self.sql.serve, task_status=task_status)
        finally:
            self.sql_stopped.set()

    async def save_last_checkpoint(self) -> None:
        """Save a checkpoint at a stop, and report how it ended.

        If this fails, the previous checkpoint is kept, and the next start replays from there.
        """
        try:
            await self.checkpointer.save(LAST_PROOF_SECONDS)
        except SyncdError as error:
            logger.error("checkpoint_failed", error=str(error), hint=error.hint)
        if self.consumer.connected:
            with anyio.move_on_after(LAST_REPORT_SECONDS), contextlib.suppress(SyncdError):
                await self.reporter.report()


def shared_memory(settings: Settings) -> tuple[Board, Arena] | None:
    """The memory that is shared with readers; None without readers."""
    if not settings.reader_count:
        return None
    try:
        board = Board.create()
        return board, Arena(board.busy)
    except (OSError, AttributeError) as error:  # no Linux, or a sandbox that refuses it
        logger.warning("no_readers", error=str(error), hint=NO_READERS_HINT)
        return None


def reader_settings(settings: Settings, connections: int) -> ReaderSettings:
    """The settings that readers need."""
    tls, limits = settings.tls, Limits()
    return ReaderSettings(
        main_pid=os.getpid(),
        token=settings.token.get_secret_value() or None,
        tls=None if tls is None else (str(tls[0].absolute()), str(tls[1].absolute())),
        connections=connections,
        stop_seconds=STOP_REQUESTS_SECONDS,
        held_bytes=max(limits.held_bytes // settings.reader_count, 4 * limits.line_bytes),
        uvloop=has_uvloop(),
        recall=settings.recall,
        shard=settings.shard or str(WHOLE),
    )


def allow_many_files() -> None:
    """Raise the soft limit of open files to the hard one.

    Connections and mapped files need more than the usual 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # macOS reports a hard limit that it does not grant
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_within_files(wanted: int, listeners: int = 1, files_each: int = 1) -> int:
    """The number of connections of each listener, lowered to the available descriptors.

    A connection that cannot be accepted could not be told the reason.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max((files - FILES_BESIDE_CONNECTIONS) // listeners // files_each, 1)
    if files == resource.RLIM_INFINITY or wanted <= allowed:
        return wanted
    logger.warning(
        "connections_limited",
        connections=allowed,
        open_files=files,
        hint="raise the limit of open files (ulimit -n), or lower SYNCD_MAX_CONNECTIONS",
    )
    return allowed
