"""Mixed: searches while writers write, and how fresh their answers are.

It is compared with pgvector, whose index the writers themselves update.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
from psycopg import sql

from syncd.bench.clients import clients, leave_ctrl_c_to_the_parent, process_context
from syncd.bench.engines import Engine
from syncd.bench.environment import Environment
from syncd.bench.fresh import Probe, write_and_look
from syncd.bench.reported import halves, have_measured
from syncd.bench.vector_set import VectorSet, truth
from syncd.bench.versus import FOLLOWED, HNSW, Recalls, Turns, pair
from syncd.postgres.connection import open_session
from syncd.statements import filled

PROBE_PAUSE_SECONDS = (0.0, 0.04)


@dataclass(frozen=True, slots=True)
class Mixed:
    """Medians of the rounds' rates, percentiles over all rounds.

    ``writes_per_second`` counts changed rows: the wanted number, or fewer if that is not possible.
    ``recall`` is measured before the writing. ``fresh`` is the time from the commit of an inserted
    row until another session finds it; with pgvector it is found at once.
    """

    engine: str
    setting: str
    recall: float
    clients: int
    rows_per_write: int
    wanted_writes_per_second: float
    writes_per_second: float
    qps: float
    p50_ms: float
    p99_ms: float
    fresh_p50_ms: float
    fresh_p99_ms: float


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    recall: float,
    rate: float,
    batch: int,
    writers: int,
    client_number: int,
    turns: Turns,
) -> list[Mixed]:
    """Search the first rows of the set, while the writers give them the vectors of the others."""
    rows, samples = vectors.rows, vectors.spare
    exact = truth(vectors.base[:rows], vectors.queries, vectors.metric, track=where.track)
    where.create("samples", vectors.dimension)
    where.load("samples", vectors.blocks(rows))
    with (
        pair(where, vectors, rows, versus=turns.versus) as both,
        clients(client_number, vectors.queries) as searchers,
        process_context().Pool(writers + 1, leave_ctrl_c_to_the_parent) as pool,
    ):
        first, held_back = halves(both, len(searchers.queries))
        if both.approximate:
            with where.step("syncd: recall of the queries"):
                have_measured(both, searchers.asking(searchers.queries[first]), [recall])
        searchers = searchers.asking(searchers.queries[held_back])
        measured = Recalls(searchers, exact)
        syncd: Engine = both.syncd(recall)
        tables = {syncd: FOLLOWED}
        wanted = measured.of(syncd)
        if turns.versus:
            with where.step("setting of equal recall"):
                tables[measured.bracket(both.pgvector, wanted)[-1]] = HNSW
        rates: dict[Engine, list[float]] = {engine: [] for engine in tables}
        writes: dict[Engine, list[float]] = {engine: [] for engine in tables}
        latencies: dict[Engine, list[float]] = {engine: [] for engine in tables}
        delays: dict[Engine, list[float]] = {engine: [] for engine in tables}
        both.service.settle()
        for number in where.track(range(turns.rounds), "searching and writing"):
            for engine, table in tables.items():
                tasks = [
                    Writer(
                        where.conninfo,
                        table,
                        range(first, rows + 1, writers),
                        samples,
                        rate / writers,
                        batch,
                        number,
                    )
                    for first in range(1, writers + 1)
                ]
                socket = str(both.service.socket) if engine is syncd else None
                probe = Probe(where.conninfo, socket, table, samples, PROBE_PAUSE_SECONDS, number)
                writing = pool.starmap_async(
                    write, [(task, turns.seconds) for task in tasks], chunksize=1
                )
                looking = pool.apply_async(write_and_look, (probe, 10**9, turns.seconds))
                timing = searchers.search(engine, turns.seconds)
                rates[engine].append(timing.qps)
                latencies[engine] += timing.latencies.tolist()
                writes[engine].append(sum(writing.get()))
                delays[engine] += looking.get().tolist()
    return [
        Mixed(
            engine.name,
            engine.setting,
            measured.of(engine),
            client_number,
            batch,
            rate,
            round(float(np.median(writes[engine])), 1),
            round(float(np.median(rates[engine])), 1),
            *(
                round(float(value), 3)
                for value in np.percentile(latencies[engine], [50, 99]) * 1000
            ),
            *(round(float(value), 2) for value in np.percentile(delays[engine], [50, 99])),
        )
        for engine in tables
    ]


@dataclass(frozen=True, slots=True)
class Writer:
    """A process that gives rows other vectors.

    No two writers have a row in common: they would wait for each other.
    """

    conninfo: str
    table: str
    keys: range
    samples: int
    rows_per_second: float
    batch: int
    seed: int


def write(writer: Writer, seconds: float) -> float:
    """Change rows for ``seconds``, at the wanted rate or a lower one; returns rows per second."""
    chance = random.Random(f"{writer.seed} {writer.keys.start}")  # noqa: S311 - a reproducible schedule
    change = filled("bench", "change_rows", table=sql.Identifier(writer.table))
    batch = min(writer.batch, len(writer.keys))
    done = 0
    with open_session(writer.conninfo) as connection:
        begun = time.perf_counter()
        while (now := time.perf_counter()) - begun < seconds:
            due = begun + done / writer.rows_per_second
            if due > now:
                time.sleep(due - now)
            samples = chance.choices(range(1, writer.samples + 1), k=batch)
            connection.execute(change, [chance.sample(writer.keys, batch), samples], prepare=True)
            done += batch
        return done / (time.perf_counter() - begun)
