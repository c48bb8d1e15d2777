"""Operators' HTTP port: ``/livez``, ``/readyz``, ``/status``, ``/metrics``, the page at ``/``.

It only reads. Long answers are rendered in a worker thread, one at a time: a scrape of
thousands of series delays no search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from syncd.ops import page
from syncd.ops.history import History
from syncd.ops.metrics import Metrics
from syncd.ops.parts import Parts
from syncd.ops.readiness import Readiness
from syncd.ops.web import HEADERS, WebServer, json


class Http(WebServer):
    """The HTTP server of a service, and its pages."""

    def __init__(
        self, parts: Parts, readiness: Readiness, history: History, metrics: Metrics
    ) -> None:
        super().__init__(parts.settings)
        self.parts = parts
        self.readiness = readiness
        self.history = history
        self.metrics = metrics

    def more_routes(self) -> Sequence[Route]:
        """See ``WebServer``."""
        return [Route("/live", self.show_live, methods=["GET"])]

    async def show_readyz(self, _: Request) -> Response:
        """200 or 503, with the reasons and remarks."""
        verdict = self.readiness.look()
        return json(dataclasses.asdict(verdict), 200 if verdict.ready else 503)

    async def show_status(self, _: Request) -> Response:
        """The answers of the RPC methods ``status`` and ``datasets``."""
        status = self.parts.status
        datasets = await self.in_thread(status.datasets)
        return json({"status": status.service(), "datasets": datasets})

    async def metrics_text(self) -> bytes:
        """See ``WebServer``. Readers report their counts first."""
        if self.parts.readers is not None:
            await self.parts.readers.reports.collect()
        return await self.in_thread(self.metrics.render)

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
