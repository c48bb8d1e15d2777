"""Commands that measure syncd on the user's own machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from syncd.cli.options import DataDir, Dsn, Embedded, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.cli.session import database
from syncd.settings import load_settings

bench = typer.Typer(
    help="Measure syncd on this machine. A schema syncd_bench is made, and dropped at the end.", no_args_is_help=True
)

Dimension = Annotated[int, typer.Option("--dim", help="Dimension of the vectors.")]


@bench.command()
def fresh(
    commits: Annotated[int, typer.Option(help="Commits to time.")] = 500,
    writers: Annotated[int, typer.Option(help="Concurrent writers in the second measurement.")] = 8,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time from commit to searchable, seen from the writer: idle, then with several writers.

    Example: syncd bench fresh --embedded
    """
    from syncd.bench import fresh as module

    with prepared(dsn, data_dir, embedded) as where:
        show(module.measure(where, dimension=dim, commits=commits, writers=writers), json)


@bench.command()
def ingest(
    clients: Annotated[
        list[int] | None, typer.Option(help="Number of writers; again for more. Default: 1, 8, 32.")
    ] = None,
    seconds: Annotated[int, typer.Option(help="Seconds for each run.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds; tables take turns in each.")] = 5,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Inserts a second: a bare table, one that syncd follows, one with a pgvector HNSW index.

    Example: syncd bench ingest --embedded --clients 32
    """
    from syncd.bench import ingest as module

    with prepared(dsn, data_dir, embedded) as where:
        show(module.measure(where, dimension=dim, clients=clients or [1, 8, 32], seconds=seconds, rounds=rounds), json)


@bench.command()
def backfill(
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 100_000,
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
        show([module.measure(where, rows=rows, dimension=dim)], json)


@bench.command()
def verify(
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Rounds; the query and the verify take turns.")] = 3,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Time of a verify beside that of one query that hashes the same rows, and of a repair.

    Example: syncd bench verify --embedded --rows 100000
    """
    from syncd.bench import verify as module

    with prepared(dsn, data_dir, embedded) as where:
        show([module.measure(where, rows=rows, dimension=dim, rounds=rounds)], json)


@bench.command()
def rpc(
    rows: Annotated[int, typer.Option(help="Rows of the dataset.")] = 1000,
    dim: Dimension = 768,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Round trip of an exact search, beside FAISS alone.

    Example: syncd bench rpc --embedded
    """
    from syncd.bench import rpc as module

    with prepared(dsn, data_dir, embedded) as where:
        show([module.measure(where, rows=rows, dimension=dim)], json)


@contextmanager
def prepared(dsn: str | None, data_dir: Any, embedded: bool) -> Iterator[Any]:
    """The environment of a benchmark."""
    from syncd.bench.environment import environment

    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found, environment(found) as where:
        talk("measuring ...")
        yield where


def show(results: Sequence[Any], json: bool) -> None:
    """One row a measurement."""
    if json:
        print_json([dataclasses.asdict(result) for result in results])
        return
    names = [field.name for field in dataclasses.fields(results[0])]
    print_table(names, [[getattr(result, name) for name in names] for result in results])
