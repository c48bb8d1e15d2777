"""Why a dataset is behind or wrong: what the service says, what the database shows, and the causes, the likeliest first.

Promise: where anything is not as it should be there is a cause, each with the command that mends it; ``nothing is wrong`` is said only where
every check of the dataset's source was made and passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psycopg

from syncd.client.client import Client
from syncd.errors import DatabaseError
from syncd.ops.check_sources import (
    READING_CHECKS,
    SOURCE_CHECKS,
    check_table,
    sampled_lengths,
    wrong_dimension,
)
from syncd.ops.findings import Finding, ago, fail, guarded, since, warn
from syncd.ops.look import Look, Service, attach_commands, looking
from syncd.ops.sessions import check_locks, check_prepared_transactions, read_writers
from syncd.postgres.source import Source, read_sources
from syncd.protocol.messages import DatasetStatus, SourceProgress, WhyResult
from syncd.settings import Settings
from syncd.sync.registry.quarantine import next_step

OPEN_WRITER_SECONDS = 1.0
LAG_SECONDS = 5.0
ORDER = (
    "database",
    "consumer",
    "table",
    "rights",
    "columns",
    "locks",
    "triggers",
    "stray triggers",
    "failure",
    "state",
    "key",
    "live rows",
    "dimensions",
    "quarantine",
    "prepared transactions",
    "open transaction",
    "verify",
    "lag",
    "checkpoint",
    "listener",
    "dataset",
)
"""What a cause is about, the likeliest to keep a dataset from being right first."""


class Fact(msgspec.Struct, frozen=True):
    """One line of what is known."""

    what: str
    value: str


class Explanation(msgspec.Struct, frozen=True):
    """One screen: what is known, and why it is so. ``known`` is false where no dataset has this name."""

    dataset: str
    known: bool
    facts: list[Fact]
    causes: list[Finding]


def explain(settings: Settings, socket: Path | str, name: str) -> Explanation:
    """Ask the service and the database; raises ``ServiceUnavailable`` where no service runs."""
    with Client(socket) as client:
        said, datasets, status = client.why(name), client.datasets(), client.status()
    facts, causes = list(service_facts(said)), list(service_causes(said))
    verified = next((row for row in datasets if row.dataset == said.dataset), None)
    facts += verify_facts(verified)
    causes += verify_causes(verified)
    try:
        commands = attach_commands({} if said.status is None else {said.status.source: said.fix})
        with looking(settings, Service(status, datasets, commands=commands)) as look:
            look.role = look.row("read_server")[2]
            with look.transaction():
                look.sources = read_sources(look.connection)
            look.arguments = dict(look.rows("read_arguments"))
            if said.status is None:
                facts += source_facts(look)
                causes += missing_causes(said, look)
            else:
                facts += database_facts(said, look)
                causes += database_causes(said, look)
    except DatabaseError as error:
        refused = isinstance(error.__cause__, psycopg.errors.InsufficientPrivilege)
        fix = (
            f"run syncd why as the role that syncd serve connects as; or {error.hint}"
            if refused
            else error.hint
        )
        if error.message != said.database_error:
            causes.append(fail("database", f"from here: {error.message}", fix))
    return Explanation(said.dataset, said.status is not None, facts, in_order(causes, said))


def service_facts(said: WhyResult) -> Iterator[Fact]:
    """What the service knows."""
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
        yield Fact("listener", "off: the service looks by itself every 0.02 s")
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
    """How much would be read again after a lost connection."""
    if progress is None or progress.unconfirmed_keys == 0:
        return ""
    count = (
        "a whole table"
        if progress.unconfirmed_keys is None
        else f"{progress.unconfirmed_keys} keys"
    )
    return f"; {count} applied since"


def service_causes(said: WhyResult) -> Iterator[Finding]:
    """What the service knows to be wrong."""
    status, progress = said.status, said.progress
    if not said.connected:
        reason = said.database_error or "it has no connection to the database"
        detail = (
            f"the service says: {reason}; it answers from where it was, and tries again by itself"
        )
        yield fail("database", detail, said.database_hint or "syncd check")
    if status is not None and status.state == "must_rebuild":
        reading = progress is not None and progress.scanned_rows is not None
        detail = f"the changes it needs are no longer kept, so that it must be rebuilt{with_reason(said)}"
        again = "against the next time: SYNCD_OUTBOX_MAX_ROWS"
        watch = f"it is being read again: watch it with: syncd datasets; {again}"
        yield fail("state", detail, watch if reading else f"syncd rebuild {said.dataset}; {again}")
    elif status is not None and status.state in ("backfilling", "catching_up", "rebuilding"):
        rows = progress.scanned_rows if progress is not None else None
        detail = f"it is {status.state}{with_reason(said)}" + (
            f"; {rows} rows of the table are read" if rows is not None else ""
        )
        yield warn("state", detail, "wait, and watch it with: syncd datasets")
    if progress is not None and progress.failure is not None:
        answers = (
            "stopped answering"
            if status is not None and status.state == "failed"
            else "answers from where it was"
        )
        again = f"it is tried again by itself in {ago(progress.retry_in_seconds)}"
        yield fail(
            "failure",
            f"the source cannot be read: {progress.failure}; the dataset {answers}",
            f"{progress.fix}  # {again}"
            if progress.fix
            else f"repair that; {again} (see: syncd check)",
        )
    for count in said.quarantine:
        keys = ", ".join(msgspec.json.encode(key).decode() for key in count.sample)
        detail = f"{count.rows} live row{'s are' if count.rows > 1 else ' is'} in quarantine with {count.reason}, such as key {keys}"
        yield warn("quarantine", detail, next_step(count.reason))
    if said.checkpoint.error:
        detail = f"the last checkpoint failed: {said.checkpoint.error}; a restart would replay from the one before"
        yield warn("checkpoint", detail, "syncd check, then: syncd checkpoint")
    if said.notifies and said.connected and not said.listener_connected:
        detail = "the listener is not connected: changes are found by the poll alone"
        yield warn(
            "listener",
            detail,
            "see listener_lost in the log of syncd serve; behind a pooler set SYNCD_NOTIFY=off",
        )


def with_reason(said: WhyResult) -> str:
    """The reason that the service gives for the dataset's state."""
    return f": {said.reason}" if said.reason else ""


def verify_facts(row: DatasetStatus | None) -> Iterator[Fact]:
    """The last verify, where the service remembers one."""
    if row is not None and row.verified_at is not None:
        yield Fact(
            "verify", f"{'in sync' if row.in_sync else 'not in sync'}, {since(row.verified_at)}"
        )


def verify_causes(row: DatasetStatus | None) -> Iterator[Finding]:
    """The last verify found a difference."""
    if row is not None and row.in_sync is False:
        yield fail(
            "verify", "the last verify found a difference", f"syncd verify {row.dataset} --repair"
        )


def database_facts(said: WhyResult, look: Look) -> Iterator[Fact]:
    """What the database adds to the picture."""
    source = source_of(said, look)
    if source is None or said.progress is None:
        return
    parameters = {"source": source.id, "snapshot": said.progress.position.snapshot}
    try:
        (rows,) = look.row("count_waiting_rows", parameters)
    except (
        psycopg.errors.LockNotAvailable,
        psycopg.errors.QueryCanceled,
    ):  # somebody is at the outbox just now
        return
    yield Fact(
        "outbox", f"{rows} row{'' if rows == 1 else 's'} of {source.name} behind the position"
    )


def source_of(said: WhyResult, look: Look) -> Source | None:
    """The dataset's source, as it is attached now."""
    status = said.status
    return (
        None
        if status is None
        else next((each for each in look.sources if each.name == status.source), None)
    )


def database_causes(said: WhyResult, look: Look) -> Iterator[Finding]:
    """What the database shows to be wrong with the dataset's source."""
    assert said.status is not None
    source = source_of(said, look)
    if source is None:
        dropped = [each for each in look.sources if each.table is None]
        named = [each for each in dropped if each.last_name == said.status.source]
        if named or dropped:
            yield from wrong("table", lambda: check_table(look, (named or dropped)[0]))
            return
        detail = f"{said.status.source} is no longer attached under this name"
        yield fail(
            "table", detail, "syncd attach TABLE; what is attached: SELECT * FROM syncd.sources;"
        )
        return
    found = list(source_causes(source, look))
    yield from found
    if not any(rank(cause) <= ORDER.index("locks") for cause in found):
        yield from wrong("dimensions", lambda: dimension_causes(said, source, look))


def source_causes(source: Source, look: Look) -> Iterator[Finding]:
    """All that is not ok about a source; its rows are not read where it is clear that they cannot be."""
    locks = wrong("locks", lambda: check_locks(look, [source]))
    yield from locks
    unreadable = bool(locks)
    for words, check in SOURCE_CHECKS:
        if words != "dimensions of" and not (
            unreadable and words in READING_CHECKS
        ):  # see dimension_causes
            found = wrong(f"{words} {source.name}", lambda check=check: check(look, source))  # type: ignore[misc]
            unreadable |= bool(found) and words in ("table", "rights on", "columns of")
            yield from found
    prepared = wrong(
        "prepared transactions",
        lambda: check_prepared_transactions(look, [source], old_seconds=OPEN_WRITER_SECONDS),
    )
    yield from prepared
    yield from wrong("open transaction", lambda: open_writers(look, source))


def wrong(what: str, look_at: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check found that is not ok."""
    return [finding for finding in guarded(what, look_at) if finding.level != "ok"]


def dimension_causes(said: WhyResult, source: Source, look: Look) -> Iterator[Finding]:
    """The dataset is indexed with another dimension than most of its rows have. Rows of other lengths are in quarantine, and listed as such."""
    if said.status is not None and source.dimension is None:
        lengths = sampled_lengths(look, source).get(said.dataset, [])
        yield from wrong_dimension("dimensions", said.dataset, said.status.dim, lengths)


def open_writers(look: Look, source: Source) -> Iterator[Finding]:
    """Transactions that have written to the source and are still open: nobody sees their rows before they end."""
    for writer in read_writers(look, [source]):
        if writer.open_seconds is None or writer.open_seconds >= OPEN_WRITER_SECONDS:
            detail = (
                f"{writer.who} has written to {source.name} and is open for {ago(writer.open_seconds)}: "
                f"its rows are indexed when it commits; last query: {writer.query}"
            )
            yield warn(
                "open transaction",
                detail,
                f"let it commit, or: SELECT pg_terminate_backend({writer.pid});",
            )


def source_facts(look: Look) -> Iterator[Fact]:
    """How sources form datasets, for a name that none has formed."""
    for source in look.sources:
        given = look.arguments.get(source.id, {})
        yield Fact(
            "source",
            f"{source.name}: project {given.get('project')}, dataset {given.get('dataset')}, live {given.get('live')}",
        )


def missing_causes(said: WhyResult, look: Look) -> Iterator[Finding]:
    """Why there is no dataset of this name."""
    if said.near:
        yield fail(
            "name",
            f"there is no dataset {said.dataset}; near names: {', '.join(said.near)}",
            f"syncd why {said.near[0]}",
        )
    if not look.sources:
        yield fail(
            "source", "nothing is attached, so that no dataset can form", "syncd attach TABLE"
        )
        return
    for pending, reason in said.pending.items():
        yield fail(
            "failure",
            f"not everything is read yet; {pending}: {reason}",
            "wait, or mend that; watch it with: syncd datasets",
        )
    for source in look.sources:
        yield from source_causes(source, look)
    if not said.near:
        detail = f"no live row's project and dataset expressions give {said.dataset} (see the sources above), or it had none at its last start"
        yield fail(
            "dataset",
            detail,
            "list the datasets with: syncd datasets; compare with: SELECT * FROM syncd.sources;",
        )


def in_order(causes: list[Finding], said: WhyResult) -> list[Finding]:
    """The likeliest cause first. A failure that another cause explains is left to it; a lag that none explains is one itself."""
    explained = {rank(cause) for cause in causes}
    early = range(ORDER.index("triggers"))
    kept = [
        cause for cause in causes if cause.what != "failure" or not explained.intersection(early)
    ]
    lag = said.status.lag_seconds if said.status is not None else 0.0
    if lag > LAG_SECONDS and not kept:
        detail = f"the last completed pass is {ago(said.last_pass_seconds)} old, and changes wait"
        kept.append(
            warn(
                "lag",
                detail,
                "see the log of syncd serve, and how busy the server is; syncd check looks at the rest",
            )
        )
    if said.status is not None and said.status.state == "failed" and not kept:
        kept.append(
            fail(
                "failure",
                f"the dataset has failed{with_reason(said)}",
                "see the log of syncd serve; syncd check",
            )
        )
    return sorted(kept, key=rank)


def rank(cause: Finding) -> int:
    """The place of a cause's subject in ``ORDER``; what is not there comes first, as the name that was asked for does."""
    return next((place for place, what in enumerate(ORDER) if cause.what.startswith(what)), -1)
