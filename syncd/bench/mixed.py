"""Mixed: searches while writers write, and how fresh their answers are; beside pgvector, whose index the writers keep themselves."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import psycopg
from psycopg import sql

from syncd.bench.clients import clients, leave_ctrl_c_to_the_parent, process_context
from syncd.bench.engines import Engine
from syncd.bench.environment import Environment
from syncd.bench.fresh import Probe, write_and_look
from syncd.bench.vector_set import VectorSet, truth
from syncd.bench.versus import FOLLOWED, HNSW, Recalls, pair
from syncd.statements import statement

PROBE_PAUSE_SECONDS = (0.0, 0.04)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Medians of the rounds' rates, percentiles over all rounds. ``recall`` is that before the writing. pgvector's rows are searchable at once."""

    engine: str
    setting: str
    recall: float
    clients: int
    wanted_writes_per_second: float
    writes_per_second: float
    qps: float
    p50_ms: float
    p99_ms: float
    fresh_p50_ms: float | None
    fresh_p99_ms: float | None


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    rows: int,
    recall: float,
    rate: float,
    writers: int,
    client_number: int,
    seconds: float,
    rounds: int,
    versus: bool,
) -> list[Mixed]:
    """The first rows of the set are searched; the writers give them the vectors of the others."""
    exact = truth(vectors.base[:rows], vectors.queries, vectors.metric, track=where.track)
    samples = len(vectors.base) - rows
    where.create("samples", vectors.dimension)
    where.load("samples", vectors.blocks(rows))
    with (
        pair(where, vectors, rows, versus=versus) as both,
        clients(client_number, vectors.queries) as searchers,
        process_context().Pool(writers + 1, leave_ctrl_c_to_the_parent) as pool,
    ):
        measured = Recalls(searchers, exact)
        syncd: Engine = both.syncd(recall)
        tables = {syncd: FOLLOWED}
        wanted = measured.of(syncd)
        if versus:
            with where.step("setting of equal recall"):
                tables[measured.bracket(both.pgvector, wanted)[-1]] = HNSW
        rates: dict[Engine, list[float]] = {engine: [] for engine in tables}
        writes: dict[Engine, list[float]] = {engine: [] for engine in tables}
        latencies: dict[Engine, list[float]] = {engine: [] for engine in tables}
        delays: list[float] = []
        probe = Probe(where.conninfo, str(both.service.socket), FOLLOWED, samples, PROBE_PAUSE_SECONDS, 0)
        for number in where.track(range(rounds), "searching and writing"):
            for engine, table in tables.items():
                tasks = [
                    (where.conninfo, table, rows, samples, rate / writers, seconds, number * writers + writer)
                    for writer in range(writers)
                ]
                writing = pool.starmap_async(write, tasks, chunksize=1)
                looking = pool.starmap_async(write_and_look, [(probe, 10**9, seconds)] if engine is syncd else [])
                timing = searchers.search(engine, seconds)
                rates[engine].append(timing.qps)
                latencies[engine] += timing.latencies.tolist()
                writes[engine].append(sum(writing.get()))
                delays += [delay for found in looking.get() for delay in found.tolist()]
    return [
        Mixed(
            engine.name,
            engine.setting,
            measured.of(engine),
            client_number,
            rate,
            round(float(np.median(writes[engine])), 1),
            round(float(np.median(rates[engine])), 1),
            *(round(float(value), 3) for value in np.percentile(latencies[engine], [50, 99]) * 1000),
            *(
                (round(float(value), 2) for value in np.percentile(delays, [50, 99]))
                if engine is syncd
                else (None, None)
            ),
        )
        for engine in tables
    ]


def write(conninfo: str, table: str, rows: int, samples: int, rate: float, seconds: float, seed: int) -> float:
    """Change one row a transaction, as many a second as are wanted or else can be; how many a second it were."""
    chance = random.Random(seed)  # noqa: S311 - a reproducible schedule
    change = sql.SQL(statement("bench", "change_row")).format(table=sql.Identifier(table))
    done = 0
    with psycopg.connect(conninfo, autocommit=True) as connection:
        begun = time.perf_counter()
        while (now := time.perf_counter()) - begun < seconds:
            due = begun + done / rate
            if due > now:
                time.sleep(due - now)
            connection.execute(change, [chance.randint(1, samples), chance.randint(1, rows)], prepare=True)
            done += 1
        return done / (time.perf_counter() - begun)
