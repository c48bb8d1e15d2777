"""``syncd bench``: commands that measure syncd on the user's machine.

Benchmarks for syncd's developers are in ``tests/bench``.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from syncd.cli.bench_options import (
    SOME_ROWS,
    Clients,
    Dimension,
    DistanceMetric,
    ManyClients,
    Queries,
    Readers,
    Recall,
    Recalls,
    Rounds,
    Rows,
    Seconds,
    SomeRows,
    Vectors,
    Versus,
    again,
    prepared,
    read_or_make,
    show,
)
from syncd.cli.options import DataDir, Dsn, Embedded, Json

RECALLS = [0.9, 0.95, 0.99]
SELECTIVITIES = [0.5, 0.1, 0.01, 0.001]

bench = typer.Typer(
    help="Measure syncd on this machine. Creates schema syncd_bench, and drops it at the end.",
    no_args_is_help=True,
)


@bench.command()
def search(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    metric: DistanceMetric = "l2",
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
    recall: Recalls = None,
    clients: ManyClients = None,
    readers: Readers = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Recall, searches per second and latency; the time until a loaded table is searchable.

    Example: syncd bench search --embedded --versus pgvector
    """
    from syncd.bench import search as module
    from syncd.bench.versus import Turns

    found = read_or_make(vectors, rows, dim, queries=queries, metric=metric)
    with prepared(dsn, data_dir, embedded, readers) as where:
        result = module.measure(
            where,
            found,
            recalls=recall or RECALLS,
            client_numbers=clients or client_numbers(),
            turns=Turns(seconds, rounds, versus is not None),
        )
    show(result, json)


@bench.command("filter")
def filter_(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    metric: DistanceMetric = "l2",
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
    selectivity: Annotated[
        list[float] | None,
        again("Share of the rows that pass the filter", "0.5, 0.1, 0.01, 0.001", min=0, max=1),
    ] = None,
    recall: Recall = 0.95,
    clients: ManyClients = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Recall and speed of filtered searches. The rows that pass are at random, near, or far.

    Example: syncd bench filter --embedded --versus pgvector
    """
    from syncd.bench import filtered as module
    from syncd.bench.versus import Turns

    found = read_or_make(vectors, rows, dim, queries=queries, metric=metric)
    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where,
            found,
            selectivities=selectivity or SELECTIVITIES,
            recall=recall,
            client_numbers=clients or client_numbers(),
            turns=Turns(seconds, rounds, versus is not None),
        )
    show(result, json)


@bench.command()
def mixed(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    metric: DistanceMetric = "l2",
    queries: Queries = 1000,
    seconds: Seconds = 5,
    rounds: Rounds = 3,
    versus: Versus = None,
    rate: Annotated[float, typer.Option(min=1, help="Rows to change per second.")] = 5000,
    batch: Annotated[
        int, typer.Option(min=1, help="Rows per transaction, changed by one statement.")
    ] = 50,
    writers: Annotated[int, typer.Option(min=1, help="Processes that write.")] = 2,
    clients: Clients = 2,
    recall: Recall = 0.95,
    readers: Readers = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Searches while other processes write: latency, and the time from commit to searchable.

    Example: syncd bench mixed --embedded --rate 1000 --versus pgvector
    """
    from syncd.bench import mixed as module
    from syncd.bench.environment import SAMPLES
    from syncd.bench.versus import Turns

    found = read_or_make(vectors, rows, dim, queries=queries, metric=metric, spare=SAMPLES)
    with prepared(dsn, data_dir, embedded, readers) as where:
        result = module.measure(
            where,
            found,
            recall=recall,
            rate=rate,
            batch=batch,
            writers=writers,
            client_number=clients,
            turns=Turns(seconds, rounds, versus is not None),
        )
    show(result, json)


@bench.command()
def fresh(
    commits: Annotated[int, typer.Option(min=1, help="Commits to time.")] = 500,
    writers: Annotated[
        int, typer.Option(min=1, help="Concurrent writers in the second measurement.")
    ] = 8,
    dim: Dimension = 768,
    readers: Readers = None,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time from commit to searchable, measured by the writer: one writer, then several.

    Example: syncd bench fresh --embedded
    """
    from syncd.bench import fresh as module

    with prepared(dsn, data_dir, embedded, readers) as where:
        result = module.measure(where, dimension=dim, commits=commits, writers=writers)
    show(result, json)


@bench.command()
def ingest(
    clients: Annotated[list[int] | None, again("Number of writers", "1, 8, 32")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds for each run.")] = 5,
    rounds: Rounds = 5,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Inserts per second into four tables: bare, followed, followed by a paused syncd, with a
    pgvector HNSW index.

    Example: syncd bench ingest --embedded --clients 32
    """
    from syncd.bench import ingest as module

    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where, dimension=dim, clients=clients or [1, 8, 32], seconds=seconds, rounds=rounds
        )
    show(result, json)


@bench.command()
def backfill(
    rows: Rows = SOME_ROWS,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time and memory from attaching a full table until all of it is indexed.

    Example: syncd bench backfill --embedded --rows 100000
    """
    from syncd.bench import backfill as module

    with prepared(dsn, data_dir, embedded) as where:
        result = [module.measure(where, rows=rows, dimension=dim)]
    show(result, json)


@bench.command()
def verify(
    rows: Rows = 1_000_000,
    rounds: Rounds = 3,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time of a verify, of one query that hashes the same rows, and of a repair.

    Example: syncd bench verify --embedded --rows 100000
    """
    from syncd.bench import verify as module

    with prepared(dsn, data_dir, embedded) as where:
        result = [module.measure(where, rows=rows, dimension=dim, rounds=rounds)]
    show(result, json)


def client_numbers() -> list[int]:
    """Numbers of clients to measure: one, and one per core."""
    return sorted({1, os.cpu_count() or 1})
