"""The RPC's share of a search: an exact search by RPC and by FAISS alone on the same vectors."""

from __future__ import annotations

import time
from dataclasses import dataclass

import faiss
import numpy as np

from syncd.bench.environment import Environment, serving

TABLE = "rpc"
ROUNDS = 2000
WARM_UP = 200


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Latencies in microseconds of one client with one query at a time."""

    rows: int
    dimension: int
    rpc_p50_us: float
    rpc_p99_us: float
    faiss_p50_us: float
    ping_p50_us: float


def measure(where: Environment, *, rows: int, dimension: int) -> RoundTrip:
    """Search by RPC and by FAISS in turn, so that both run under the same load."""
    where.create(TABLE, dimension)
    where.fill(TABLE, rows, dimension)
    where.run("attach", [f"syncd_bench.{TABLE}", "ip"])
    faiss.omp_set_num_threads(1)
    vectors = np.random.default_rng(0).standard_normal((rows, dimension)).astype(np.float32)
    index = faiss.IndexFlatIP(dimension)
    index.add(vectors)
    queries = np.random.default_rng(1).standard_normal((100, dimension)).astype(np.float32)
    by_rpc, alone, pings = [], [], []
    with serving(where) as service, service.client() as client:
        for number in range(ROUNDS + WARM_UP):
            query = queries[number % len(queries)]
            begun = time.perf_counter()
            client.search(TABLE, query, k=10, exact=True)
            after_rpc = time.perf_counter()
            index.search(query[None, :], 10)
            after_faiss = time.perf_counter()
            client.ping()
            pings.append(time.perf_counter() - after_faiss)
            by_rpc.append(after_rpc - begun)
            alone.append(after_faiss - after_rpc)
    rpc_p50, rpc_p99 = np.percentile(by_rpc[WARM_UP:], [50, 99])
    microseconds = [
        round(float(value) * 1e6, 1)
        for value in (rpc_p50, rpc_p99, np.median(alone[WARM_UP:]), np.median(pings[WARM_UP:]))
    ]
    return RoundTrip(rows, dimension, *microseconds)
