"""A table's mark, which a pass compares instead of all facts of the catalogue."""

from __future__ import annotations

import psycopg

from syncd.postgres.batch import ask, named
from syncd.postgres.catalogue import Look, read_catalogues
from syncd.postgres.layout import read_sources
from syncd.postgres.outbox import array
from syncd.sync.consumer.taken import Taken

CHANGES = (
    "ALTER TABLE items RENAME COLUMN kind TO sort",
    "ALTER TABLE items RENAME COLUMN kind TO sort; ALTER TABLE items RENAME COLUMN sort TO kind",
    "ALTER TABLE items ALTER COLUMN kind TYPE varchar(50)",
    "ALTER TABLE items ALTER COLUMN v DROP NOT NULL",
    "ALTER TABLE items DROP COLUMN kind; ALTER TABLE items ADD COLUMN kind varchar(20)",
    "ALTER TABLE items DISABLE TRIGGER USER",
    "ALTER TABLE items DISABLE TRIGGER USER; ALTER TABLE items ENABLE ALWAYS TRIGGER {trigger}",
    "DROP TRIGGER {trigger} ON items",
    "ALTER TABLE items ENABLE ROW LEVEL SECURITY",
    "ALTER TABLE items FORCE ROW LEVEL SECURITY",
    "ALTER TABLE items SET UNLOGGED",
    "TRUNCATE items",
)
"""Changes of a table's facts: without a rewrite, if possible, and back to what it was."""


def test_each_change_of_a_tables_facts_changes_its_mark(db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[] NOT NULL, kind varchar(20))")
    db.execute("SELECT syncd.attach('items', live => $$kind <> 'x'$$)")
    (source,) = [each for each in read_sources(db) if each.table == "items"]

    def mark_and_facts() -> tuple[str, str]:
        (rows,) = ask(db, named("passes", "read_snapshot", "it", array([source.oid])))
        facts = read_catalogues(db, {source.id: Look("")})
        return Taken.parse(rows).marks[source.oid], facts[source.id].partition("\n")[0]

    before = mark_and_facts()
    for change in CHANGES:
        with db.transaction(force_rollback=True):
            db.execute(change.format(trigger=f"syncd_{source.id}_insert").encode())
            mark, facts = mark_and_facts()
            assert facts != before[1], f"this changes nothing: {change}"
            assert mark != before[0], change
        assert mark_and_facts() == before
