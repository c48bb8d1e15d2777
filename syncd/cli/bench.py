"""Commands that measure syncd on the user's own machine."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from syncd.bench.environment import SAMPLES, Environment, environment
from syncd.cli.bench_options import (
    SOME_ROWS,
    Changes,
    Clients,
    Dimension,
    ManyClients,
    Recall,
    Recalls,
    Rounds,
    Rows,
    Searched,
    SearchedAndWritten,
    again,
)
from syncd.cli.options import DataDir, Dsn, Embedded, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.cli.session import database
from syncd.settings import load_settings

bench = typer.Typer(
    help="Measure syncd on this machine. A schema syncd_bench is made, and dropped at the end.", no_args_is_help=True
)


def measurement(measure: Callable[..., object]) -> Callable[..., None]:
    """Make ``measure(where, ...)`` a command with its own options and those of every benchmark; what it returns is printed.

    A parameter that is a dataclass stands for an option for each of its fields.
    """
    parameters = list(inspect.signature(measure, eval_str=True).parameters.values())[1:]
    groups: dict[str, Any] = {
        one.name: one.annotation for one in parameters if dataclasses.is_dataclass(one.annotation)
    }

    def command(
        dsn: Dsn = None, data_dir: DataDir = None, embedded: Embedded = False, json: Json = False, **own: Any
    ) -> None:
        for name, group in groups.items():
            own[name] = group(**{field.name: own.pop(field.name) for field in dataclasses.fields(group)})
        with prepared(dsn, data_dir, embedded) as where:
            result = measure(where, **own)
        show(result, json)

    options: list[inspect.Parameter] = []
    for one in parameters:
        options += (
            inspect.signature(groups[one.name], eval_str=True).parameters.values() if one.name in groups else [one]
        )
    options += list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    registered = update_wrapper(command, measure, assigned=("__name__", "__doc__"))
    del registered.__wrapped__  # typer would look through it
    registered.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what inspect reads first
    registered.__annotations__ = {option.name: option.annotation for option in options}
    return bench.command(measure.__name__.rstrip("_"))(registered)


RECALLS = [0.9, 0.95, 0.99]
SELECTIVITIES = [0.5, 0.1, 0.01, 0.001]


@measurement
def search(where: Environment, searched: Searched, recall: Recalls = None, clients: ManyClients = None) -> object:
    """Recall, searches a second and their latency; the time until a loaded table is searchable.

    Example: syncd bench search --embedded --versus pgvector
    """
    from syncd.bench import search as module

    return module.measure(
        where,
        searched.load(),
        recalls=recall or RECALLS,
        client_numbers=clients or client_numbers(),
        turns=searched.turns,
    )


@measurement
def filter_(
    where: Environment,
    searched: Searched,
    selectivity: Annotated[
        list[float] | None,
        again("Share of the rows that pass", "0.5, 0.1, 0.01, 0.001", min=0, max=1),
    ] = None,
    recall: Recall = 0.95,
    clients: ManyClients = None,
) -> object:
    """Recall and speed of searches with filters that let few or many rows pass, at random and near or far ones.

    Example: syncd bench filter --embedded --versus pgvector
    """
    from syncd.bench import filtered as module

    return module.measure(
        where,
        searched.load(),
        selectivities=selectivity or SELECTIVITIES,
        recall=recall,
        client_numbers=clients or client_numbers(),
        turns=searched.turns,
    )


@measurement
def mixed(
    where: Environment,
    searched: SearchedAndWritten,
    rate: Annotated[float, typer.Option(min=1, help="Rows to change a second.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Rows that a transaction changes, in one statement.")] = 50,
    writers: Annotated[int, typer.Option(min=1, help="Processes that write.")] = 2,
    clients: Clients = 2,
    recall: Recall = 0.95,
) -> object:
    """Searches while writers write: the searches' latency, and the time from commit to searchable.

    Example: syncd bench mixed --embedded --rate 1000 --versus pgvector
    """
    from syncd.bench import mixed as module

    return module.measure(
        where,
        searched.load(spare=SAMPLES),
        recall=recall,
        rate=rate,
        batch=batch,
        writers=writers,
        client_number=clients,
        turns=searched.turns,
    )


@measurement
def churn(
    where: Environment,
    searched: Searched,
    updates: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows to give another vector.")] = 0.5,
    deletes: Annotated[float, typer.Option(min=0, max=1, help="Share of the rows to delete, of the others.")] = 0.3,
    recall: Recalls = None,
    clients: Clients = 1,
) -> object:
    """Recall and latency before and after updates of half of the rows and deletes of others, beside a fresh build.

    Example: syncd bench churn --embedded --versus pgvector
    """
    from syncd.bench import churn as module

    return module.measure(
        where,
        searched.load(share=updates),
        deletes=deletes,
        recalls=recall or RECALLS,
        client_number=clients,
        turns=searched.turns,
    )


@measurement
def restart(
    where: Environment,
    rows: Annotated[int, typer.Option(min=100, help="Rows of the table.")] = SOME_ROWS,
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
    rows: Annotated[list[int] | None, again("Rows of a table", "10000, 1000000")] = None,
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
    datasets: Annotated[list[int] | None, again("Number of datasets", "1, 100, 5000")] = None,
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
    clients: Annotated[list[int] | None, again("Number of writers", "1, 8, 32")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Seconds for each run.")] = 5,
    rounds: Rounds = 5,
    dim: Dimension = 768,
) -> object:
    """Inserts a second: a bare table, one that syncd follows, the same with syncd paused, one with a pgvector HNSW index.

    Example: syncd bench ingest --embedded --clients 32
    """
    from syncd.bench import ingest as module

    return module.measure(where, dimension=dim, clients=clients or [1, 8, 32], seconds=seconds, rounds=rounds)


@measurement
def backfill(
    where: Environment,
    rows: Rows = SOME_ROWS,
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
    rows: Rows = 1_000_000,
    rounds: Rounds = 3,
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
    rows: Rows = 1000,
    dim: Dimension = 768,
) -> object:
    """Round trip of an exact search, beside FAISS alone.

    Example: syncd bench rpc --embedded
    """
    from syncd.bench import rpc as module

    return [module.measure(where, rows=rows, dimension=dim)]


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
