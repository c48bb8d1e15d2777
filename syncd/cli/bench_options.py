"""Options and vectors that several benchmarks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from syncd.cli.output import print_json, print_table, talk
from syncd.cli.session import database
from syncd.cores import memory_bytes
from syncd.errors import SettingsError
from syncd.settings import load_settings

if TYPE_CHECKING:
    from syncd.bench.environment import Environment  # these load FAISS
    from syncd.bench.vector_set import VectorSet

SOME_ROWS = 100_000


def again(what: str, default: str, *names: str, min: float = 1, max: float | None = None) -> Any:  # noqa: A002 - typer's names
    """An option that may be given several times."""
    described = f"{what}; repeat the option for more. Default: {default}."
    return typer.Option(*names, min=min, max=max, help=described)


Dimension = Annotated[int, typer.Option("--dim", min=1, help="Dimension of the vectors.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of the table.")]
Changes = Annotated[int, typer.Option(min=1, help="Rows that each transaction changes.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; each measures all variants in turn.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds for each run.")]
Readers = Annotated[
    int | None,
    typer.Option(min=0, help="Reader processes of syncd.", show_default="(SYNCD_READERS)"),
]
ManyClients = Annotated[
    list[int] | None, again("Number of client processes", "1, and one per core", "--clients")
]
Clients = Annotated[int, typer.Option(min=1, help="Processes that search.")]
Recall = Annotated[
    float, typer.Option(min=0.01, max=1, help="Recall to aim for if searches are approximate.")
]
Recalls = Annotated[
    list[float] | None, again("Recall to aim for", "0.9, 0.95, 0.99", "--recall", min=0.01, max=1)
]
Vectors = Annotated[
    Path | None,
    typer.Option(
        "--vectors",
        help=".npy, .fvecs, or .npz with base and, optionally, queries and neighbors.",
        show_default="generated vectors",
    ),
]
SomeRows = Annotated[
    int | None,
    typer.Option(
        "--rows",
        min=100,
        help="Rows of the table.",
        show_default="100000, or all that --vectors has",
    ),
]
DistanceMetric = Annotated[Literal["cosine", "l2", "ip"], typer.Option(help="Distance.")]
Queries = Annotated[
    int,
    typer.Option(min=1, help="Number of different queries; of 400 or more, half are held back."),
]
Versus = Annotated[
    Literal["pgvector"] | None,
    typer.Option(help="Also measure an HNSW index (m 16, ef_construction 64), in turn."),
]


def read_or_make(
    path: Path | None,
    rows: int | None,
    dim: int,
    *,
    queries: int,
    metric: Literal["cosine", "l2", "ip"],
    share: float = 0.0,
    spare: int = 0,
) -> VectorSet:
    """The vectors of a file, or generated ones: for the rows, and further ones to write.

    There are ``share`` further vectors per row, and ``spare`` more. Raises ``SettingsError`` if the
    file has too few.
    """
    from syncd.bench.vector_set import generate, read

    def written(count: int) -> int:
        return int(count * share) + spare

    if path is None:
        count = rows or SOME_ROWS
        found = generate(count + written(count), dim, queries=queries, metric=metric)
        return dataclasses.replace(found, spare=written(count))
    needed = None if rows is None else rows + written(rows)
    found = read(path, rows=needed, queries=queries, metric=metric)
    count = rows or max(int((len(found.base) - spare) / (1 + share)), 1)
    if len(found.base) < count + written(count):
        raise SettingsError(
            f"{path} has {len(found.base)} vectors for rows, {count + written(count)} are needed",
            hint="use fewer with --rows N",
        )
    return dataclasses.replace(
        found, base=found.base[: count + written(count)], spare=written(count)
    )


@contextmanager
def prepared(
    dsn: str | None, data_dir: Path | None, embedded: bool, readers: int | None = None
) -> Iterator[Environment]:
    """The environment of a benchmark, with a progress line if stderr is a terminal."""
    from syncd.bench.environment import environment

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
    # With PostgreSQL's default of 128 MB a benchmark would measure file reads. The PostgreSQL
    # manual advises a quarter of memory.
    buffers = {"shared_buffers": f"{memory_bytes() // 4 >> 20}MB"}
    with (
        database(settings, embedded=embedded, server_settings=buffers) as found,
        progress,
        environment(found, progress, talk) as where,
    ):
        yield dataclasses.replace(where, readers=readers)


def show(result: Any, json: bool) -> None:
    """Print a dataclass, or a list of them, one row each.

    A list inside a dataclass is printed below, as a table of its own.
    """
    if json:
        print_json(result)
        return
    rows = result if isinstance(result, list) else [result]
    fields = {
        field.name: [getattr(row, field.name) for row in rows]
        for field in dataclasses.fields(rows[0])
    }
    plain = {name: values for name, values in fields.items() if not isinstance(values[0], list)}
    print_table(list(plain), zip(*plain.values(), strict=True))
    for name, values in fields.items():
        if name not in plain and values[0]:
            print(f"\n{name}")
            show(values[0], json)
