"""Options that several benchmarks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from syncd.errors import SettingsError

if TYPE_CHECKING:
    from syncd.bench.vector_set import VectorSet  # loads FAISS
    from syncd.bench.versus import Turns

SOME_ROWS = 100_000


def again(what: str, default: str, *names: str, min: float = 1, max: float | None = None) -> Any:  # noqa: A002 - typer's names
    """An option that may be given several times."""
    return typer.Option(*names, min=min, max=max, help=f"{what}; again for more. Default: {default}.")


Dimension = Annotated[int, typer.Option("--dim", min=1, help="Dimension of the vectors.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of the table.")]
Changes = Annotated[int, typer.Option(min=1, help="Rows that a transaction changes.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; what is compared takes turns in each.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Seconds for each run.")]
ManyClients = Annotated[list[int] | None, again("Clients, each a process", "1, and one a core", "--clients")]
Clients = Annotated[int, typer.Option(min=1, help="Processes that search.")]
Recall = Annotated[float, typer.Option(min=0.01, max=1, help="Recall to aim for, where searches are approximate.")]
Recalls = Annotated[list[float] | None, again("Recall to aim for", "0.9, 0.95, 0.99", "--recall", min=0.01, max=1)]


@dataclass(frozen=True, slots=True)
class Searched:
    """Options of the benchmarks that search: what, and for how long."""

    vectors: Annotated[
        Path | None,
        typer.Option(
            help=".npy, .fvecs, or .npz with base and, where it has them, queries and neighbors.",
            show_default="made vectors",
        ),
    ] = None
    rows: Annotated[
        int | None,
        typer.Option(min=100, help="Rows of the table.", show_default="100000, or as many as --vectors is enough for"),
    ] = None
    dim: Dimension = 128
    metric: Annotated[Literal["cosine", "l2", "ip"], typer.Option(help="Distance.")] = "l2"
    queries: Annotated[int, typer.Option(min=1, help="Different searches.")] = 1000
    seconds: Seconds = 3
    rounds: Rounds = 3
    versus: Annotated[
        Literal["pgvector"] | None,
        typer.Option(help="The same with an HNSW index (m 16, ef_construction 64), in turn."),
    ] = None

    @property
    def turns(self) -> Turns:
        """How long what is compared runs, and how often."""
        from syncd.bench.versus import Turns

        return Turns(self.seconds, self.rounds, self.versus is not None)

    def load(self, *, share: float = 0.0, spare: int = 0) -> VectorSet:
        """The user's vectors, or made ones: those of the rows, and for each ``share`` of one, and ``spare``, to write."""
        from syncd.bench.vector_set import generate, read

        def written(rows: int) -> int:
            return int(rows * share) + spare

        if self.vectors is None:
            rows = self.rows or SOME_ROWS
            found = generate(rows + written(rows), self.dim, queries=self.queries, metric=self.metric)
            return dataclasses.replace(found, spare=written(rows))
        needed = None if self.rows is None else self.rows + written(self.rows)
        found = read(self.vectors, rows=needed, queries=self.queries, metric=self.metric)
        rows = self.rows or max(int((len(found.base) - spare) / (1 + share)), 1)
        if len(found.base) < rows + written(rows):
            raise SettingsError(
                f"{self.vectors} has {len(found.base)} vectors for rows, {rows + written(rows)} are needed",
                hint="ask for fewer with --rows N",
            )
        return dataclasses.replace(found, base=found.base[: rows + written(rows)], spare=written(rows))


@dataclass(frozen=True, slots=True)
class SearchedAndWritten(Searched):
    """The same where writing takes a while to show."""

    seconds: Seconds = 5
