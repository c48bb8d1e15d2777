"""A partitioned table with rows in each leaf, and the triggers that it should have."""

from __future__ import annotations

import psycopg

PARTED = """
CREATE TABLE parted (id int, lang text DEFAULT 'en', embedding real[], PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE high (embedding real[], gone int, id int NOT NULL, lang text);  -- its columns have other places
ALTER TABLE high DROP COLUMN gone;
CREATE TABLE deep PARTITION OF parted FOR VALUES FROM (100) TO (200) PARTITION BY RANGE (id);
CREATE TABLE deepest PARTITION OF deep FOR VALUES FROM (100) TO (150);
ALTER TABLE parted ATTACH PARTITION high FOR VALUES FROM (10) TO (20);
INSERT INTO parted (id, embedding) VALUES (1, '{1}'), (2, '{2}'), (11, '{11}'), (101, '{101}');
"""


def source_id(db: psycopg.Connection, source: str = "parted") -> int:
    """The number of an attached table, which is in the names of its triggers."""
    row = db.execute(
        "SELECT id FROM syncd.sources WHERE source = %s::regclass", [source]
    ).fetchone()
    assert row is not None
    return int(row[0])


def wrong(db: psycopg.Connection, source: str = "parted") -> list[tuple[str, str, str]]:
    """Table, event and problem of each trigger that is not what it should be."""
    return [
        (relation.removeprefix("public."), trigger.rpartition("_")[2], problem)
        for relation, trigger, problem in db.execute(
            "SELECT relation::text, trigger, problem FROM syncd.missing_triggers(%s)",
            [source_id(db, source)],
        ).fetchall()
    ]


def mend(db: psycopg.Connection, source: str = "parted") -> bool:
    """Whether there was something to mend."""
    row = db.execute("SELECT syncd.mend(%s)", [source]).fetchone()
    assert row is not None
    return bool(row[0])
