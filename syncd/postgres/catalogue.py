"""Facts of the server's catalogue about a source, and the meaning of a difference.

Triggers record each change that they see. Other changes leave a trace in the catalogue: a rewritten
table, a column with another type or number, a trigger that is or was disabled, a partition that was
attached or detached. The facts are compared under a pass's own snapshot, before it reads rows.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import psycopg
from psycopg import sql

from syncd.postgres.batch import Query, ask, named
from syncd.postgres.source import Source
from syncd.statements import number_list, statement

EVENTS = ("insert", "update", "delete", "truncate")
EVENTS_PER_ROW = ("row", "truncate")
ALWAYS = "A"
SWITCHED = {
    "D": "was disabled",
    "O": "fires no longer on every write (ENABLE ALWAYS)",
    "R": "fires on replicas only",
}

QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""")
"""A constant, or a name in quotes, as PostgreSQL prints it."""

OF_A_NAME = re.compile(r"(?<![0-9])\.|\.(?![0-9])|::reg")
"""A dot that does not belong to a number, or a constant that names an object, such as a regclass.

PostgreSQL prints every name with its schema, except those of its own and those of columns.
"""

Doubt = Literal["registry", "rules", "rewritten", "believed", "doubted", "repair"]
"""Consequence of a change.

``registry``: the attachments are read again. ``rules``: the same, and a later comparison.
``rewritten``: rows were moved; a truncation explains it. ``believed``: a later comparison.
``doubted``: a comparison at once. ``repair``: the same, and a check of the triggers.
"""


class Leaves(msgspec.Struct, frozen=True):
    """The partitions that hold rows, as digests."""

    count: int
    members: str | None
    files: str | None
    row_security: str | None
    triggers: str | None
    always: bool
    unlogged: bool = False


class Catalogue(msgspec.Struct, frozen=True):
    """The facts of one source.

    ``columns``: number, type, modifier, xmin, whether generated. ``triggers``: oid, xmin, when it
    fires. ``rules``: project, dataset and live. ``functions``: xmin of each function that they
    call. ``labels``: the values of enum types. ``remembered``: whether the schema also holds the
    present names. A checkpoint of an older version lacks the facts with a default.
    """

    kind: str
    file: int
    persistence: str
    row_security: tuple[bool, bool]
    per_row: bool
    columns: dict[str, tuple[int, int, int, int, str]] | None
    triggers: dict[str, tuple[int, int, str]] | None
    rules: tuple[str, str, str] | None = None
    functions: dict[int, int] | None = None
    labels: dict[int, str] | None = None
    send: str | None = None
    remembered: bool = True
    leaves: Leaves | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the rules name only columns and PostgreSQL's own objects.

        Then no other renamed or replaced object changes their meaning.
        """
        if self.rules is None or self.functions or self.labels:
            return False
        return not any(OF_A_NAME.search(QUOTED.sub("x", rule)) for rule in self.rules)

    @property
    def unlogged(self) -> bool:
        """Whether a crash of the server empties the table, or a part of it."""
        return self.persistence == "u" or (self.leaves is not None and self.leaves.unlogged)


@dataclass(frozen=True, slots=True)
class Change:
    """A difference in words, and its consequence."""

    reason: str
    doubt: Doubt


def parse_catalogue(text: str) -> Catalogue:
    """The facts from a text of ``read_catalogues``.

    The rules' line is missing in a checkpoint of version 0.1.0, which had them in the first.
    """
    table, _, more = text.partition("\n")
    leaves, _, rules = more.partition("\n")
    joined = f"{table[:-1]}, {rules[1:]}" if rules else table
    facts = msgspec.json.decode(joined, type=Catalogue)
    if not leaves:
        return facts
    return msgspec.structs.replace(facts, leaves=msgspec.json.decode(leaves, type=Leaves))


class Look(NamedTuple):
    """The parts of one source's facts that are to be read."""

    seen: str
    """The facts of the last read: the parts that are not read again come from it."""
    table: bool = True
    partitions: bool = True
    rules: bool = True


def read_catalogues(connection: psycopg.Connection, looks: Mapping[int, Look]) -> dict[int, str]:
    """The present facts of sources by id, as text that compares.

    A source whose table was dropped has none.
    """
    wanted = questions(looks)
    return told_catalogues(looks, dict(zip(wanted, ask(connection, *wanted.values()), strict=True)))


def questions(looks: Mapping[int, Look]) -> dict[str, Query]:
    """The statements that read the facts, by name, without those that are not needed."""
    wanted = {
        "read_catalogue": [number for number, look in looks.items() if look.table],
        "read_partition_facts": [number for number, look in looks.items() if look.partitions],
        "read_rule_facts": [number for number, look in looks.items() if look.rules],
    }
    return {
        name: named("catalogue", name, f"{{{number_list(ids)}}}")
        for name, ids in wanted.items()
        if ids
    }


def told_catalogues(
    looks: Mapping[int, Look], answers: Mapping[str, Sequence[Sequence[Any]]]
) -> dict[int, str]:
    """The facts from the answers to ``questions``.

    A source of which the table's facts were not read has the last ones.
    """
    facts = {name: {row[0]: row[1] for row in rows} for name, rows in answers.items()}
    tables = facts.get("read_catalogue", {})
    partitions, rules = facts.get("read_partition_facts", {}), facts.get("read_rule_facts", {})
    found = {}
    for number, look in looks.items():
        if not any(look[1:]):
            found[number] = look.seen
            continue
        seen_table, seen_partitions, seen_rules, *_ = [*look.seen.split("\n"), "", "", ""]
        if look.table and number not in tables:
            continue
        found[number] = "\n".join(
            (
                tables[number] if look.table else seen_table,
                partitions.get(number, "") if look.partitions else seen_partitions,
                rules.get(number, "") if look.rules else seen_rules,
            )
        )
    return found


def read_names(
    connection: psycopg.Connection, source: Source, numbers: Iterable[int]
) -> dict[int, str | None]:
    """Present names of columns by number; None for a dropped column."""
    parameters = [source.oid, list(numbers)]
    rows = connection.execute(
        statement("catalogue", "read_column_names"), parameters, prepare=False
    ).fetchall()
    return dict(rows)


def gone(before: Catalogue, after: Catalogue) -> dict[str, int]:
    """Columns that no longer exist under their names, with their numbers."""
    now = after.columns or {}
    return {name: facts[0] for name, facts in (before.columns or {}).items() if name not in now}


def changes(before: Catalogue, after: Catalogue, renamed: Mapping[int, str | None]) -> list[Change]:
    """All differences. ``renamed`` has the present names of the columns that are ``gone``."""
    found = [
        *column_changes(before, after, renamed),
        *rule_changes(before, after),
        *trigger_changes(before, after),
        *leaf_changes(before, after),
    ]
    if before.file != after.file:
        found.append(Change("the table was rewritten", "rewritten"))
    if before.persistence != after.persistence:
        said = (
            "was made unlogged: a crash of the server empties it"
            if after.persistence == "u"
            else "was made logged"
        )
        found.append(Change(f"the table {said}", "believed"))
    if before.row_security != after.row_security:
        found.append(
            Change(
                f"row-level security was switched {'on' if after.row_security[0] else 'off'}",
                "believed",
            )
        )
    if before.per_row != after.per_row:
        said = "is written past its statement triggers now (a subscription, or a partition)"
        found.append(
            Change(
                f"the table {said}"
                if after.per_row
                else "the table needs no row triggers any more",
                "repair",
            )
        )
    return found


def column_changes(
    before: Catalogue, after: Catalogue, renamed: Mapping[int, str | None]
) -> list[Change]:
    """Differences in the columns that the source uses."""
    old, new = before.columns or {}, after.columns or {}
    found = []
    for name, facts in old.items():
        now = new.get(name)
        if now == facts:
            continue
        if now is None:
            other = renamed.get(facts[0])
            found.append(
                Change(
                    f"column {name} was " + (f"renamed to {other}" if other else "dropped"),
                    "registry",
                )
            )
        elif now[0] != facts[0]:
            found.append(Change(f"column {name} is another column now", "registry"))
        elif now[1:3] != facts[1:3]:
            found.append(Change(f"column {name} was given another type", "registry"))
        else:
            # A default or a privilege changed. The values changed too if the table was rewritten
            # or if the column is computed at each read.
            values = before.file != after.file or after.kind == "p" or "v" in (facts[4], now[4])
            found.append(Change(f"column {name} was altered", "doubted" if values else "believed"))
    found += [
        Change(f"there is a column {name} now", "registry") for name in new.keys() - old.keys()
    ]
    return found


def rule_changes(before: Catalogue, after: Catalogue) -> list[Change]:
    """Differences in the objects that the rules name; none with an older version's checkpoint."""
    if before.rules is None or after.rules is None:
        return []
    found = [
        Change(f"the {role} expression is {now} now", "rules")
        for role, was, now in zip(
            ("project", "dataset", "live"), before.rules, after.rules, strict=True
        )
        if was != now
    ]
    if before.send is not None and after.send is not None and before.send != after.send:
        found.append(Change(f"the vector is sent by {after.send} now", "rules"))
    if (before.functions or {}) != (after.functions or {}):
        found.append(Change("a function of its rules was altered", "doubted"))
    labels = after.labels or {}
    for number, label in (before.labels or {}).items():
        if labels.get(number, label) != label:
            found.append(Change(f"enum value {label} was renamed to {labels[number]}", "doubted"))
    return found


def trigger_changes(before: Catalogue, after: Catalogue) -> list[Change]:
    """Differences in the triggers of the table itself.

    Writes while a trigger was disabled are missing in the outbox, even if it is enabled again now.
    """
    old, new = before.triggers or {}, after.triggers or {}
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if now == was:
            continue
        if now is None:
            said = "was dropped"
        elif was is None:
            said = "was created"
        elif now[2] != was[2]:
            said = "was enabled again" if now[2] == ALWAYS else SWITCHED.get(now[2], "was altered")
        else:
            said = "was created again" if now[0] != was[0] else "was altered"
        found.append(Change(f"trigger {name} {said}", "repair"))
    return found


def leaf_changes(before: Catalogue, after: Catalogue) -> list[Change]:
    """Differences in the partitions."""
    old, new = before.leaves, after.leaves
    if old == new:
        return []
    if old is None or new is None or old.members != new.members:
        return [Change("partitions were attached or detached", "repair")]
    if (old.triggers, old.always) != (new.triggers, new.always):
        return [Change("triggers of partitions were altered", "repair")]
    if old.files != new.files:
        # It may have been truncated while its trigger did not fire.
        return [Change("a partition was rewritten", "doubted")]
    return [Change("row-level security of a partition was switched", "believed")]


def weakness(source: Source, facts: Catalogue) -> str:
    """Triggers that do not record every write, in words; empty if all do."""
    triggers = facts.triggers or {}
    weak = [
        f"trigger {name} {'is disabled' if fires == 'D' else 'does not fire on every write'}"
        for name, (_, _, fires) in triggers.items()
        if fires != ALWAYS
    ]
    names = [
        f"syncd_{source.id}_{event}" for event in (EVENTS_PER_ROW if facts.per_row else EVENTS)
    ]
    weak += [f"trigger {name} is missing" for name in names if name not in triggers]
    if facts.leaves is not None and not facts.leaves.always:
        weak.append("triggers of partitions do not fire on every write")
    return ", ".join(weak)


def sql_name(source: Source) -> str:
    """The table's name as a literal of SQL."""
    parts = [
        part if re.fullmatch("[a-z_][a-z0-9_]*", part) else f'"{part}"'
        for part in (source.schema, source.table)
        if part
    ]
    return sql.Literal(".".join(parts)).as_string(None)


def attach_command(source: Source, renamed: Mapping[str, str], *, as_given: bool = False) -> str:
    """The command that attaches a source again, with the present names of its columns.

    A dropped column stays in it, unless it was a column to filter on. ``as_given`` takes the
    expressions as the user wrote them, for compiled expressions that are no longer valid.
    """
    pattern = re.compile(
        "|".join(rf"(?<![\w\"']){re.escape(name)}(?![\w\"'])" for name in renamed) or r"(?!)"
    )

    def present(text: str) -> str:
        return pattern.sub(lambda match: renamed[match.group()], text)

    words = ["syncd", "attach", source.name]
    columns = [name for name in source.columns if name in renamed or name not in source.dropped]
    for option, names in (
        ("--key", source.key),
        ("--vector", [source.vector]),
        ("--column", columns),
    ):
        for name in names:
            words += [option, renamed.get(name, name)]
    defaults = {
        "--project": "('default'::text)",
        "--dataset": f"({sql.Literal(source.table).as_string()}::text)",
        "--live": "(true)",
    }
    rules = {"--project": source.project, "--dataset": source.dataset, "--live": source.live}
    if as_given:
        rules = {option: source.arguments.get(option[2:], rule) for option, rule in rules.items()}
        defaults = {
            "--project": "'default'",
            "--dataset": sql.Literal(source.table).as_string(),
            "--live": "true",
        }
    for option, expression in rules.items():
        if expression != defaults[option]:
            words += [option, present(expression)]
    words += ["--metric", source.metric] if source.metric != "cosine" else []
    return shell_line(
        [*words, *(["--row-triggers"] if source.arguments.get("row_triggers") else [])]
    )


def shell_line(words: Iterable[str]) -> str:
    """A command for a shell with few quotes: a word with SQL's single quotes gets double quotes."""
    return " ".join(
        f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word)
        for word in words
    )
