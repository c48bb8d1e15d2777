"""Commands that call the running service.

search, status, datasets, recall, verify, rebuild, checkpoint, healthcheck.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer

from syncd.cli.options import Json, Socket
from syncd.cli.output import print_json, print_table, talk
from syncd.cli.progress import progress
from syncd.cli.session import service
from syncd.cli.values import key_argument, read_filter, read_vector, shown_key
from syncd.cli.watch import watch
from syncd.client import calls
from syncd.errors import SettingsError
from syncd.ops.amounts import since
from syncd.protocol.messages import (
    MAX_RESULTS,
    MOST_MEASURED,
    DatasetVerified,
    SearchResult,
    VerifyResult,
)
from syncd.settings import load_settings
from syncd.shard import WHOLE

ANSWERING = ("ready", "rebuilding")
STATUS_ROWS = (
    "version",
    "consumer",
    "state",
    "lag_rows",
    "lag_seconds",
    "listener_connected",
    "uptime_seconds",
    "quarantined",
)


def search(
    dataset: Annotated[
        str, typer.Argument(help="The dataset; the project default may be left out.")
    ],
    key: Annotated[
        str | None, typer.Option(help="Find rows that are similar to the row with this key.")
    ] = None,
    vector: Annotated[
        str | None, typer.Option(help="JSON array, @file with one, or - for stdin.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=MAX_RESULTS, help="Number of rows.")] = 10,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every row.")] = False,
    recall: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Recall to aim for.")
    ] = None,
    filter_json: Annotated[
        str | None,
        typer.Option("--filter", help='Conditions on attached columns, as JSON: {"lang": "en"}.'),
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="cut: the rows at one snapshot of all shards.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Answer without the shards that do not.")
    ] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Print the nearest rows: key and distance.

    Example: syncd search chunks --key 42 -k 5
    """
    if (key is None) == (vector is None):
        raise SettingsError(
            "give either --key or --vector",
            hint="syncd search DATASET --key K, or --vector '[0.1, 0.2]'",
        )
    if at not in (None, "cut"):
        raise SettingsError(f"--at {at} is not cut", hint="syncd search DATASET --key K --at cut")
    with service(socket) as client:
        asked = calls.search(
            dataset,
            None if vector is None else read_vector(vector),
            key=None if key is None else key_argument(client, dataset, key),
            k=k,
            exact=exact,
            recall=recall,
            filter=None if filter_json is None else read_filter(filter_json),
            partial="allow" if partial else "refuse",
            at=None if at is None else "cut",
        )
        whole_answer = msgspec.json.Decoder(SearchResult).decode
        found = client.run(
            calls.Call(asked.method, asked.params, whole_answer, asked.patience_seconds)
        )
    if json:
        print_json(found)
    else:
        rows = zip(found.keys, found.distances, strict=True)
        print_table(
            ["key", "distance"], [(shown_key(key), f"{distance:.6f}") for key, distance in rows]
        )
    for each in found.missing:
        talk(f"shard {each.shard} is missing: {each.reason}")
    if found.missing:
        talk(f"  {found.coverage:.0%} of the rows could be found; see: syncd cluster status")


def status(
    watched: Annotated[
        bool, typer.Option("--watch", help="Refresh every second, and show each dataset.")
    ] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Print the service's state: whether it is in step with the tables, and its last checkpoint.

    Example: syncd status --watch
    """
    with service(socket) as client:
        if watched:
            watch(client, json=json)
            return
        found = client.status()
    if json:
        print_json(found)
        return
    rows: list[tuple[str, Any]] = [(name, getattr(found, name)) for name in STATUS_ROWS]
    if found.position is not None:
        rows.append(("position", f"{found.position.snapshot} outbox_id {found.position.outbox_id}"))
    if found.shard != str(WHOLE):
        rows.append(("shard", found.shard))
    rows += [
        (f"shard {shard}", f"{each.snapshot} outbox_id {each.outbox_id}")
        for shard, each in found.positions.items()
    ]
    rows += [(f"shard {each.shard}", f"missing: {each.reason}") for each in found.missing]
    rows += [
        ("", f"{each.rows} rows of {each.source} with {each.reason}") for each in found.quarantine
    ]
    rows.append(("checkpoint", since(found.checkpoint.at)))
    rows.append(("checkpoint error", found.checkpoint.error))
    rows.append(("database", found.database_error or "connected"))
    if found.verify is not None:
        late = f", late: {found.verify.overdue}" if found.verify.overdue else ""
        rows.append(("verify", since(found.verify.at) + late))
    rows += [("task", f"{each.task} fails: {each.error}") for each in found.failing_tasks]
    print_table(
        ["", ""],
        [(name.replace("_", " "), round(v, 3) if isinstance(v, float) else v) for name, v in rows],
    )
    errors = found.database_error or found.checkpoint.error or found.failing_tasks
    if errors or found.state not in ANSWERING:
        talk("next: syncd check")


def datasets(socket: Socket = None, json: Json = False) -> None:
    """Print every dataset and its state.

    Example: syncd datasets --json
    """
    with service(socket) as client:
        found = client.datasets()
    if json:
        print_json(found)
        return
    columns = [
        "dataset",
        "source",
        "state",
        "count",
        "tombstones",
        "dim",
        "metric",
        "index",
        "recall",
        "bytes",
        "lag_seconds",
    ]
    print_table(
        [column.replace("_", " ") for column in columns],
        [
            [
                round(value, 3) if isinstance(value := getattr(row, column), float) else value
                for column in columns
            ]
            for row in found
        ],
    )


def recall(
    dataset: Annotated[
        str, typer.Argument(help="The dataset; the project default may be left out.")
    ],
    k: Annotated[int, typer.Option("-k", min=1, max=MOST_MEASURED, help="Number of rows.")] = 10,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Measure the recall that searches reach for several targets, and the time that one takes.

    The queries are those that clients asked lately. If there are fewer than 200 different ones,
    rows of the dataset serve as queries.

    Example: syncd recall chunks -k 10
    """
    with service(socket) as client:
        found = client.recall(dataset, k)
    if json:
        print_json(found)
        return
    print_table(
        ["target", "mean", "5th percentile", "least", "exact", "ms a search"],
        [
            [
                f"{each.target:g}",
                f"{each.mean:.4f}",
                f"{each.p5:.3f}",
                f"{each.least:.3f}",
                f"{each.exact} of {found.queries}",
                f"{each.milliseconds:.2f}",
            ]
            for each in found.targets
        ],
    )
    if found.of == "queries":
        talk(f"recall@{found.k} of {found.queries} queries that clients asked")
    else:
        talk(
            f"recall@{found.k} of {found.queries} rows as queries, because fewer than 200 "
            "different queries were asked; rows may overstate it"
        )


def checkpoint(socket: Socket = None, json: Json = False) -> None:
    """Save a checkpoint now.

    Example: syncd checkpoint
    """
    with service(socket) as client:
        done = client.checkpoint()
    if json:
        print_json(done)
    else:
        talk(f"saved in {done.seconds:.3f} s, {done.bytes_written} bytes written")


def verify(
    dataset: Annotated[list[str] | None, typer.Argument(help="Datasets; none: all.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read again the rows that differ.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare the vectors too, not only fingerprints.")
    ] = False,
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Compare indexes with their tables at one snapshot. Exit 0 if they are equal, 1 if not.

    Example: syncd verify --repair
    """
    with service(socket) as client, progress(service(socket), "verifying"):
        names: list[str | None] = [*dataset] if dataset else [None]
        results = [client.verify(name, repair=repair, deep=deep) for name in names]
    print_verified(results, json=json)


def print_verified(results: Sequence[VerifyResult], *, json: bool) -> None:
    """Print the results of comparisons. The exit status is 1 unless all are in sync."""
    rows = [row for result in results for row in result.datasets]
    sources = {each.source: each for result in results for each in result.sources}
    if json:
        print_json(
            msgspec.structs.replace(results[0], datasets=rows, sources=list(sources.values()))
        )
    else:
        columns = ["rows", "indexed", "missing", "extra", "stale", "quarantined", "repaired"]
        print_table(
            ["dataset", "", *columns, "sample"],
            [
                [
                    row.dataset,
                    verdict(row),
                    *(getattr(row, column) for column in columns),
                    shown_keys(row.sample),
                ]
                for row in rows
            ],
        )
        for each in sources.values():
            if each.outcome == "empty":
                talk(f"{each.source}: empty (the table has no rows, so nothing was compared)")
        talk(f"at snapshot {results[-1].position.snapshot}")
    for each in sources.values():
        if each.outcome == "compared" and each.reason:
            talk(f"{each.source}: {each.reason}; see syncd.quarantine")
    failed = [each for each in sources.values() if each.outcome in ("none_live", "failed")]
    for each in failed:
        if each.outcome == "none_live":
            talk(
                f"{each.source}: none of its rows is live, so nothing was compared; see its rule "
                "in syncd.sources"
            )
        else:
            reason = each.reason.rstrip(";")
            talk(f"{each.source} could not be compared: {reason}; see: syncd check")
    differing = [row.dataset for row in rows if row.missing + row.extra + row.stale > row.repaired]
    if differing:
        talk(f"next: syncd verify {shlex.join(differing[:8])} --repair")
    if failed or not all(row.in_sync for row in rows):
        raise typer.Exit(1)


def verdict(row: DatasetVerified) -> str:
    """The result of a comparison, for a table."""
    if not row.in_sync:
        return "DIFFERS" if row.missing or row.extra or row.stale else "not compared"
    if not row.rows and not row.indexed and not row.repaired:
        return "empty"
    return "repaired" if row.repaired else "in sync"


def shown_keys(keys: Sequence[Any]) -> str:
    """Text of some keys, for a table."""
    return ", ".join(map(shown_key, keys))


def rebuild(
    dataset: Annotated[
        str, typer.Argument(help="The dataset; the project default may be left out.")
    ],
    socket: Socket = None,
    json: Json = False,
) -> None:
    """Build a dataset again from its table, alongside the one that answers, and swap them.

    Example: syncd rebuild chunks
    """
    with service(socket) as client, progress(service(socket), "rebuilding"):
        done = client.rebuild(dataset)
    if json:
        print_json(done)
    else:
        talk(f"{done.dataset}: {done.rows} rows in {done.seconds:.1f} s")


def healthcheck(socket: Socket = None) -> None:
    """Exit 0 if every dataset answers searches, and its lag is at most SYNCD_MAX_STALENESS_SECONDS.
    Otherwise exit 1.

    The exit status is 0 even if the database cannot be reached, or has no schema syncd. The service
    then still answers from its indexes, and a restart would end that.

    Example: syncd healthcheck && echo well
    """
    with service(socket) as client:
        found = client.status()
    allowed = load_settings().max_staleness_seconds
    stale = allowed is not None and found.lag_seconds > allowed
    database = f"; it cannot follow changes: {found.database_error}" if found.database_error else ""
    limit = f", more than SYNCD_MAX_STALENESS_SECONDS={allowed:g} allows" if stale else ""
    talk(f"{found.state}, lag {found.lag_seconds:.1f} s{limit}{database}")
    if database or stale or found.state not in ANSWERING:
        talk("  next: syncd check")
    if stale or found.state not in ANSWERING:
        raise typer.Exit(1)
