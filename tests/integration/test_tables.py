"""Kinds of tables: inheritance children, sources that become partitions, generated columns,
pgvector off the search path.
"""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import has_pgvector
from tests.daemon import Daemon
from tests.integration.captured import keys, outbox
from tests.integration.partitions import PARTED, mend, wrong
from tests.integration.sources import ROW_FORM, STATEMENT_FORM, attach, events, refused
from tests.servers import PostgresServer

# Tables that inherit, and that become partitions


def test_an_inheritance_child_is_captured_when_its_parent_is_written(
    scratch: psycopg.Connection,
) -> None:
    """A write to the parent changes the child's rows, but fires the parent's statement triggers."""
    scratch.execute(
        "CREATE TABLE parent (id int, n int, embedding real[]); CREATE TABLE child (PRIMARY KEY "
        "(id)) INHERITS (parent)"
    )
    scratch.execute("INSERT INTO child VALUES (1), (2)")
    attach(scratch, "child")
    assert events(scratch, "child") == ROW_FORM
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("UPDATE parent SET n = 1 WHERE id = 1")
    scratch.execute("DELETE FROM parent WHERE id = 2")
    scratch.execute("TRUNCATE parent")
    assert outbox(scratch) == [*keys(1, 2), ("t", None)]


def test_rows_of_a_child_made_later_are_not_the_sources(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')"
    )
    attach(db, "items", metric="l2")
    db.execute("CREATE TABLE child () INHERITS (items); INSERT INTO child VALUES (2, '{2}')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("items")) == [1]
        db.execute("UPDATE items SET v = '{3}'")  # the child's rows too
        assert [hit.key for hit in client.search("items", [0], consistency="strong")] == [1]
    daemon.stop()


def test_mend_switches_a_table_that_begins_to_inherit(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE parent (id int NOT NULL, embedding real[]); CREATE TABLE child (id int "
        "PRIMARY KEY, embedding real[])"
    )
    attach(scratch, "child")
    assert events(scratch, "child") == STATEMENT_FORM
    scratch.execute("ALTER TABLE child INHERIT parent")
    assert ("child", "row", "missing") in wrong(scratch, "child")
    assert mend(scratch, "child")
    assert events(scratch, "child") == ROW_FORM
    assert wrong(scratch, "child") == []
    scratch.execute("ALTER TABLE child NO INHERIT parent")
    assert mend(scratch, "child")
    assert events(scratch, "child") == STATEMENT_FORM
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO child VALUES (1)")
    assert outbox(scratch) == keys(1)


def test_mend_switches_a_source_that_becomes_a_partition(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(scratch, "items")
    scratch.execute(
        "CREATE TABLE whole (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)"
    )
    scratch.execute("ALTER TABLE whole ATTACH PARTITION items FOR VALUES FROM (0) TO (10)")
    assert mend(scratch, "items")
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO whole VALUES (1)")
    scratch.execute("TRUNCATE whole")
    assert outbox(scratch) == [*keys(1), ("t", None)]


def test_a_partition_attached_already_does_not_keep_its_table_from_being_attached(
    scratch: psycopg.Connection,
) -> None:
    """Then both are sources, each with its own triggers."""
    scratch.execute(PARTED)
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    attach(scratch, "items")
    scratch.execute("ALTER TABLE parted ATTACH PARTITION items FOR VALUES FROM (20) TO (30)")
    mend(scratch, "items")
    attach(scratch, "parted")
    assert wrong(scratch) == wrong(scratch, "items") == []
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO parted VALUES (21)")
    assert outbox(scratch) == keys(21, 21)


# Generated columns


def test_a_stored_generated_column_may_be_the_key_the_vector_and_in_every_rule(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (n int, id bigint GENERATED ALWAYS AS (n * 10) STORED PRIMARY KEY, "
        "lang text,"
        " d text GENERATED ALWAYS AS (lower(lang)) STORED, gone boolean GENERATED ALWAYS AS (n < "
        "0) STORED,"
        " v real[] GENERATED ALWAYS AS (ARRAY[n, 1]) STORED)"
    )
    db.execute(
        "INSERT INTO items VALUES (1, DEFAULT, 'DE'), (2, DEFAULT, 'EN'), (-3, DEFAULT, 'DE')"
    )
    assert attach(db, "items", vector="v", dataset="d", live="NOT gone", metric="l2") == (3, 2, 2)
    daemon.start()
    with daemon.client() as client:
        db.execute("UPDATE items SET n = 5 WHERE n = 1")
        db.execute("INSERT INTO items (n, lang) VALUES (7, 'De'), (-7, 'De')")
        assert [hit.key for hit in client.search("de", [0, 1], consistency="strong")] == [50, 70]
    daemon.stop()


def test_virtual_generated_columns_can_be_everything_but_the_key(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, n int, lang text, d text GENERATED ALWAYS AS "
        "(lower(lang)) VIRTUAL,"
        " gone boolean GENERATED ALWAYS AS (n < 0) VIRTUAL, twice bigint NOT NULL GENERATED ALWAYS "
        "AS (id * 2) VIRTUAL,"
        " v real[] GENERATED ALWAYS AS (ARRAY[n, 1]) VIRTUAL)"
    )
    db.execute("INSERT INTO items VALUES (1, 1, 'DE'), (2, 2, 'EN'), (3, -3, 'DE')")
    with refused(
        db, "key column twice of table public.items is a virtual generated column", "STORED"
    ):
        attach(db, "items", key=["twice"])
    assert attach(
        db, "items", vector="v", dataset="d", live="NOT gone", metric="l2", columns=["d"]
    ) == (3, 2, 2)
    daemon.start()
    with daemon.client() as client:
        db.execute("UPDATE items SET n = 5 WHERE id = 1")
        db.execute("INSERT INTO items VALUES (7, 7, 'De'), (8, -7, 'De')")
        hits = client.search("de", [0, 1], consistency="strong")
        assert [(hit.key, hit.distance) for hit in hits] == [(1, 5.0), (7, 7.0)]
        db.execute("UPDATE items SET n = -1 WHERE id = 7")
        assert [hit.key for hit in client.search("de", [0, 1], consistency="strong")] == [1]
    daemon.stop()


# Search paths


def test_vectors_of_a_pgvector_off_the_search_path_are_followed(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute('CREATE SCHEMA "Ext \'s"; ALTER EXTENSION vector SET SCHEMA "Ext \'s"')
    db.execute('CREATE SCHEMA "My ""App"""')
    db.execute(
        'CREATE TABLE "My ""App"""."Items" ("Id" int, part int, embedding "Ext \'s".vector(2), h '
        '"Ext \'s".halfvec(2),'
        ' PRIMARY KEY (part, "Id")) PARTITION BY LIST (part);'
        'CREATE TABLE "My ""App"""."Items 1" PARTITION OF "My ""App"""."Items" FOR VALUES IN (1)'
    )
    db.execute('INSERT INTO "My ""App"""."Items" VALUES (1, 1, \'[1,0]\', \'[1,0]\')')
    source = '"My ""App"""."Items"'
    assert attach(
        db,
        source,
        vector="embedding",
        live='embedding IS DISTINCT FROM NULL AND "Id" > 0',
        metric="l2",
    ) == (
        1,
        1,
        1,
    )
    daemon.start()
    with daemon.client() as client:
        db.execute('INSERT INTO "My ""App"""."Items 1" VALUES (2, 1, \'[3,0]\', NULL)')
        hits = client.search("Items", [0, 0], consistency="strong")
        assert [(hit.key, hit.distance) for hit in hits] == [((1, 1), 1.0), ((1, 2), 3.0)]
    daemon.stop()
    assert db.execute("SELECT syncd.detach(%s)", [source]).fetchone() == (True,)


def test_a_writer_needs_neither_pgvector_nor_syncd_on_its_search_path(
    scratch: psycopg.Connection, any_server: PostgresServer
) -> None:
    if not has_pgvector(any_server.version):
        pytest.skip("no pgvector here")
    scratch.execute("CREATE SCHEMA ext; ALTER EXTENSION vector SET SCHEMA ext")
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding ext.vector)")
    attach(scratch, "items")
    scratch.execute("TRUNCATE syncd.outbox; SET search_path = ''")
    scratch.execute(
        "INSERT INTO public.items VALUES (1, '[1]'); UPDATE public.items SET embedding = '[2,3]'"
    )
    assert outbox(scratch) == keys(1, 1)
