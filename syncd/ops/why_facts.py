"""Facts about one dataset, as ``why`` prints them: of the service and of the database."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import psycopg

from syncd.ops.amounts import ago, since
from syncd.ops.look import Look
from syncd.postgres.source import Source
from syncd.protocol.status_messages import DatasetStatus, SourceProgress, WhyResult


class Fact(msgspec.Struct, frozen=True):
    """One known fact, as a line."""

    what: str
    value: str


def service_facts(said: WhyResult) -> Iterator[Fact]:
    """Facts of the service."""
    status, progress = said.status, said.progress
    if status is not None:
        yield Fact("state", status.state + (f": {said.reason}" if said.reason else ""))
        yield Fact("source", status.source)
        dimension = "no dimension yet" if status.dim is None else f"dimension {status.dim}"
        yield Fact(
            "rows",
            f"{status.count} indexed, {status.tombstones} tombstones, {dimension}, {status.metric}",
        )
        yield Fact("lag", f"{ago(status.lag_seconds)}" if status.lag_seconds else "none")
    if progress is not None:
        moved = (
            "not reached yet"
            if progress.moved_seconds is None
            else f"{ago(progress.moved_seconds)} old"
        )
        yield Fact(
            "position",
            f"{progress.position.snapshot} outbox_id {progress.position.outbox_id}, {moved}",
        )
        if progress.scanned_rows is not None:
            yield Fact("reading", f"the whole table; {progress.scanned_rows} rows so far")
        if progress.failure is not None:
            failure = "as above" if progress.failure == said.reason else progress.failure
            yield Fact("last error", f"{failure}; tried again in {ago(progress.retry_in_seconds)}")
    connected = "connected" if said.connected else "not connected"
    yield Fact(
        "database",
        f"consumer {said.consumer} {connected}, last pass {ago(said.last_pass_seconds)} ago",
    )
    if said.notifies:
        yield Fact("listener", "connected" if said.listener_connected else "not connected")
    else:
        yield Fact("listener", "off: the service polls every 0.02 s")
    yield Fact(
        "checkpoint", (said.checkpoint.error or since(said.checkpoint.at)) + unconfirmed(progress)
    )
    if said.open_writers:
        yield Fact(
            "writers", f"{said.open_writers} transactions that have written to a source are open"
        )
    for count in said.quarantine:
        keys = ", ".join(msgspec.json.encode(key).decode() for key in count.sample)
        yield Fact("quarantine", f"{count.rows} with {count.reason}, such as {keys}")


def unconfirmed(progress: SourceProgress | None) -> str:
    """Amount that would be read again after a lost connection."""
    if progress is None or progress.unconfirmed_keys == 0:
        return ""
    count = (
        "a whole table"
        if progress.unconfirmed_keys is None
        else f"{progress.unconfirmed_keys} keys"
    )
    return f"; {count} applied since"


def verify_facts(row: DatasetStatus | None) -> Iterator[Fact]:
    """The last verify, if the service remembers one."""
    if row is not None and row.verified_at is not None:
        yield Fact(
            "verify", f"{'in sync' if row.in_sync else 'not in sync'}, {since(row.verified_at)}"
        )


def database_facts(said: WhyResult, look: Look) -> Iterator[Fact]:
    """Facts of the database."""
    source = source_of(said, look)
    if source is None or said.progress is None:
        return
    parameters = {"source": source.id, "snapshot": said.progress.position.snapshot}
    try:
        (rows,) = look.row("count_waiting_rows", parameters)
    except (
        psycopg.errors.LockNotAvailable,
        psycopg.errors.QueryCanceled,
    ):  # another transaction locks the outbox
        return
    yield Fact(
        "outbox", f"{rows} row{'' if rows == 1 else 's'} of {source.name} behind the position"
    )


def source_facts(look: Look) -> Iterator[Fact]:
    """The sources' expressions for datasets, for a name that no source has formed."""
    for source in look.sources:
        given = look.arguments.get(source.id, {})
        yield Fact(
            "source",
            f"{source.name}: project {given.get('project')}, dataset {given.get('dataset')}, live "
            f"{given.get('live')}",
        )


def source_of(said: WhyResult, look: Look) -> Source | None:
    """The dataset's source, as it is attached now; None if it is not."""
    status = said.status
    return (
        None
        if status is None
        else next((each for each in look.sources if each.name == status.source), None)
    )
