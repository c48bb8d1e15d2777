"""Why a dataset is behind or wrong: facts of the service and the database, and causes.

Promise: each problem has a cause, and each cause has the command that fixes it. The likeliest
cause comes first. ``nothing is wrong`` is printed only if every check of the dataset's source was
made and passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import psycopg

from syncd.client.client import Client
from syncd.errors import DatabaseError
from syncd.ops.amounts import ago
from syncd.ops.check_sources import (
    READING_CHECKS,
    SOURCE_CHECKS,
    check_table,
    sampled_lengths,
    wrong_dimension,
)
from syncd.ops.findings import Finding, fail, guarded, warn
from syncd.ops.look import Look, Service, attach_commands, looking
from syncd.ops.sessions import check_locks, check_prepared_transactions, read_writers
from syncd.ops.why_facts import (
    Fact,
    database_facts,
    service_facts,
    source_facts,
    source_of,
    verify_facts,
)
from syncd.postgres.layout import read_sources
from syncd.postgres.source import Source
from syncd.protocol.status_messages import DatasetStatus, WhyResult
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
"""Subjects of causes, the likeliest cause of a wrong dataset first."""


class Explanation(msgspec.Struct, frozen=True):
    """One screen: facts and causes. ``known`` is false if no dataset has this name."""

    dataset: str
    known: bool
    facts: list[Fact]
    causes: list[Finding]


def explain(settings: Settings, socket: Path | str, name: str) -> Explanation:
    """Ask the service and the database; raises ``ServiceUnavailable`` if no service runs."""
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


def service_causes(said: WhyResult) -> Iterator[Finding]:
    """Problems that the service knows."""
    status, progress = said.status, said.progress
    if not said.connected:
        reason = said.database_error or "it has no connection to the database"
        detail = (
            f"the service says: {reason}; it answers from its last position, and tries again by "
            "itself"
        )
        yield fail("database", detail, said.database_hint or "syncd check")
    if status is not None and status.state == "must_rebuild":
        reading = progress is not None and progress.scanned_rows is not None
        detail = (
            "the changes it needs are no longer kept, so that it must be "
            f"rebuilt{with_reason(said)}"
        )
        again = "to prevent it: raise SYNCD_OUTBOX_MAX_ROWS"
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
            else "answers from its last position"
        )
        again = f"it is tried again in {ago(progress.retry_in_seconds)}"
        yield fail(
            "failure",
            f"the source cannot be read: {progress.failure}; the dataset {answers}",
            f"{progress.fix}  # {again}"
            if progress.fix
            else f"repair that; {again} (see: syncd check)",
        )
    for count in said.quarantine:
        keys = ", ".join(msgspec.json.encode(key).decode() for key in count.sample)
        detail = (
            f"{count.rows} live row{'s are' if count.rows > 1 else ' is'} in quarantine with "
            f"{count.reason}, such as key {keys}"
        )
        yield warn("quarantine", detail, next_step(count.reason))
    if said.checkpoint.error:
        detail = (
            f"the last checkpoint failed: {said.checkpoint.error}; a restart would replay from the "
            "previous one"
        )
        yield warn("checkpoint", detail, "syncd check, then: syncd checkpoint")
    if said.notifies and said.connected and not said.listener_connected:
        detail = "the listener is not connected: changes are found by the poll alone"
        yield warn(
            "listener",
            detail,
            "see listener_lost in the log of syncd serve; behind a pooler set SYNCD_NOTIFY=off",
        )


def with_reason(said: WhyResult) -> str:
    """The service's reason for the dataset's state, with a colon before it."""
    return f": {said.reason}" if said.reason else ""


def verify_causes(row: DatasetStatus | None) -> Iterator[Finding]:
    """The last verify found a difference."""
    if row is not None and row.in_sync is False:
        yield fail(
            "verify", "the last verify found a difference", f"syncd verify {row.dataset} --repair"
        )


def database_causes(said: WhyResult, look: Look) -> Iterator[Finding]:
    """Problems of the dataset's source that the database shows."""
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
    """All problems of a source; without the checks that read rows if they cannot be read."""
    locks = wrong("locks", lambda: check_locks(look, [source]))
    yield from locks
    unreadable = bool(locks)
    for words, check in SOURCE_CHECKS:
        # dimension_causes checks the dimensions.
        if words != "dimensions of" and not (unreadable and words in READING_CHECKS):
            found = wrong(f"{words} {source.name}", partial(check, look, source))
            unreadable |= bool(found) and words in ("table", "rights on", "columns of")
            yield from found
    prepared = wrong(
        "prepared transactions",
        lambda: check_prepared_transactions(look, [source], old_seconds=OPEN_WRITER_SECONDS),
    )
    yield from prepared
    yield from wrong("open transaction", lambda: open_writers(look, source))


def wrong(what: str, look_at: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Findings of a check that are not ok."""
    return [finding for finding in guarded(what, look_at) if finding.level != "ok"]


def dimension_causes(said: WhyResult, source: Source, look: Look) -> Iterator[Finding]:
    """The dataset's index has another dimension than most of its rows.

    Rows of other lengths are in quarantine, and the quarantine is a cause of its own.
    """
    if said.status is not None and source.dimension is None:
        lengths = sampled_lengths(look, source).get(said.dataset, [])
        yield from wrong_dimension("dimensions", said.dataset, said.status.dim, lengths)


def open_writers(look: Look, source: Source) -> Iterator[Finding]:
    """Open transactions that have written to the source: their rows stay invisible meanwhile."""
    for writer in read_writers(look, [source]):
        if writer.open_seconds is None or writer.open_seconds >= OPEN_WRITER_SECONDS:
            detail = (
                f"{writer.who} has written to {source.name} and is open for "
                f"{ago(writer.open_seconds)}: "
                f"its rows are indexed when it commits; last query: {writer.query}"
            )
            yield warn(
                "open transaction",
                detail,
                f"let it commit, or: SELECT pg_terminate_backend({writer.pid});",
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
            "wait, or repair that; watch it with: syncd datasets",
        )
    for source in look.sources:
        yield from source_causes(source, look)
    if not said.near:
        detail = (
            f"no live row's project and dataset expressions give {said.dataset} (see the sources "
            "above), or it had none at its last start"
        )
        yield fail(
            "dataset",
            detail,
            "list the datasets with: syncd datasets; compare with: SELECT * FROM syncd.sources;",
        )


def in_order(causes: list[Finding], said: WhyResult) -> list[Finding]:
    """The causes, the likeliest first.

    A failure that another cause explains is left out. A lag that no cause explains becomes one.
    """
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
                "see the log of syncd serve, and how busy the server is; syncd check looks at the "
                "rest",
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
    """The place of a cause's subject in ``ORDER``; a subject that is not in it comes first.

    The wanted name itself is such a subject.
    """
    return next((place for place, what in enumerate(ORDER) if cause.what.startswith(what)), -1)
