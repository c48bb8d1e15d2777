"""The watch over the catalogue: what was done to a source that no trigger tells of.

Invariant: the facts under a pass's snapshot are compared with those seen before, before any row is read under it. A difference puts the source in
doubt, which ends only when the whole table has been compared since. Doubt costs a comparison, never an answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

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
"""Between two whole looks at a source: at one that has no changes, and, if its rules name only its own
columns, at these rules and at the tools that may write past its triggers. A look costs 0.04 ms of
the server, a whole one 0.2 ms."""

LOOKS_AT_ONCE = 200
FEW_SOURCES = 8
"""Up to so many are looked at in every pass: 0.2 ms."""

COMPARE_SECONDS = 50.0
"""Between two comparisons while triggers do not record every write."""


def look(
    connection: psycopg.Connection,
    all_sources: Sequence[FollowedSource],
    locked: Sequence[FollowedSource],
    *,
    prepare: bool,
) -> bool:
    """Compare the facts under the transaction's snapshot with those seen before; whether the registry must be read anew.

    Of the sources whose rows this pass may read, all of them where they are few, and of the others some in turn.
    """
    now, anew = time.monotonic(), False
    late = sorted(
        (each for each in all_sources if each.catalogue.looked_at < now - LOOK_SECONDS),
        key=lambda each: each.catalogue.looked_at,
    )[:LOOKS_AT_ONCE]
    whole = {each.source.id for each in late}
    few = all_sources if len(all_sources) <= FEW_SOURCES else locked
    chosen = {each.source.id: each for each in (*few, *late)}
    if not chosen:
        return False
    looks = {
        number: Look(
            each.catalogue.seen,
            partitions=number in whole or each.catalogue.has_few_partitions,
            rules=number in whole or not each.catalogue.has_plain_rules,
        )
        for number, each in chosen.items()
    }
    found = read_catalogues(connection, looks, prepare=prepare)
    changed = {
        number: look._replace(partitions=True, rules=True)
        for number, look in looks.items()
        if not look.rules and number in found and found[number] != look.seen
    }
    if changed:
        found |= read_catalogues(connection, changed, prepare=False)
    for source_id, each in chosen.items():
        if source_id in whole:
            each.catalogue.looked_at = now
        text = found.get(source_id)
        if text is None:
            anew |= each.source.table is not None
            continue
        try:
            if text != each.catalogue.seen:
                anew |= take_note(connection, each, text)
            compare_while_weak(each, now)
        except psycopg.Error:
            raise
        except Exception as error:  # noqa: BLE001 - of this source: the others go on
            each.catalogue.seen = ""
            each.failed_unexpectedly(error, now=now)
    return anew


def take_note(connection: psycopg.Connection, each: FollowedSource, text: str) -> bool:
    """The facts are others than before: say so, and doubt what needs it. Returns whether the registry must be read anew."""
    catalogue, facts = each.catalogue, parse_catalogue(text)
    known, before = catalogue.seen, catalogue.facts
    catalogue.seen, catalogue.facts = text, facts
    weak = weakness(each.source, facts)
    catalogue.weakness = None
    if weak:
        catalogue.repair_at = 0.0
        catalogue.weakness = Trouble(
            weak, f"SELECT syncd.mend({sql_name(each.source)});", "run as the owner of the table"
        )
    each.retry_at = min(each.retry_at, time.monotonic())  # what failed may have been repaired
    catalogue.remember_at = math.inf if facts.remembered else 0.0
    if before is None:
        return False
    lost = gone(before, facts)
    names = read_names(connection, each.source, lost.values()) if lost else {}
    found = changes(before, facts, names)
    altered = [change.reason for change in found if change.doubt == "registry"]
    if altered:
        catalogue.renamed = {
            name: str(names[number]) for name, number in lost.items() if names.get(number)
        }
        catalogue.altered = ", ".join(altered)
        catalogue.before = catalogue.before or known
    catalogue.rewritten |= any(change.doubt == "rewritten" for change in found)
    if any(change.doubt == "mend" for change in found):
        catalogue.repair_at = 0.0
    strong = [change.reason for change in found if change.doubt in ("registry", "doubted", "mend")]
    weaker = [change.reason for change in found if change.doubt in ("rules", "believed")]
    if strong:
        each.doubt(f"{each.source.name}: {', '.join(strong)}")
    if weaker:
        each.doubt(f"{each.source.name}: {', '.join(weaker)}", believed=True)
    return any(change.doubt in ("registry", "rules") for change in found)


def compare_while_weak(each: FollowedSource, now: float) -> None:
    """While triggers do not record every write, compare every minute: then the index is right within one."""
    catalogue = each.catalogue
    if catalogue.weakness is None:
        return
    if each.scan is not None:
        catalogue.compare_at = now + COMPARE_SECONDS
    elif now >= catalogue.compare_at:
        catalogue.compare_at = now + COMPARE_SECONDS
        each.doubt(f"{each.source.name}: {catalogue.weakness}")


def explained(each: FollowedSource, error: psycopg.Error, role: str) -> Trouble:
    """Why reading a source failed, and what to do, from what the catalogue says."""
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
            f"ALTER ROLE {name} BYPASSRLS; or ALTER TABLE {source.identifier.as_string()} DISABLE ROW LEVEL SECURITY;",
        )
    return Trouble(first_line(error))


def trouble(each: FollowedSource) -> Trouble | None:
    """Why a source cannot be read as it is, and what to do; None if it can be read."""
    if not each.source.trouble:
        return None
    if each.source.table is None:
        return Trouble(each.source.trouble)
    return attach_again(
        each, f"{each.catalogue.altered or each.source.name}: {each.source.trouble}"
    )


def is_of_a_rule(error: psycopg.Error) -> bool:
    """Whether an expression of the source means nothing any more. Errors of a row's come here only where they occur without a row."""
    state = error.sqlstate or ""
    return is_of_a_row(error) or (
        state.startswith(("42", "3F")) and not isinstance(error, pg.InsufficientPrivilege)
    )


def attach_again(each: FollowedSource, reason: str, *, as_given: bool = False) -> Trouble:
    """A reason with the command that attaches the source with its present columns."""
    command = attach_command(each.source, each.catalogue.renamed, as_given=as_given)
    return Trouble(reason, command, "attach it again")
