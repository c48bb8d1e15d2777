"""The HTTP port of a process: one small web server, which only reads."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import anyio
import msgspec
import structlog
import uvicorn
from anyio import TASK_STATUS_IGNORED, to_thread
from anyio.abc import TaskStatus
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from syncd.errors import AddressInUse
from syncd.host_port import join_host_port
from syncd.ops.page_style import SECURITY_POLICY
from syncd.rpc.sockets import bind_tcp
from syncd.settings import Settings

CONNECTIONS = 64
STOP_SECONDS = 2
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": SECURITY_POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

T = TypeVar("T")

logger = structlog.get_logger()


class Quiet(uvicorn.Server):
    """uvicorn without its own signal handlers: the service stops its parts in one order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


class WebServer(ABC):
    """An HTTP server on ``SYNCD_HTTP``: ``/livez``, ``/readyz``, ``/status``, ``/metrics``, a page.

    A subclass has their contents. All routes only read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.one_at_a_time = anyio.CapacityLimiter(1)
        self.server: Quiet | None = None
        self.stopped = anyio.Event()

    @abstractmethod
    async def show_readyz(self, _: Request) -> Response:
        """200 if clients may be sent here, else 503 with the reasons."""

    @abstractmethod
    async def show_status(self, _: Request) -> Response:
        """The state, as the RPC tells it."""

    @abstractmethod
    async def show_page(self, request: Request) -> Response:
        """The page for people."""

    @abstractmethod
    async def metrics_text(self) -> bytes:
        """All metrics, in the text format of Prometheus."""

    def more_routes(self) -> Sequence[Route]:
        """Routes that only this server has."""
        return ()

    async def show_livez(self, _: Request) -> Response:
        """200: an answer shows that the event loop runs."""
        return Response("ok\n", media_type="text/plain", headers=HEADERS)

    async def show_metrics(self, _: Request) -> Response:
        """The text format of Prometheus."""
        return Response(
            await self.metrics_text(), headers=HEADERS | {"content-type": CONTENT_TYPE_LATEST}
        )

    def application(self) -> Starlette:
        """The routes."""
        common = {
            "/": self.show_page,
            "/livez": self.show_livez,
            "/readyz": self.show_readyz,
            "/status": self.show_status,
            "/metrics": self.show_metrics,
        }
        routes = [Route(path, show, methods=["GET"]) for path, show in common.items()]
        return Starlette(routes=[*routes, *self.more_routes()])

    async def serve(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop``. If the default port is in use, the service runs without HTTP.

        A second syncd on this machine may use the port, for example. Raises ``AddressInUse`` for a
        port that the user has chosen, ``SettingsError`` for an address that is not this machine's.
        """
        settings = self.settings
        self.stopped = anyio.Event()
        try:
            sockets = await to_thread.run_sync(bind_tcp, settings.http, "SYNCD_HTTP")
        except AddressInUse as error:
            if settings.http_was_chosen:
                raise
            logger.warning("http_not_served", reason=error.message, hint=error.hint)
            self.stopped.set()
            task_status.started()
            return
        self.server = Quiet(
            uvicorn.Config(
                self.application(),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http="h11",
                proxy_headers=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        for each in sockets:
            logger.info("http_listening", address=join_host_port(*each.getsockname()[:2]))
        task_status.started()  # the sockets listen: a client that connects now is answered
        try:
            await self.server.serve(sockets)
        finally:
            for listening in getattr(self.server, "servers", ()):  # still open after an error
                listening.close()
            for each in sockets:
                each.close()
            self.stopped.set()

    def stop(self) -> None:
        """Answer the requests that have begun, and end ``serve``."""
        if self.server is not None:
            self.server.should_exit = True

    async def in_thread(self, render: Callable[[], T]) -> T:
        """Render in a worker thread."""
        return await to_thread.run_sync(render, limiter=self.one_at_a_time)


def json(value: object, status: int = 200) -> Response:
    """A JSON answer that ends with a newline, for a terminal."""
    return Response(
        msgspec.json.encode(value) + b"\n",
        status_code=status,
        media_type="application/json",
        headers=HEADERS,
    )
