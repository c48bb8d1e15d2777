"""Commands that measure syncd on the user's own machine."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from syncd.bench.environment import SAMPLES, Environment, environment
from syncd.cli.options import DataDir, Dsn, Embedded, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.cli.session import database
from syncd.errors import SettingsError
from syncd.settings import load_settings

if TYPE_CHECKING:
    from syncd.bench.vector_set import VectorSet  # loads FAISS

bench = typer.Typer(
    help="Measure syncd on this machine. A schema syncd_bench is made, and dropped at the end.", no_args_is_help=True
)

Dimension = Annotated[int, typer.Option("--dim", min=1, help="Dimension of the vectors.")]


def measurement(measure: Callable[..., object]) -> Callable[..., None]:
    """Make ``measure(where, ...)`` a command with its own options and those of every benchmark; what it returns is printed."""

    def command(
        dsn: Dsn = None, data_dir: DataDir = None, embedded: Embedded = False, json: Json = False, **own: Any
    ) -> None:
        with prepared(dsn, data_dir, embedded) as where:
            result = measure(where, **own)
        show(result, json)

    shared = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    own = list(inspect.signature(measure, eval_str=True).parameters.values())[1:]
    registered = update_wrapper(command, measure, assigned=("__name__", "__doc__"))
    del registered.__wrapped__  # typer would look through it
    registered.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # what inspect reads first
    registered.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return bench.command(measure.__name__.rstrip("_"))(registered)


Rounds = Annotated[int, typer.Option(min=1, help="Rounds; what is compared takes turns in each.")]
Clients = Annotated[
    list[int] | None, typer.Option(min=1, help="Clients, each a process; again for more. Default: 1, and one a core.")
]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds for each run.")]
Recall = Annotated[float, typer.Option(min=0.01, max=1, help="Recall to aim for, where searches are approximate.")]
Recalls = Annotated[
    list[float] | None,
    typer.Option("--recall", min=0.01, max=1, help="Recall to aim for; again for more. Default: 0.9, 0.95, 0.99."),
]
RECALLS = [0.9, 0.95, 0.99]
SOME_ROWS = 100_000
SomeRows = Annotated[int, typer.Option("--rows", min=100, help="Rows of the table.")]
Changes = Annotated[int, typer.Option(min=1, help="Rows that a transaction changes.")]
Queries = Annotated[int, typer.Option(min=1, help="Different searches.")]
Metric = Annotated[Literal["cosine", "l2", "ip"], typer.Option(help="Distance.")]
Vectors = Annotated[
    Path | None,
    typer.Option(
        "--vectors",
        help=".npy, .fvecs, or .npz with base and, where it has them, queries and neighbors.",
        show_default="made vectors",
    ),
]
Versus = Annotated[
    Literal["pgvector"] | None, typer.Option(help="The same with an HNSW index (m 16, ef_construction 64), in turn.")
]


@measurement
def search(
    where: Environment,
    vectors: Vectors = None,
    rows: Annotated[int | None, typer.Option(min=100, help="Rows.", show_default="100000, or all of --vectors")] = None,
    dim: Dimension = 128,
    metric: Metric = "l2",
    recall: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=1, help="Recall to aim for; again for more. Default: 0.9, 0.95, 0.99."),
    ] = None,
    clients: Clients = None,
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
) -> object:
    """Recall, searches a second and their latency; the time until a loaded table is searchable.

    Example: syncd bench search --embedded --versus pgvector
    """
    from syncd.bench import search as module

    return module.measure(
        where,
        vector_set(vectors, rows, dim, metric, queries),
        recalls=recall or RECALLS,
        client_numbers=clients or client_numbers(),
        seconds=seconds,
        rounds=rounds,
        versus=versus is not None,
    )


@measurement
def filter_(
    where: Environment,
    selectivity: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Share of the rows that pass; again for more. Default: 0.5, 0.1, 0.01, 0.001."),
    ] = None,
    vectors: Vectors = None,
    rows: Annotated[int | None, typer.Option(min=100, help="Rows.", show_default="100000, or all of --vectors")] = None,
    dim: Dimension = 128,
    metric: Metric = "l2",
    recall: Recall = 0.95,
    clients: Clients = None,
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
) -> object:
    """Recall and speed of searches with filters that let few or many rows pass, at random and near or far ones.

    Example: syncd bench filter --embedded --versus pgvector
    """
    from syncd.bench import filtered as module

    return module.measure(
        where,
        vector_set(vectors, rows, dim, metric, queries),
        selectivities=selectivity or [0.5, 0.1, 0.01, 0.001],
        recall=recall,
        client_numbers=clients or client_numbers(),
        seconds=seconds,
        rounds=rounds,
        versus=versus is not None,
    )


@measurement
def mixed(
    where: Environment,
    rate: Annotated[float, typer.Option(min=1, help="Rows to change a second, one a transaction.")] = 500,
    writers: Annotated[int, typer.Option(min=1, help="Processes that write.")] = 2,
    clients: Annotated[int, typer.Option(min=1, help="Processes that search.")] = 2,
    vectors: Vectors = None,
    rows: SomeRows = SOME_ROWS,
    dim: Dimension = 128,
    metric: Metric = "l2",
    recall: Recall = 0.95,
    queries: Queries = 1000,
    seconds: Seconds = 5,
    rounds: Rounds = 3,
    versus: Versus = None,
) -> object:
    """Searches while writers write: the searches' latency, and the time from commit to searchable.

    Example: syncd bench mixed --embedded --rate 1000 --versus pgvector
    """
    from syncd.bench import mixed as module

    return module.measure(
        where,
        vector_set(vectors, rows, dim, metric, queries, SAMPLES),
        rows=rows,
        recall=recall,
        rate=rate,
        writers=writers,
        client_number=clients,
        seconds=seconds,
        rounds=rounds,
        versus=versus is not None,
    )


@measurement
def churn(
    where: Environment,
    updates: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows to give another vector.")] = 0.5,
    deletes: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows to delete, of the others.")] = 0.3,
    vectors: Vectors = None,
    rows: SomeRows = SOME_ROWS,
    dim: Dimension = 128,
    metric: Metric = "l2",
    recall: Recalls = None,
    clients: Annotated[int, typer.Option(min=1, help="Processes that search.")] = 1,
    queries: Queries = 1000,
    seconds: Seconds = 3,
    rounds: Rounds = 3,
    versus: Versus = None,
) -> object:
    """Recall and latency before and after updates of half of the rows and deletes of others, and what those cost.

    Example: syncd bench churn --embedded --versus pgvector
    """
    from syncd.bench import churn as module

    return module.measure(
        where,
        vector_set(vectors, rows, dim, metric, queries, int(rows * updates)),
        rows=rows,
        updates=updates,
        deletes=deletes,
        recalls=recall or RECALLS,
        client_number=clients,
        seconds=seconds,
        rounds=rounds,
        versus=versus is not None,
    )


@measurement
def restart(
    where: Environment,
    rows: SomeRows = SOME_ROWS,
    changes: Changes = 1000,
    rounds: Rounds = 3,
    dim: Dimension = 768,
) -> object:
    """Time of a stop and of a start until all answers are there, and what a checkpoint writes.

    Example: syncd bench restart --embedded --rows 100000
    """
    from syncd.bench import restart as module

    return [module.measure(where, rows=rows, dimension=dim, changes=changes, rounds=rounds)]


@measurement
def passes(
    where: Environment,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of a table; again for more. Default: 10000, 1000000.")
    ] = None,
    changes: Changes = 1000,
    rounds: Rounds = 10,
    dim: Dimension = 128,
) -> object:
    """Time and processor time of following a transaction, in tables of different sizes.

    Example: syncd bench passes --embedded --rows 10000 --rows 100000
    """
    from syncd.bench import passes as module

    return module.measure(where, sizes=rows or [10_000, 1_000_000], dimension=dim, changes=changes, rounds=rounds)


@measurement
def datasets(
    where: Environment,
    datasets: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of datasets; again for more. Default: 1, 100, 5000.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 100,
    searches: Annotated[int, typer.Option(min=1, help="Searches to time.")] = 5000,
    dim: Dimension = 128,
) -> object:
    """Latency of a search where there are many datasets; memory, and the time to read them all.

    Example: syncd bench datasets --embedded --datasets 1 --datasets 1000
    """
    from syncd.bench import datasets as module

    return module.measure(where, numbers=datasets or [1, 100, 5000], rows_each=rows, dimension=dim, searches=searches)


@measurement
def fresh(
    where: Environment,
    commits: Annotated[int, typer.Option(min=1, help="Commits to time.")] = 500,
    writers: Annotated[int, typer.Option(min=1, help="Concurrent writers in the second measurement.")] = 8,
    dim: Dimension = 768,
) -> object:
    """Time from commit to searchable, seen from the writer: idle, then with several writers.

    Example: syncd bench fresh --embedded
    """
    from syncd.bench import fresh as module

    return module.measure(where, dimension=dim, commits=commits, writers=writers)


@measurement
def ingest(
    where: Environment,
    clients: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of writers; again for more. Default: 1, 8, 32.")
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds for each run.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; tables take turns in each.")] = 5,
    dim: Dimension = 768,
) -> object:
    """Inserts a second: a bare table, one that syncd follows, one with a pgvector HNSW index.

    Example: syncd bench ingest --embedded --clients 32
    """
    from syncd.bench import ingest as module

    return module.measure(where, dimension=dim, clients=clients or [1, 8, 32], seconds=seconds, rounds=rounds)


@measurement
def backfill(
    where: Environment,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 100_000,
    dim: Dimension = 768,
) -> object:
    """Time and memory from attaching a full table until all of it is indexed.

    Example: syncd bench backfill --embedded --rows 100000
    """
    from syncd.bench import backfill as module

    return [module.measure(where, rows=rows, dimension=dim)]


@measurement
def verify(
    where: Environment,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the query and the verify take turns.")] = 3,
    dim: Dimension = 768,
) -> object:
    """Time of a verify beside that of one query that hashes the same rows, and of a repair.

    Example: syncd bench verify --embedded --rows 100000
    """
    from syncd.bench import verify as module

    return [module.measure(where, rows=rows, dimension=dim, rounds=rounds)]


@measurement
def rpc(
    where: Environment,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the dataset.")] = 1000,
    dim: Dimension = 768,
) -> object:
    """Round trip of an exact search, beside FAISS alone.

    Example: syncd bench rpc --embedded
    """
    from syncd.bench import rpc as module

    return [module.measure(where, rows=rows, dimension=dim)]


def vector_set(
    path: Path | None, rows: int | None, dimension: int, metric: str, queries: int, spare: int = 0
) -> VectorSet:
    """The user's vectors, or made ones: so many rows, and some to write; all of a file where no number is given."""
    from syncd.bench.vector_set import generate, read

    if path is None:
        return generate((rows or SOME_ROWS) + spare, dimension, queries=queries, metric=metric)
    found = read(path, rows=None if rows is None else rows + spare, queries=queries, metric=metric)
    if rows is not None and len(found.base) < rows + spare:
        raise SettingsError(
            f"{path} has {len(found.base)} vectors for rows, {rows + spare} are needed",
            hint="ask for fewer with --rows N",
        )
    return found


def client_numbers() -> list[int]:
    """One, and one a core."""
    return sorted({1, os.cpu_count() or 1})


@contextmanager
def prepared(dsn: str | None, data_dir: Path | None, embedded: bool) -> Iterator[Environment]:
    """The environment of a benchmark, and a line that shows what it does where stderr is a terminal."""
    settings = load_settings(dsn=dsn, data_dir=data_dir)
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    # PostgreSQL's own default of 128 MB would measure how it reads files; a quarter of memory is what its manual advises.
    buffers = {"shared_buffers": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 4 >> 20}MB"}
    with (
        database(settings, embedded=embedded, server_settings=buffers) as found,
        progress,
        environment(found, progress, talk) as where,
    ):
        yield where


def show(result: Any, json: bool) -> None:
    """A dataclass, or a list of them: one row each; lists within one follow as tables of their own."""
    if json:
        print_json(result)
        return
    rows = result if isinstance(result, list) else [result]
    fields = {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(rows[0])}
    plain = {name: values for name, values in fields.items() if not isinstance(values[0], list)}
    print_table(list(plain), zip(*plain.values(), strict=True))
    for name, values in fields.items():
        if name not in plain and values[0]:
            print(f"\n{name}")
            show(values[0], json)
