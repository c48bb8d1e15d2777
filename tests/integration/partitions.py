"""A partitioned table with rows in each leaf, and checks of its triggers."""

from __future__ import annotations

import psycopg

PARTED = """
CREATE TABLE parted (id int, lang text DEFAULT 'en', embedding real[], PRIMARY KEY (id))
    PARTITION BY RANGE (id);

CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE high (embedding real[], gone int, id int NOT NULL, lang text);  -- another order
ALTER TABLE high DROP COLUMN gone;
CREATE TABLE deep PARTITION OF parted FOR VALUES FROM (100) TO (200)
    PARTITION BY RANGE (id);

CREATE TABLE deepest PARTITION OF deep FOR VALUES FROM (100) TO (150);
ALTER TABLE parted ATTACH PARTITION high FOR VALUES FROM (10) TO (20);
INSERT INTO parted (id, embedding) VALUES (1, '{1}'), (2, '{2}'), (11, '{11}'), (101, '{101}');
"""


def source_id(db: psycopg.Connection, source: str = "parted") -> int:
    """Number of an attached table; the names of its triggers contain it."""
    row = db.execute(
        "SELECT id FROM syncd.sources WHERE source = %s::regclass", [source]
    ).fetchone()
    assert row is not None
    return int(row[0])


def wrong(db: psycopg.Connection, source: str = "parted") -> list[tuple[str, str, str]]:
    """Table, event and problem of each wrong trigger."""
    return [
        (relation.removeprefix("public."), trigger.rpartition("_")[2], problem)
        for relation, trigger, problem in db.execute(
            "SELECT relation::text, trigger, problem FROM syncd.missing_triggers(%s)",
            [source_id(db, source)],
        ).fetchall()
    ]


def mend(db: psycopg.Connection, source: str = "parted") -> bool:
    """Run ``syncd.mend``; whether it changed a trigger."""
    row = db.execute("SELECT syncd.mend(%s)", [source]).fetchone()
    assert row is not None
    return bool(row[0])
