"""``syncd route``: the RPC on one side, the shards on the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import anyio
import structlog
from anyio import create_task_group

from syncd.cluster.fleet import Fleet
from syncd.cluster.router import Router
from syncd.errors import DatabaseUnreachable, SettingsError
from syncd.host_port import join_host_port
from syncd.ops.notify import keep_watchdog, notify
from syncd.rpc.dispatch import Limits
from syncd.rpc.server import Server
from syncd.settings import OFF, Settings
from syncd.supervision import Tasks, first_cause, stop_at_signal

if TYPE_CHECKING:
    from syncd.pgwire.server import SqlServer

START_SECONDS = 25.0
"""How long the database may take to answer at a start."""
STOP_SECONDS = 8.0
"""How long a stop waits for requests under way."""

logger = structlog.get_logger()


async def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Route until SIGTERM or SIGINT.

    ``say`` gets the one line ``ready <address>`` when the shards are known. Raises ``SyncdError``
    if the router cannot start. If the database is lost later, the last known shards are asked.
    """
    await RouterService(settings, say).run()


class RouterService:
    """The parts of a router, and the order in which they start and stop."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        if settings.tcp_listen is None and settings.socket is None:
            raise SettingsError(
                "a router has no address: neither listen nor socket is set",
                hint="syncd route --listen 0.0.0.0:7432, with SYNCD_TOKEN",
            )
        token = settings.token.get_secret_value() or None
        self.settings = settings
        self.say = say
        self.tasks = Tasks()
        self.stopping = anyio.Event()
        self.fleet = Fleet(settings.conninfo, token, listens=settings.notify != "off")
        self.router = Router(self.fleet, version=version("syncd"))
        self.server = Server(
            self.router.table(),
            socket=None if settings.socket is None else settings.socket_path,
            listen=settings.tcp_listen,
            token=token,
            tls=settings.tls,
            limits=Limits(connections=settings.max_connections, stop_seconds=STOP_SECONDS),
            version=version("syncd"),
        )
        self.sql: SqlServer | None = None
        if settings.sql_address is not None:
            from syncd.pgwire.server import SqlServer  # imported late: its parser loads slowly

            self.sql = SqlServer(
                self.server.dispatcher,
                listen=settings.sql_address,
                token=token or "",
                tls=settings.tls,
            )

    async def run(self) -> None:
        """Run until a signal: find the shards, then listen."""
        from syncd.cluster.http import RouterHttp  # imported late: the web server loads slowly

        http = None if self.settings.http == OFF else RouterHttp(self.settings, self.router)
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(stop_at_signal, self.stopping)
                with anyio.fail_after(START_SECONDS):
                    await tasks.start(partial(self.tasks.keep_started, "layout", self.fleet.watch))
                tasks.start_soon(self.tasks.keep, "probe", self.fleet.probe)
                tasks.start_soon(self.tasks.keep, "cuts", self.router.cuts.close_idle)
                if http is not None:
                    await tasks.start(partial(self.tasks.keep_started, "http", http.serve))
                async with create_task_group() as listening:
                    if self.sql is not None:
                        await listening.start(
                            partial(self.tasks.keep_started, "sql", self.sql.serve)
                        )
                    await listening.start(
                        partial(self.tasks.keep_started, "rpc", self.server.serve)
                    )
                    self.announce()
                    tasks.start_soon(self.tasks.keep, "watchdog", keep_watchdog)
                    await self.stopping.wait()
                    notify("STOPPING=1")
                    if http is not None:
                        http.stopping = True
                    self.server.stop()
                    if self.sql is not None:
                        self.sql.stop()
                if http is not None:
                    http.stop()
                    await http.stopped.wait()
                tasks.cancel_scope.cancel()
        except TimeoutError:
            raise DatabaseUnreachable(
                f"the database has not answered for {START_SECONDS:.0f} s",
                hint="set SYNCD_DSN to a server that runs",
            ) from None
        except BaseExceptionGroup as group:
            raise first_cause(group) from group
        finally:
            with anyio.CancelScope(shield=True):
                await self.router.cuts.leader.close()
                for each in (*self.fleet.replicas, *(each for _, each in self.fleet.left)):
                    await each.close()

    def announce(self) -> None:
        """Say ``ready``: the router listens, and knows the shards."""
        addresses = [join_host_port(host, port) for host, port in self.server.tcp_addresses]
        with contextlib.suppress(OSError, ValueError):  # stdout was closed
            self.say(f"ready {addresses[0] if addresses else self.settings.socket_path}")
        notify("READY=1\nSTATUS=the shards are known")
