"""Operators' HTTP port: ``/livez``, ``/readyz``, ``/status``, ``/metrics``, the page at ``/``.

It only reads. Long answers are rendered in a worker thread, one at a time: a scrape of
thousands of series delays no search.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
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
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from syncd.errors import AddressInUse
from syncd.host_port import join_host_port
from syncd.ops import page
from syncd.ops.history import History
from syncd.ops.metrics import Metrics
from syncd.ops.page_style import SECURITY_POLICY
from syncd.ops.parts import Parts
from syncd.ops.readiness import Readiness
from syncd.rpc.sockets import bind_tcp

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


class Http:
    """The HTTP server and its pages."""

    def __init__(
        self, parts: Parts, readiness: Readiness, history: History, metrics: Metrics
    ) -> None:
        self.parts = parts
        self.readiness = readiness
        self.history = history
        self.metrics = metrics
        self.one_at_a_time = anyio.CapacityLimiter(1)
        self.server: Quiet | None = None
        self.stopped = anyio.Event()

    async def serve(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Serve until ``stop``. If the default port is in use, the service runs without HTTP.

        A second syncd on this machine may use the port, for example. Raises ``AddressInUse`` for a
        port that the user has chosen, ``SettingsError`` for an address that is not this machine's.
        """
        settings = self.parts.settings
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

    def application(self) -> Starlette:
        """The routes; all of them only read."""
        return Starlette(
            routes=[
                Route("/", self.show_page, methods=["GET"]),
                Route("/live", self.show_live, methods=["GET"]),
                Route("/livez", self.show_livez, methods=["GET"]),
                Route("/readyz", self.show_readyz, methods=["GET"]),
                Route("/status", self.show_status, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
            ]
        )

    async def show_livez(self, _: Request) -> Response:
        """200: an answer shows that the event loop runs."""
        return Response("ok\n", media_type="text/plain", headers=HEADERS)

    async def show_readyz(self, _: Request) -> Response:
        """200 or 503, with the reasons and remarks."""
        verdict = self.readiness.look()
        return json(dataclasses.asdict(verdict), 200 if verdict.ready else 503)

    async def show_status(self, _: Request) -> Response:
        """The answers of the RPC methods ``status`` and ``datasets``."""
        status = self.parts.status
        datasets = await self.in_thread(status.datasets)
        return json({"status": status.service(), "datasets": datasets})

    async def show_metrics(self, _: Request) -> Response:
        """The text format of Prometheus."""
        if self.parts.readers is not None:
            await self.parts.readers.collect()
        text = await self.in_thread(self.metrics.render)
        return Response(text, headers=HEADERS | {"content-type": CONTENT_TYPE_LATEST})

    async def show_page(self, request: Request) -> Response:
        """The whole status page, with the result of a search if the request has one."""
        wanted = page.Wanted(
            request.query_params.get("dataset", ""), request.query_params.get("key", "")
        )
        found = await page.find(self.parts, wanted)
        return HTMLResponse(
            await self.in_thread(partial(page.whole, self.view(), wanted, found)), headers=HEADERS
        )

    async def show_live(self, _: Request) -> Response:
        """The part of the page that changes, for the script that refreshes it."""
        return HTMLResponse(await self.in_thread(partial(page.live, self.view())), headers=HEADERS)

    def view(self) -> page.View:
        """The parts of the page that are read on the event loop."""
        return page.View(self.parts, self.readiness.look(), list(self.history.samples))

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
