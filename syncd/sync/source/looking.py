"""The look at the catalogue: it finds changes of a source that no trigger records.

Invariant: before a pass reads rows, the facts under its snapshot are compared with the facts seen
before. A difference is a doubt, which ends only when the whole table has been compared. A doubt
costs a comparison; the datasets answer meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import Trouble
from syncd.postgres.catalogue import (
    Look,
    attach_command,
    changes,
    gone,
    parse_catalogue,
    read_catalogues,
    read_names,
    sql_name,
    weakness,
)
from syncd.postgres.connection import first_line
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.reading import is_of_a_row

LOOK_SECONDS = 3.0
"""Time between two whole looks at a source.

Meanwhile, if there are many sources, one without changes gets no look. A look compares the table's
mark, and reads the facts only if it is another one. If a source's rules name only its own columns,
a look leaves out these rules, and the tools that may write past its triggers.
"""
LOOKS_AT_ONCE = 200
"""Largest number of sources that get a whole look in one pass."""
FEW_SOURCES = 8
"""Up to this many sources, each pass looks at all of them (0.2 ms)."""
COMPARE_SECONDS = 50.0
"""Time between two comparisons while triggers do not record every write."""


@dataclass(frozen=True, slots=True)
class Looks:
    """The sources that a pass looks at, and how."""

    now: float
    chosen: dict[int, FollowedSource]
    whole: set[int]
    """Ids of the sources that get a whole look."""
    looks: dict[int, Look]

    @property
    def oids(self) -> list[int]:
        """The oids of their tables."""
        return [each.source.oid for each in self.chosen.values()]


def choose_looks(
    all_sources: Sequence[FollowedSource],
    locked: Sequence[FollowedSource],
    *,
    later: bool = False,
) -> Looks:
    """The sources to look at.

    If there are few sources, they are all. Otherwise they are the locked ones, whose rows this pass
    may read, and some of the others in turn. ``later``: whole looks can wait for the next pass,
    which follows at once.
    """
    now = time.monotonic()
    seconds = LOOK_SECONDS * 2 if later else LOOK_SECONDS
    late = sorted(
        (each for each in all_sources if each.catalogue.looked_at < now - seconds),
        key=lambda each: each.catalogue.looked_at,
    )[:LOOKS_AT_ONCE]
    whole = {each.source.id for each in late}
    few = all_sources if len(all_sources) <= FEW_SOURCES else locked
    chosen = {each.source.id: each for each in (*few, *late)}
    looks = {
        number: Look(
            each.catalogue.seen,
            table=number in whole or not each.catalogue.mark,
            partitions=number in whole or each.catalogue.has_few_partitions,
            rules=number in whole or not each.catalogue.has_plain_rules,
        )
        for number, each in chosen.items()
    }
    return Looks(now, chosen, whole, looks)


def is_late(all_sources: Sequence[FollowedSource]) -> bool:
    """Whether a whole look at a source is due."""
    due = time.monotonic() - LOOK_SECONDS
    return any(each.catalogue.looked_at < due for each in all_sources)


def look(
    connection: psycopg.Connection, at: Looks, found: dict[int, str], marks: Mapping[int, str]
) -> bool:
    """Compare the facts ``found`` under the transaction's snapshot with the facts seen before.

    ``marks`` are those of the tables, by oid. Returns whether the registry must be read again.
    """
    now, read_again = at.now, False
    changed = {
        number: Look(look.seen)
        for number, look in at.looks.items()
        if not all(look[1:]) and is_other(at.chosen[number], found.get(number), marks)
    }
    if changed:
        found = found | read_catalogues(connection, changed)
    for source_id, each in at.chosen.items():
        if source_id in at.whole:
            each.catalogue.looked_at = now
        text, mark = found.get(source_id), marks.get(each.source.oid)
        if text is None or mark is None:
            read_again |= each.source.table is not None
            continue
        try:
            if text != each.catalogue.seen:
                read_again |= take_note(connection, each, text)
            each.catalogue.mark = mark
            compare_while_weak(each, now)
        except psycopg.Error:
            raise
        except Exception as error:  # noqa: BLE001 - it fails this source; the others go on
            each.catalogue.seen = each.catalogue.mark = ""
            each.failed_unexpectedly(error, now=now)
    return read_again


def is_other(each: FollowedSource, text: str | None, marks: Mapping[int, str]) -> bool:
    """Whether a source's facts may differ from those seen before: a part does, or its mark."""
    mark, known = marks.get(each.source.oid), each.catalogue
    if text is None or mark is None:
        return False
    return text != known.seen or known.mark not in ("", mark)


def take_note(connection: psycopg.Connection, each: FollowedSource, text: str) -> bool:
    """Note changed facts, and the doubts that follow from them.

    Returns whether the registry must be read again.
    """
    catalogue, facts = each.catalogue, parse_catalogue(text)
    known, before = catalogue.seen, catalogue.facts
    lost = {} if before is None else gone(before, facts)
    names = read_names(connection, each.source, lost.values()) if lost else {}
    catalogue.seen, catalogue.facts = text, facts
    weak = weakness(each.source, facts)
    catalogue.weakness = None
    if weak:
        catalogue.repair_at = 0.0
        catalogue.weakness = Trouble(
            weak, f"SELECT syncd.mend({sql_name(each.source)});", "run as the owner of the table"
        )
    each.retry_at = min(each.retry_at, time.monotonic())  # the failure may have been repaired
    catalogue.remember_at = math.inf if facts.remembered else 0.0
    if before is None:
        return False
    found = changes(before, facts, names)
    altered = [change.reason for change in found if change.doubt == "registry"]
    if altered:
        catalogue.renamed = {
            name: str(names[number]) for name, number in lost.items() if names.get(number)
        }
        catalogue.altered = ", ".join(altered)
        catalogue.before = catalogue.before or known
    catalogue.rewritten |= any(change.doubt == "rewritten" for change in found)
    if any(change.doubt == "repair" for change in found):
        catalogue.repair_at = 0.0
    strong = [
        change.reason for change in found if change.doubt in ("registry", "doubted", "repair")
    ]
    weaker = [change.reason for change in found if change.doubt in ("rules", "believed")]
    if strong:
        each.doubt(f"{each.source.name}: {', '.join(strong)}")
    if weaker:
        each.doubt(f"{each.source.name}: {', '.join(weaker)}", believed=True)
    return any(change.doubt in ("registry", "rules") for change in found)


def compare_while_weak(each: FollowedSource, now: float) -> None:
    """Compare every minute while triggers do not record every write.

    So the index is right within a minute.
    """
    catalogue = each.catalogue
    if catalogue.weakness is None:
        return
    if each.scan is not None:
        catalogue.compare_at = now + COMPARE_SECONDS
    elif now >= catalogue.compare_at:
        catalogue.compare_at = now + COMPARE_SECONDS
        each.doubt(f"{each.source.name}: {catalogue.weakness}")


def explained(each: FollowedSource, error: psycopg.Error, role: str) -> Trouble:
    """Reason why reading a source failed, with the fix, from the facts of its catalogue."""
    catalogue, source = each.catalogue, each.source
    if is_of_a_rule(error):
        message = error.diag.message_primary or first_line(error)
        if error.diag.context:  # inside a function of the user's
            message += f" ({error.diag.context.splitlines()[0]})"
        by_name = isinstance(error, pg.UndefinedColumn | pg.DatatypeMismatch) or bool(
            catalogue.altered
        )
        return attach_again(
            each, f"{catalogue.altered or source.name}: {message}", as_given=not by_name
        )
    hidden = catalogue.facts is not None and (catalogue.facts.row_security[0] or catalogue.leaves)
    if isinstance(error, pg.InsufficientPrivilege) and hidden:
        name = sql.Identifier(role).as_string()
        return Trouble(
            f"row-level security would hide rows of {source.name} from role {name}",
            f"ALTER ROLE {name} BYPASSRLS; "
            f"or ALTER TABLE {source.identifier.as_string()} DISABLE ROW LEVEL SECURITY;",
        )
    return Trouble(first_line(error))


def trouble(each: FollowedSource) -> Trouble | None:
    """Reason why a source cannot be read as it is, with the fix; None if it can be read."""
    if not each.source.trouble:
        return None
    if each.source.table is None:
        return Trouble(each.source.trouble)
    return attach_again(
        each, f"{each.catalogue.altered or each.source.name}: {each.source.trouble}"
    )


def is_of_a_rule(error: psycopg.Error) -> bool:
    """Whether an expression of the source is no longer valid.

    An error that a row can cause gets here only if it occurs without a row.
    """
    state = error.sqlstate or ""
    return is_of_a_row(error) or (
        state.startswith(("42", "3F")) and not isinstance(error, pg.InsufficientPrivilege)
    )


def attach_again(each: FollowedSource, reason: str, *, as_given: bool = False) -> Trouble:
    """A reason with the command that attaches the source with its present columns."""
    command = attach_command(each.source, each.catalogue.renamed, as_given=as_given)
    return Trouble(reason, command, "attach it again")
