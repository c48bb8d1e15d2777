"""Measurements for developers: ``python -m tests.bench passes --embedded``.

The options are those of ``syncd bench``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from syncd.cli.bench import RECALLS
from syncd.cli.bench_options import (
    SOME_ROWS,
    Changes,
    Clients,
    Dimension,
    DistanceMetric,
    ManyClients,
    Queries,
    Readers,
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
from syncd.cli.output import errors_reported

bench = typer.Typer(
    help="Measurements for developers of syncd.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@bench.command()
def churn(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    metric: DistanceMetric = "l2",
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
    updates: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows to give another vector.")
    ] = 0.5,
    deletes: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows to delete, of the others.")
    ] = 0.3,
    recall: Recalls = None,
    clients: Clients = 1,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Recall and latency before and after updates of half of the rows and deletes of others.

    The same is measured with a fresh build.
    """
    from syncd.bench.versus import Turns
    from tests.bench import churn as module

    found = read_or_make(vectors, rows, dim, queries=queries, metric=metric, share=updates)
    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where,
            found,
            deletes=deletes,
            recalls=recall or RECALLS,
            client_number=clients,
            turns=Turns(seconds, rounds, versus is not None),
        )
    show(result, json)


@bench.command()
def restart(
    rows: Annotated[int, typer.Option(min=100, help="Rows of the table.")] = SOME_ROWS,
    changes: Changes = 1000,
    rounds: Rounds = 3,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time of a stop and of a start, and bytes that a checkpoint writes."""
    from tests.bench import restart as module

    with prepared(dsn, data_dir, embedded) as where:
        result = [module.measure(where, rows=rows, dimension=dim, changes=changes, rounds=rounds)]
    show(result, json)


@bench.command()
def passes(
    rows: Annotated[list[int] | None, again("Rows of a table", "10000, 1000000")] = None,
    changes: Changes = 1000,
    rounds: Rounds = 10,
    dim: Dimension = 128,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time and processor time of following a transaction, in tables of different sizes."""
    from tests.bench import passes as module

    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where, sizes=rows or [10_000, 1_000_000], dimension=dim, changes=changes, rounds=rounds
        )
    show(result, json)


@bench.command()
def cost(
    rows: Rows = 10_000,
    changes: Changes = 10,
    transactions: Annotated[int, typer.Option(min=1, help="Transactions to follow.")] = 200,
    rest: Annotated[float, typer.Option(min=0, help="Seconds of rest before the idle time.")] = 30,
    seconds: Seconds = 20,
    dim: Dimension = 128,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Processor time of the service and its server sessions, idle and for small transactions."""
    from tests.bench import cost as module

    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where,
            rows=rows,
            dimension=dim,
            changes=changes,
            transactions=transactions,
            rest_seconds=rest,
            idle_seconds=seconds,
        )
    show(result, json)


@bench.command()
def datasets(
    datasets: Annotated[list[int] | None, again("Number of datasets", "1, 100, 5000")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 100,
    searches: Annotated[int, typer.Option(min=1, help="Searches to time.")] = 5000,
    dim: Dimension = 128,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Latency of a search among many datasets; memory, and the time to read them all."""
    from tests.bench import datasets as module

    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where,
            numbers=datasets or [1, 100, 5000],
            rows_each=rows,
            dimension=dim,
            searches=searches,
        )
    show(result, json)


@bench.command()
def rpc(
    rows: Rows = 1000,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Round trip of an exact search, compared with FAISS alone."""
    from tests.bench import rpc as module

    with prepared(dsn, data_dir, embedded) as where:
        result = [module.measure(where, rows=rows, dimension=dim)]
    show(result, json)


@bench.command()
def recall(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    metric: DistanceMetric = "l2",
    queries: Queries = 1000,
    recall: Recalls = None,
    copies: Annotated[int, typer.Option(min=0, help="Near copies of each row.")] = 0,
    json: Json = False,
) -> None:
    """Recall that is promised and got, before and after queries were asked; without a server."""
    from tests.bench import recall as module

    found = read_or_make(vectors, rows, dim, queries=queries, metric=metric)
    show(module.measure(found, recalls=recall or [0.95, 0.98], copies=copies), json)


@bench.command()
def shards(
    shards: Annotated[list[int] | None, again("Shards of a layout", "1, 2, 4, 8")] = None,
    rows: Rows = 20_000,
    dim: Dimension = 128,
    rate: Annotated[float, typer.Option(min=1, help="Rows per second to change.")] = 2000,
    rest: Annotated[float, typer.Option(min=0, help="Seconds of rest before the idle time.")] = 10,
    seconds: Seconds = 10,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Cost of shards for the database: rows read, processor time, connections."""
    from tests.bench import shards as module

    with prepared(dsn, data_dir, embedded) as where:
        result = module.measure(
            where,
            layouts=shards or [1, 2, 4, 8],
            rows=rows,
            dimension=dim,
            rate=rate,
            rest_seconds=rest,
            seconds=seconds,
        )
    show(result, json)


@bench.command()
def sql(
    vectors: Vectors = None,
    rows: SomeRows = None,
    dim: Dimension = 128,
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
    recall: Recalls = None,
    clients: ManyClients = None,
    readers: Readers = None,
    json: Json = False,
) -> None:
    """Searches in SQL statements, by the RPC, and by psycopg at the listener.

    It starts a server of its own, with dblink and pgvector.
    """
    from syncd.bench.versus import Turns
    from tests.bench import sql as module

    found = read_or_make(vectors, rows, dim, queries=queries, metric="l2")
    result = module.measure(
        found,
        recalls=recall or [0.95],
        client_numbers=clients or [1, 8],
        turns=Turns(seconds, rounds, versus is not None),
        readers=readers,
    )
    show(result, json)


@bench.command("sql-fresh")
def sql_fresh(
    tries: Annotated[int, typer.Option(min=1, help="Searches by SQL, and as many by RPC.")] = 1000,
    writers: Annotated[int, typer.Option(min=1, help="Processes that write meanwhile.")] = 2,
    rate: Annotated[float, typer.Option(min=1, help="Rows per second that they write.")] = 1000,
    dim: Dimension = 128,
    readers: Readers = None,
    json: Json = False,
) -> None:
    """Search for a row right after its commit, in the same session, while others write."""
    from tests.bench import sql_fresh as module

    result = module.measure(tries=tries, writers=writers, rate=rate, dimension=dim, readers=readers)
    show(result, json)


@bench.command()
def router(
    rows: Rows = 3000,
    dim: Dimension = 128,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 3,
    searches: Annotated[int, typer.Option(min=1, help="Searches of each.")] = 2000,
    k: Annotated[int, typer.Option("-k", min=1, help="Rows of an answer.")] = 10,
    versus: Annotated[
        Path | None, typer.Option(help="Checkout of another build, with its .venv.")
    ] = None,
    json: Json = False,
) -> None:
    """Latency of a router, of each of its shards, and of one syncd with the same rows.

    It starts a server of its own.
    """
    from tests.bench import router as module

    result = module.measure(
        rows=rows, dimension=dim, shards=shards, searches=searches, k=k, versus=versus
    )
    show(result, json)


if __name__ == "__main__":
    with errors_reported():
        bench()
