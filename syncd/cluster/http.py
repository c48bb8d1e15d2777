"""The router's HTTP port: which shard is where, how far it is, and who answers."""

from __future__ import annotations

import html
import platform
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from syncd.ops.web import HEADERS, WebServer, json
from syncd.protocol.messages import NoParams
from syncd.settings import Settings

if TYPE_CHECKING:
    from syncd.cluster.router import Router

COUNTERS: Mapping[str, str] = {
    "syncd_route_searches_total": "Searches; the outcome is ok, partial, or the kind of the error.",
    "syncd_route_hedges_total": "Replicas asked because another one was late.",
    "syncd_route_retries_total": "Replicas asked because another one failed.",
    "syncd_route_cuts_total": "Snapshots taken for all shards.",
    "syncd_route_reconnects_total": "Lost connections to the database.",
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "syncd_build_info": ("1, with the version.", ("version", "python", "consumer")),
    "syncd_route_shards": ("Shards of the layout that answers.", ()),
    "syncd_route_replica_up": ("1 if the replica has answered last.", ("shard", "replica")),
    "syncd_route_replica_lag_seconds": ("Lag that the replica last had.", ("shard", "replica")),
}


class RouterMetrics(Collector):
    """All metrics of a router, read when they are scraped."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """One family after another."""
        router, fleet = self.router, self.router.fleet
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {
            "syncd_build_info": [((router.version, platform.python_version(), "route"), 1)],
            "syncd_route_shards": [((), fleet.layout.of)],
            "syncd_route_replica_up": [],
            "syncd_route_replica_lag_seconds": [],
        }
        for shard, replicas in fleet.shards.items():
            for each in replicas:
                labels = (shard.name, each.name)
                samples["syncd_route_replica_up"].append((labels, float(each.error is None)))
                samples["syncd_route_replica_lag_seconds"].append((labels, each.lag_seconds))
        for name, (meaning, labelled) in GAUGES.items():
            gauge = GaugeMetricFamily(name, meaning, labels=labelled)
            for values, number in samples[name]:
                gauge.add_metric(values, number)
            yield gauge
        searches = CounterMetricFamily(
            "syncd_route_searches", COUNTERS["syncd_route_searches_total"], labels=("outcome",)
        )
        for outcome, number in sorted(router.searches.items()):
            searches.add_metric((outcome,), number)
        yield searches
        for name, number in (
            ("syncd_route_hedges", router.asking.counts.hedges),
            ("syncd_route_retries", router.asking.counts.retries),
            ("syncd_route_cuts", router.cuts.taken),
            ("syncd_route_reconnects", fleet.reconnects),
        ):
            yield CounterMetricFamily(name, COUNTERS[f"{name}_total"], value=number)


class RouterHttp(WebServer):
    """The HTTP server of a router."""

    def __init__(self, settings: Settings, router: Router) -> None:
        super().__init__(settings)
        self.router = router
        self.metrics = RouterMetrics(router)
        self.stopping = False

    async def show_readyz(self, _: Request) -> Response:
        """200 if each shard has a replica that has answered last, else 503 with the reasons."""
        reasons = ["it is stopping"] if self.stopping else self.reasons()
        return json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    def reasons(self) -> list[str]:
        """Why the router does not answer for all shards; empty if it does."""
        fleet = self.router.fleet
        if not fleet.shards:
            return ["no shard has registered"]
        return [
            f"shard {shard.name}: "
            + next((str(each.error) for each in replicas), "no syncd has registered for it")
            for shard, replicas in fleet.shards.items()
            if all(each.error is not None for each in replicas)
        ]

    async def show_status(self, _: Request) -> Response:
        """The answer of the RPC method ``status``."""
        return json({"status": await self.router.status(NoParams())})

    async def metrics_text(self) -> bytes:
        """See ``WebServer``."""
        return await self.in_thread(self.metrics.render)

    async def show_page(self, _: Request) -> Response:
        """A table of the shards."""
        return HTMLResponse(await self.in_thread(partial(page, self.router)), headers=HEADERS)


def page(router: Router) -> str:
    """The page: one row for each replica."""
    rows = [
        (
            shard.name,
            each.name,
            each.registered.address,
            "not asked" if each.is_open else "answers" if each.error is None else "fails",
            "" if each.position is None else each.position.snapshot,
            f"{each.lag_seconds:.1f}",
            f"{time.monotonic() - each.answered_at:.1f}" if each.answered_at > 0 else "",
            "" if each.error is None else each.error.message,
        )
        for shard, replicas in router.fleet.shards.items()
        for each in replicas
    ]
    heads = ("shard", "consumer", "address", "", "position", "lag s", "answered s ago", "error")
    table = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in (heads, *rows)
    )
    error = router.fleet.database_error
    note = f"<p>{html.escape(error)}</p>" if error else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>syncd route</title>'
        f"<h1>syncd route</h1>{note}<table>{table}</table></html>\n"
    )
