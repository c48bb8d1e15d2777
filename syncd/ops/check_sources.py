"""Checks of one source: rights to read it, triggers for each change, rows that can be indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from psycopg import errors, sql

from syncd.ops.findings import Finding, fail, ok, warn
from syncd.ops.look import Look, sql_name
from syncd.postgres.catalogue import shell_line
from syncd.postgres.layout import like_before
from syncd.postgres.source import Source, raw
from syncd.statements import filled
from syncd.types import dataset_name

EVENTS = ("insert", "update", "delete", "truncate")


def check_table(look: Look, source: Source) -> Iterator[Finding]:
    """The table exists, is the table that was attached, and its triggers see each change."""
    what = f"table {source.name}"
    if source.table is None:
        if source.successor == source.last_name is not None:
            detail = (
                f"{source.last_name} was dropped and created again: what is attached is the "
                "dropped one"
            )
            yield fail("table", detail, like_before(source))
        elif source.successor is not None:
            detail = (
                f"{source.last_name} was dropped, and {source.successor} has the name now with "
                "which it was attached"
            )
            yield fail("table", detail, like_before(source))
        else:
            yield fail(
                "table", f"{source.name}: it is still attached", f"syncd detach {source.oid}"
            )
        return
    unlogged = [name for (name,) in look.rows("read_unlogged", [source.oid])]
    if unlogged:
        shown = ", ".join(unlogged[:8]) + (
            f", and {len(unlogged) - 8} more" if len(unlogged) > 8 else ""
        )
        detail = (
            f"{shown} unlogged: a crash of the server empties it, and after each lost connection "
            "the table is compared"
        )
        yield warn(what, detail, f"ALTER TABLE {unlogged[0]} SET LOGGED;")
    _, _, _, _, children, *_ = look.row("read_source", [source.oid])
    if children:
        detail = "the table has inheritance children, whose rows its triggers do not see"
        yield fail(what, detail, f"syncd detach {source.name}, and attach each child by itself")
    yield from check_place(look, source)


def check_place(look: Look, source: Source) -> Iterator[Finding]:
    """The table was not exchanged with another: a source follows its table through each rename."""
    root, root_attached, other, other_attached = look.row("read_place", [source.id])
    what, leave = f"table {source.name}", shell_line(["syncd", "detach", sql_name(source)])
    if root is not None:
        detail = (
            f"the table is a partition of {root} now: rows of the other partitions are not indexed"
        )
        # The key of a partitioned table also holds its partition key: the present key is not
        # enough.
        attach = look.attach_command(source, table=root, key=())
        yield warn(what, detail, leave if root_attached else f"{leave} && {attach}")
    elif other is not None:
        dataset = look.arguments.get(source.id, {}).get("dataset", "")
        detail = f"dataset {dataset} is read from {source.name}, and {other} is another table now"
        own_name = sql.Literal(source.table).as_string()
        if other_attached and own_name != dataset:
            yield warn(what, detail, look.attach_command(source, dataset=own_name))
        else:
            yield warn(what, detail, f"{leave} && {look.attach_command(source, table=other)}")


def check_stray_triggers(look: Look, source: Source) -> Iterator[Finding]:
    """No other table has this source's triggers."""
    strays: dict[str, list[str]] = {}
    for relation, trigger in look.rows("read_stray_triggers", [source.id]):
        strays.setdefault(relation, []).append(trigger)
    for relation, triggers in strays.items():
        detail = (
            f"{relation} has triggers of {source.name}: they came with a dump or a copy of the "
            "table"
        )
        drops = " ".join(
            f"DROP TRIGGER {sql.Identifier(name).as_string()} ON {relation};" for name in triggers
        )
        yield warn(f"stray triggers of {source.name}", detail, drops)


def check_rights(look: Look, source: Source) -> Iterator[Finding]:
    """The role may read every row of the table."""
    if source.table is None:
        return
    what, table = f"rights on {source.name}", source.identifier.as_string()
    role = sql.Identifier(look.role).as_string()
    owner, may_select, may_enter, hides_rows, *_ = look.row("read_source", [source.oid])
    if not may_enter:
        schema = sql.Identifier(source.schema or "").as_string()
        yield fail(
            what,
            f'role "{look.role}" may not use schema {source.schema}',
            f"GRANT USAGE ON SCHEMA {schema} TO {role};",
        )
    if not may_select:
        yield fail(
            what,
            f'role "{look.role}" cannot SELECT {source.name}',
            f"GRANT SELECT ON {table} TO {role};",
        )
    if hides_rows:
        yield fail(
            what,
            f'row-level security would hide rows from role "{look.role}"',
            f"connect syncd as {owner}, the table's owner, or: ALTER ROLE {role} BYPASSRLS;",
        )
    if may_enter and may_select and not hides_rows:
        yield ok(what, f'role "{look.role}" may read every row')


def check_columns(look: Look, source: Source) -> Iterator[Finding]:
    """The vector column and the expressions are valid: the query that reads rows can be planned."""
    if source.table is None:
        return
    what = f"columns of {source.name}"
    if look.row("read_vector_column", [source.oid, source.vector]) is None:
        detail = f"the vector column {source.vector} is gone, or has another name"
        yield fail(what, detail, look.attach_with_present_columns(source))
        return
    try:
        look.source_rows(source.plan())
    except (errors.UndefinedColumn, errors.UndefinedFunction, errors.DatatypeMismatch) as error:
        meant = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
        detail = (
            f"its rows cannot be read as they were attached: {error.diag.message_primary}{meant}"
        )
        yield fail(what, detail, look.attach_with_present_columns(source))


def check_triggers(look: Look, source: Source) -> Iterator[Finding]:
    """Each change of the table is recorded: the triggers exist and always fire."""
    if source.table is None:
        return
    what = f"triggers of {source.name}"
    rows = look.rows("read_missing_triggers", [source.id])
    said = {"not always": "does not fire under session_replication_role = replica"}
    problems = [
        f"{trigger} on {relation} {said.get(problem, f'is {problem}')}"
        for relation, trigger, problem in rows
    ]
    if problems:
        shown = ", ".join(problems[:8]) + (
            f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        # Attaching again also reads the table again: changes without triggers were not recorded.
        yield fail(what, f"{shown}: changes are missed", look.attach_command(source))
    else:
        yield ok(what, "all there, and always enabled")
    workers = [name for (name,) in look.rows("read_apply_workers", [source.oid])]
    if workers:
        detail = (
            f"an apply worker on this server ({', '.join(workers)}) fires row triggers only: its "
            "writes here are missed"
        )
        yield warn(
            what, detail, f"if it writes this table: {look.attach_command(source)} --row-triggers"
        )


def check_key(look: Look, source: Source) -> Iterator[Finding]:
    """The key is unique and never NULL."""
    if source.table is None:
        return
    what, table = f"key of {source.name}", source.identifier.as_string()
    columns = ", ".join(sql.Identifier(name).as_string() for name in source.key)
    unique, nullable, gone = look.row("read_key", {"source": source.oid, "key": source.key})
    if gone:  # check_columns names the command
        return
    for name in nullable:
        column = sql.Identifier(name).as_string()
        yield fail(
            what,
            f"key column {name} may be NULL",
            f"ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL;",
        )
    if not unique:
        detail = (
            f"no unique index on ({columns}): two rows with one key would take turns in the index"
        )
        yield fail(what, detail, f"CREATE UNIQUE INDEX ON {table} ({columns});")
    if unique and not nullable:
        yield ok(what, f"unique on ({columns})")


def check_live(look: Look, source: Source) -> Iterator[Finding]:
    """At least one row of the table is live."""
    if source.table is None:
        return
    query = filled(
        "check",
        "has_rows",
        source=source.rows_from,
        live=raw(source.live),
        vector=sql.Identifier(source.vector),
    )
    has_rows, has_live_rows = look.source_rows(query)[0]
    if has_rows and not has_live_rows:
        rule = look.arguments.get(source.id, {}).get("live", source.live)
        yield warn(
            f"live rows of {source.name}",
            f"none of the table's rows is live: the rule is {rule} and {source.vector} IS NOT NULL",
            f"fill {source.vector}, or give another rule: syncd attach {source.name} --live '...'",
        )


def check_dimensions(look: Look, source: Source) -> Iterator[Finding]:
    """Each dataset has one dimension, and it is the dimension of most of its rows."""
    if source.table is None:
        return
    what = f"dimensions of {source.name}"
    if source.dimension is not None:
        yield ok(what, f"{source.dimension}, as declared")
        return
    seen = sampled_lengths(look, source)
    if seen:
        look.dimensions[source.id] = max(
            lengths[0] for each in seen.values() for lengths in each[:1]
        )
    indexed = {row.dataset: row.dim for row in look.service.datasets if row.source == source.name}
    found = [
        *mixed_lengths(what, seen),
        *(
            each
            for name, lengths in seen.items()
            for each in wrong_dimension(what, name, indexed.get(name), lengths)
        ),
    ]
    yield from found
    if not found:
        dimensions = sorted({lengths[0][0] for lengths in seen.values()})
        shown = ", ".join(map(str, dimensions[:5])) + (", ..." if len(dimensions) > 5 else "")
        yield ok(what, f"{shown}, none declared" if shown else "none declared, and no live row yet")


def sampled_lengths(look: Look, source: Source) -> dict[str, list[tuple[int, int]]]:
    """Lengths of sampled live vectors by dataset: (length, rows), the most frequent first."""
    of = {"real[]": "array", "double precision[]": "array", "bytea": "bytes"}.get(
        source.vector_type, "text"
    )
    vector = sql.Identifier(source.vector)
    query = filled(
        "check",
        "sample_dimensions",
        project=raw(source.project),
        dataset=raw(source.dataset),
        dimension=filled("check", f"dimension_of_{of}", vector=vector),
        source=source.rows_from,
        live=raw(source.live),
        vector=vector,
    )
    seen: dict[str, list[tuple[int, int]]] = {}
    for project, dataset, dimension, count in look.source_rows(query):
        if project is not None and dataset is not None and dimension:
            seen.setdefault(dataset_name(project, dataset), []).append((dimension, count))
    return seen


def mixed_lengths(what: str, seen: Mapping[str, Sequence[tuple[int, int]]]) -> Iterator[Finding]:
    """Datasets with vectors of several lengths: some of their rows are in quarantine."""
    for name, lengths in seen.items():
        if len(lengths) > 1:
            shares = ", ".join(f"{length} in {count} rows" for length, count in lengths[:4])
            detail = (
                f"dataset {name} has several lengths ({shares}, of those sampled); the fewer are "
                "quarantined"
            )
            yield warn(what, detail, f"syncd why {name}")


def wrong_dimension(
    what: str, name: str, indexed: int | None, lengths: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """A dataset whose index has another dimension than most of its rows."""
    if (
        indexed is not None
        and lengths
        and indexed not in [length for length, count in lengths if count == lengths[0][1]]
    ):
        detail = (
            f"dataset {name} is indexed with dimension {indexed}, most of its rows have "
            f"{lengths[0][0]}"
        )
        yield warn(what, detail, f"syncd rebuild {name}")


SOURCE_CHECKS: tuple[tuple[str, Callable[[Look, Source], Iterator[Finding]]], ...] = (
    ("table", check_table),
    ("rights on", check_rights),
    ("columns of", check_columns),
    ("triggers of", check_triggers),
    ("stray triggers of", check_stray_triggers),
    ("key of", check_key),
    ("live rows of", check_live),
    ("dimensions of", check_dimensions),
)
"""Each check of a source, with the first words of its lines."""

READING_CHECKS = frozenset({"columns of", "live rows of", "dimensions of"})
"""Checks that read rows: they are left out if another check explains why no row can be read."""
