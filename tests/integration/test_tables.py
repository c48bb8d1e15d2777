"""Kinds of tables and keys: subscribers' tables, inheritance children, composite keys, generated columns, pgvector off the search path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd.postgres import schema
from tests.conftest import has_pgvector, prepare
from tests.daemon import Daemon
from tests.integration.captured import Entry, keys, outbox
from tests.integration.partitions import PARTED, mend, wrong
from tests.integration.sources import ROW_FORM, STATEMENT_FORM, attach, connected_as, events, refused, role
from tests.servers import VERSIONS, PostgresServer, available

A, B = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


# Composite keys


@pytest.fixture(params=["plain", "partitioned"])
def pairs(scratch: psycopg.Connection, request: pytest.FixtureRequest) -> psycopg.Connection:
    """An attached table with a key of a bigint, a uuid and a varchar, in both forms."""
    partition = "PARTITION BY LIST (c)" if request.param == "partitioned" else ""
    scratch.execute(
        sql.SQL(
            "CREATE TABLE parents (c varchar(10) PRIMARY KEY);"
            "CREATE TABLE pairs (c varchar(10) REFERENCES parents ON UPDATE CASCADE ON DELETE CASCADE, b uuid, a bigint, v real[],"
            " PRIMARY KEY (a, b, c)) {}"
        ).format(sql.SQL(partition))  # one of two literals
    )
    if partition:
        scratch.execute(
            "CREATE TABLE pairs_x PARTITION OF pairs FOR VALUES IN ('x'); CREATE TABLE pairs_y PARTITION OF pairs DEFAULT"
        )
    scratch.execute("INSERT INTO parents VALUES ('x'), ('y')")
    scratch.execute("INSERT INTO pairs VALUES ('x', %s, 1), ('y', %s, 1), ('y', %s, 9007199254740993)", [A, B, A])
    attach(scratch, "pairs")
    scratch.execute("TRUNCATE syncd.outbox")
    return scratch


X1A, Y1B, Y9A = f'[1, "{A}", "x"]', f'[1, "{B}", "y"]', f'[9007199254740993, "{A}", "y"]'


@pytest.mark.parametrize(
    ("write", "noted"),
    [
        (f"INSERT INTO pairs VALUES ('x', '{B}', 2), ('y', '{B}', 2)", keys(f'[2, "{B}", "x"]', f'[2, "{B}", "y"]')),
        (f"INSERT INTO pairs VALUES ('x', '{A}', 1), ('x', '{B}', 1) ON CONFLICT (a, b, c) DO UPDATE SET v = '{{2}}'", keys(X1A, f'[1, "{B}", "x"]')),
        (f"INSERT INTO pairs VALUES ('x', '{A}', 1) ON CONFLICT DO NOTHING", []),
        ("UPDATE pairs SET v = '{1}'", keys(X1A, Y1B, Y9A)),
        ("UPDATE pairs SET a = a + 1 WHERE a = 1 AND c = 'x'", keys(X1A, f'[2, "{A}", "x"]')),
        ("UPDATE pairs SET c = 'y' WHERE c = 'x'", keys(X1A, f'[1, "{A}", "y"]')),
        ("UPDATE parents SET c = 'z' WHERE c = 'x'", keys(X1A, f'[1, "{A}", "z"]')),
        ("DELETE FROM parents WHERE c = 'y'", keys(Y1B, Y9A)),
        ("DELETE FROM pairs WHERE a > 1", keys(Y9A)),
        (f"MERGE INTO pairs USING (VALUES ('x', 1), ('y', 7)) AS s (c, a) ON pairs.c = s.c AND pairs.a = s.a"
         f" WHEN MATCHED THEN UPDATE SET a = 3 WHEN NOT MATCHED THEN INSERT VALUES (s.c, '{A}', s.a)",
         keys(X1A, f'[3, "{A}", "x"]', f'[7, "{A}", "y"]')),
        ("TRUNCATE parents CASCADE", [("t", None)]),
    ],
)  # fmt: skip
def test_a_composite_key_is_noted_whole_by_every_kind_of_write(
    pairs: psycopg.Connection, write: LiteralString, noted: list[Entry]
) -> None:
    pairs.execute(write)
    assert sorted(outbox(pairs)) == sorted(noted)


def test_copy_notes_composite_keys(pairs: psycopg.Connection) -> None:
    with pairs.cursor().copy("COPY pairs (c, b, a) FROM STDIN") as copy:
        copy.write_row(("x", A, 5))
        copy.write_row(("y", A, 5))
    assert outbox(pairs) == keys(f'[5, "{A}", "x"]', f'[5, "{A}", "y"]')


KEYS: dict[str, list[object]] = {
    "bigint": [9007199254740991, -5, 3],
    "uuid": [A, B, "c0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "text": ['quo"te %s {x}', "", "ü, [1]"],
    "varchar(40)": ["a'b", "\\", "null"],
}


@pytest.mark.parametrize("key_type", KEYS)
@pytest.mark.parametrize("partitioned", [False, True])
def test_a_service_follows_keys_of_every_type_alone_and_composite(
    db: psycopg.Connection, daemon: Daemon, key_type: LiteralString, partitioned: bool
) -> None:
    values = KEYS[key_type]
    for table, key in (("single", "k"), ("pair", "k, n")):
        db.execute(
            sql.SQL("CREATE TABLE {} (k {}, n int DEFAULT 1, v real[], PRIMARY KEY ({})) {}").format(
                sql.Identifier(table),
                sql.SQL(key_type),
                sql.SQL(key),
                sql.SQL("PARTITION BY HASH (k)" if partitioned else ""),
            )
        )
        for number in range(2 if partitioned else 0):
            db.execute(
                sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES WITH (MODULUS 2, REMAINDER {})").format(
                    sql.Identifier(f"{table}_{number}"), sql.Identifier(table), number
                )
            )
        db.execute(sql.SQL("INSERT INTO {} (k, v) VALUES (%s, '{{1}}')").format(sql.Identifier(table)), values[:1])
        attach(db, table, metric="l2")
    daemon.start()
    with daemon.client() as client:
        for table in ("single", "pair"):
            name = sql.Identifier(table)

            def wanted(*some: object, table: str = table) -> list[object]:
                return [(one, 1) if table == "pair" else one for one in some]

            def found(table: str = table) -> list[object]:
                return [hit.key for hit in client.search(table, [0], consistency="strong")]

            assert found() == wanted(values[0])
            db.execute(sql.SQL("INSERT INTO {} (k, v) VALUES (%s, '{{2}}')").format(name), values[1:2])
            assert found() == wanted(*values[:2])
            db.execute(sql.SQL("UPDATE {} SET k = %s WHERE k = %s").format(name), [values[2], values[0]])
            assert found() == wanted(values[2], values[1])
            db.execute(sql.SQL("DELETE FROM {} WHERE k = %s").format(name), values[1:2])
            assert found() == wanted(values[2])
    daemon.stop()


# Tables that inherit


def test_an_inheritance_child_is_captured_when_its_parent_is_written(scratch: psycopg.Connection) -> None:
    """A write to the parent changes the child's rows, and fires the parent's statement triggers alone."""
    scratch.execute(
        "CREATE TABLE parent (id int, n int, embedding real[]); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)"
    )
    scratch.execute("INSERT INTO child VALUES (1), (2)")
    attach(scratch, "child")
    assert events(scratch, "child") == ROW_FORM
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("UPDATE parent SET n = 1 WHERE id = 1")
    scratch.execute("DELETE FROM parent WHERE id = 2")
    scratch.execute("TRUNCATE parent")
    assert outbox(scratch) == [*keys(1, 2), ("t", None)]


def test_rows_of_a_child_made_later_are_not_the_sources(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')")
    attach(db, "items", metric="l2")
    db.execute("CREATE TABLE child () INHERITS (items); INSERT INTO child VALUES (2, '{2}')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("items")) == [1]
        db.execute("UPDATE items SET v = '{3}'")  # the child's rows too
        assert [hit.key for hit in client.search("items", [0], consistency="strong")] == [1]
    daemon.stop()


def test_a_table_that_begins_to_inherit_is_switched_by_mending(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE parent (id int NOT NULL, embedding real[]); CREATE TABLE child (id int PRIMARY KEY, embedding real[])"
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


def test_a_source_that_becomes_a_partition_is_switched_by_mending(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(scratch, "items")
    scratch.execute("CREATE TABLE whole (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)")
    scratch.execute("ALTER TABLE whole ATTACH PARTITION items FOR VALUES FROM (0) TO (10)")
    assert mend(scratch, "items")
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO whole VALUES (1)")
    scratch.execute("TRUNCATE whole")
    assert outbox(scratch) == [*keys(1), ("t", None)]


def test_a_partition_attached_already_does_not_keep_its_table_from_being_attached(scratch: psycopg.Connection) -> None:
    """Both are sources then, each with its own triggers."""
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


# Subscribers' tables


class Replicated:
    """A publisher and a subscriber, both databases of one server, and a table that flows from one to the other."""

    def __init__(self, server: PostgresServer, publisher: psycopg.Connection, subscriber: psycopg.Connection) -> None:
        self.server = server
        self.publisher = publisher
        self.subscriber = subscriber

    def subscribe(self) -> None:
        """From here on the subscriber's apply writes the table, and a commit of the publisher returns once it is applied."""
        # A slot made by hand: a subscription that makes its own would wait for itself where both databases are on one server.
        self.publisher.execute("SELECT pg_create_logical_replication_slot('flow', 'pgoutput')")
        self.subscriber.execute(
            sql.SQL(
                "CREATE SUBSCRIPTION flow CONNECTION {} PUBLICATION flow"
                " WITH (create_slot = false, slot_name = 'flow', copy_data = false, synchronous_commit = 'local')"
            ).format(sql.Literal(self.server.conninfo("publisher")))
        )
        self.publisher.execute("SET synchronous_commit = remote_apply")

    def unsubscribe(self) -> None:
        """Nothing flows any more."""
        self.publisher.execute("SET synchronous_commit = local")
        self.subscriber.execute("ALTER SUBSCRIPTION flow DISABLE; ALTER SUBSCRIPTION flow SET (slot_name = NONE)")
        self.subscriber.execute("DROP SUBSCRIPTION flow")


@pytest.fixture(scope="module", params=VERSIONS)
def logical_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    """A server whose logical replication can be waited for."""
    if not available(request.param):
        pytest.skip(f"PostgreSQL {request.param} is not installed")
    settings = {"wal_level": "logical", "synchronous_standby_names": "flow", "synchronous_commit": "local"}
    with PostgresServer(request.param, tmp_path_factory.mktemp("logical"), settings=settings) as server:
        prepare(server, pgvector=False)
        yield server


@pytest.fixture
def replicated(logical_server: PostgresServer) -> Iterator[Replicated]:
    """Not subscribed yet."""
    table: LiteralString = "CREATE TABLE items (id int PRIMARY KEY, n int, v real[])"
    publisher = logical_server.create_database("publisher")
    subscriber = logical_server.create_database("subscriber", "syncd_template")
    try:
        with (
            psycopg.connect(publisher, autocommit=True) as here,
            psycopg.connect(subscriber, autocommit=True) as there,
        ):
            here.execute(table)
            here.execute("CREATE PUBLICATION flow FOR TABLE items")
            there.execute(table)
            both = Replicated(logical_server, here, there)
            yield both
            if there.execute("SELECT FROM pg_subscription").fetchone() is not None:
                both.unsubscribe()
            here.execute(
                "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots WHERE active_pid IS NOT NULL"
            )
            here.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    finally:
        logical_server.drop_database("subscriber")
        logical_server.drop_database("publisher")


def test_what_replication_applies_is_noted(replicated: Replicated) -> None:
    replicated.subscribe()
    there, here = replicated.subscriber, replicated.publisher
    here.execute("INSERT INTO items VALUES (1, 1, '{1}')")
    attach(there, "items")
    assert events(there) == ROW_FORM
    there.execute("TRUNCATE syncd.outbox")
    here.execute("INSERT INTO items VALUES (2, 2, '{2}'), (3, 3, '{3}')")
    here.execute("UPDATE items SET n = 5 WHERE id = 1")
    here.execute("UPDATE items SET id = 4 WHERE id = 2")
    here.execute("DELETE FROM items WHERE id = 3")
    here.execute("TRUNCATE items")
    here.execute("INSERT INTO items VALUES (9, 9, '{9}')")
    assert there.execute("SELECT array_agg(id) FROM items").fetchone() == ([9],)
    assert outbox(there) == [*keys(2, 3), *keys(1), *keys(2, 4), *keys(3), ("t", None), *keys(9)]


def test_a_table_that_becomes_a_subscribers_is_switched_by_mending_and_back(replicated: Replicated) -> None:
    there, here = replicated.subscriber, replicated.publisher
    attach(there, "items")
    assert events(there) == STATEMENT_FORM
    replicated.subscribe()
    assert ("items", "row", "missing") in wrong(there, "items")
    there.execute("TRUNCATE syncd.outbox")
    here.execute("INSERT INTO items VALUES (5, 5, '{5}')")
    assert outbox(there) == []
    assert mend(there, "items")
    assert events(there) == ROW_FORM
    assert outbox(there) == [("r", None)]  # for what was applied before
    here.execute("INSERT INTO items VALUES (6, 6, '{6}')")
    assert outbox(there) == [("r", None), *keys(6)]
    replicated.unsubscribe()
    assert mend(there, "items")
    assert events(there) == STATEMENT_FORM
    assert wrong(there, "items") == []


def test_a_service_follows_a_subscribers_table(replicated: Replicated, tmp_path: Path) -> None:
    replicated.subscribe()
    there, here = replicated.subscriber, replicated.publisher
    here.execute("INSERT INTO items VALUES (1, 1, '{1}')")
    attach(there, "items", metric="l2")
    daemon = Daemon(replicated.server.conninfo("subscriber"), tmp_path / "data").start()
    try:
        with daemon.client() as client:
            here.execute("INSERT INTO items SELECT i, i, ARRAY[i] FROM generate_series(2, 500) i")
            assert len(client.search("items", [0], k=1000, consistency="strong")) == 500
            here.execute("DELETE FROM items WHERE id > 3")
            here.execute("UPDATE items SET v = '{0}' WHERE id = 2")
            assert [hit.key for hit in client.search("items", [0], consistency="strong")] == [2, 1, 3]
            here.execute("TRUNCATE items")
            assert client.search("items", [0], consistency="strong") == []
        daemon.stop()
    finally:
        if daemon.process is not None:
            daemon.kill()


def test_where_subscriptions_cannot_be_seen_a_table_takes_the_form_that_is_always_right(
    any_server: PostgresServer,
) -> None:
    with role(any_server, "blind"):
        conninfo = any_server.create_database("sealed")
        try:
            any_server.execute("ALTER DATABASE sealed OWNER TO blind", "sealed")
            any_server.execute("REVOKE SELECT ON pg_subscription_rel FROM PUBLIC", "sealed")
            schema.install(make_conninfo(conninfo, user="blind"))
            with connected_as(conninfo, "blind") as db:
                db.execute("CREATE SCHEMA mine CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
                attach(db, "mine.items")
                assert events(db, "mine.items") == ROW_FORM
                assert wrong(db, "mine.items") == []
                assert not mend(db, "mine.items")
        finally:
            any_server.drop_database("sealed")


# Generated columns


def test_a_stored_generated_column_may_be_the_key_the_vector_and_in_every_rule(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (n int, id bigint GENERATED ALWAYS AS (n * 10) STORED PRIMARY KEY, lang text,"
        " d text GENERATED ALWAYS AS (lower(lang)) STORED, gone boolean GENERATED ALWAYS AS (n < 0) STORED,"
        " v real[] GENERATED ALWAYS AS (ARRAY[n, 1]) STORED)"
    )
    db.execute("INSERT INTO items VALUES (1, DEFAULT, 'DE'), (2, DEFAULT, 'EN'), (-3, DEFAULT, 'DE')")
    assert attach(db, "items", vector="v", dataset="d", live="NOT gone", metric="l2") == (3, 2, 2)
    daemon.start()
    with daemon.client() as client:
        db.execute("UPDATE items SET n = 5 WHERE n = 1")
        db.execute("INSERT INTO items (n, lang) VALUES (7, 'De'), (-7, 'De')")
        assert [hit.key for hit in client.search("de", [0, 1], consistency="strong")] == [50, 70]
    daemon.stop()


def test_virtual_generated_columns_can_be_everything_but_the_key(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, n int, lang text, d text GENERATED ALWAYS AS (lower(lang)) VIRTUAL,"
        " gone boolean GENERATED ALWAYS AS (n < 0) VIRTUAL, twice bigint NOT NULL GENERATED ALWAYS AS (id * 2) VIRTUAL,"
        " v real[] GENERATED ALWAYS AS (ARRAY[n, 1]) VIRTUAL)"
    )
    db.execute("INSERT INTO items VALUES (1, 1, 'DE'), (2, 2, 'EN'), (3, -3, 'DE')")
    with refused(db, "key column twice of table public.items is a virtual generated column", "STORED"):
        attach(db, "items", key=["twice"])
    assert attach(db, "items", vector="v", dataset="d", live="NOT gone", metric="l2", columns=["d"]) == (3, 2, 2)
    daemon.start()
    with daemon.client() as client:
        db.execute("UPDATE items SET n = 5 WHERE id = 1")
        db.execute("INSERT INTO items VALUES (7, 7, 'De'), (8, -7, 'De')")
        hits = client.search("de", [0, 1], consistency="strong")
        assert [(hit.key, hit.distance) for hit in hits] == [(1, 5.0), (7, 7.0)]
        db.execute("UPDATE items SET n = -1 WHERE id = 7")
        assert [hit.key for hit in client.search("de", [0, 1], consistency="strong")] == [1]
    daemon.stop()


# Names


def test_vectors_of_a_pgvector_off_the_search_path_are_followed(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute('CREATE SCHEMA "Ext \'s"; ALTER EXTENSION vector SET SCHEMA "Ext \'s"')
    db.execute('CREATE SCHEMA "My ""App"""')
    db.execute(
        'CREATE TABLE "My ""App"""."Items" ("Id" int, part int, embedding "Ext \'s".vector(2), h "Ext \'s".halfvec(2),'
        ' PRIMARY KEY (part, "Id")) PARTITION BY LIST (part);'
        'CREATE TABLE "My ""App"""."Items 1" PARTITION OF "My ""App"""."Items" FOR VALUES IN (1)'
    )
    db.execute('INSERT INTO "My ""App"""."Items" VALUES (1, 1, \'[1,0]\', \'[1,0]\')')
    source = '"My ""App"""."Items"'
    assert attach(db, source, vector="embedding", live='embedding IS DISTINCT FROM NULL AND "Id" > 0', metric="l2") == (
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
    scratch.execute("INSERT INTO public.items VALUES (1, '[1]'); UPDATE public.items SET embedding = '[2,3]'")
    assert outbox(scratch) == keys(1, 1)
