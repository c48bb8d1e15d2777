"""Writes to an attached table succeed and are noted, with any names, any role and any rule."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
import pytest
from psycopg import sql

from tests.daemon import Daemon
from tests.integration.sources import attach, connected_as, role
from tests.servers import PostgresServer

# Names


COLUMNS = [
    *("n", "o", "old", "new", "key", "k", "source", "op", "slot", "event", "TG_OP", "id", "user"),
    *("syncd_n", "syncd_k", "syncd_key", "syncd_key_before", "syncd_slot", "select", "ctid2"),
    *("percent%s", "br{ace}s", 'quo"te', "it's", "Großbuchstaben"),
]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("partitioned", [False, True])
def test_columns_may_have_any_name(
    scratch: psycopg.Connection, column: str, composite: bool, partitioned: bool
) -> None:
    name = sql.Identifier(column)
    key = sql.SQL("{}, b").format(name) if composite else name
    scratch.execute(
        sql.SQL(
            "CREATE TABLE items ({} int, b int DEFAULT 1, embedding real[], PRIMARY KEY ({})) {}"
        ).format(
            name,
            key,
            sql.SQL("PARTITION BY HASH ({})").format(name) if partitioned else sql.SQL(""),
        )
    )
    if partitioned:
        scratch.execute(
            "CREATE TABLE all_items PARTITION OF items FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        )
    attach(scratch, "items", columns=[column])
    scratch.execute("INSERT INTO items VALUES (1, 1, '{1}'), (2, 1, '{1}')")
    scratch.execute(sql.SQL("UPDATE items SET {0} = {0} + 10").format(name))
    scratch.execute(sql.SQL("DELETE FROM items WHERE {} = 11").format(name))
    found = [
        row[0]
        for row in scratch.execute(
            "SELECT key FROM syncd.outbox WHERE op = 'k' ORDER BY id"
        ).fetchall()
    ]
    keys = [1, 2, 1, 2, 11, 12, 11]
    assert sorted(found) == sorted([f"[{key}, 1]" for key in keys] if composite else map(str, keys))
    assert scratch.execute("SELECT count(*) FROM syncd.outbox WHERE op = 'r'").fetchone() == (0,)


STRANGE_NAMES = [
    ('My "Schema"', "Table 100% {x} %s %(y)s"),
    ("it's; --", "UPPER case.with.dots"),
    ("pg-temp", "a" * 63),
]


def test_rows_are_found_with_any_name_of_schema_table_and_columns(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    datasets: list[tuple[str, sql.Identifier]] = []
    for schema_name, table in STRANGE_NAMES:
        names = {"schema": sql.Identifier(schema_name), "table": sql.Identifier(schema_name, table)}
        db.execute(sql.SQL("CREATE SCHEMA {schema}").format(**names))
        db.execute(
            sql.SQL(
                'CREATE TABLE {table} ("I %d{{0}}" int, "k%" text, "V {{}} %s" real[], "a%" jsonb, '
                'PRIMARY KEY ("I %d{{0}}", "k%"))'
            ).format(**names)
        )
        db.execute(
            sql.SQL(
                """INSERT INTO {table} SELECT i, 'k%s', ARRAY[i, 1], '{{"a": {{"b%": 1}}}}' """
                "FROM generate_series(1, 4) i"
            ).format(**names)
        )
        source = sql.Identifier(schema_name, table).as_string(db)
        live = """"a%" @> '{"a": {"b%": 1}}' AND "I %d{0}" % 2 = 0 AND 'x' LIKE '%x%'"""
        assert attach(
            db,
            source,
            dataset="""'d%s{0}' || "I %d{0}" % 2""",
            project=f"'{len(datasets)}'",
            live=live,
            metric="l2",
        ) == (4, 2, 1)
        assert db.execute(
            "SELECT count(*) FROM syncd.sources WHERE source = %s::regclass", [source]
        ).fetchone() == (1,)
        datasets.append((f"{len(datasets)}/d%s{{0}}0", names["table"]))
    daemon.start()
    with daemon.client() as client:
        for dataset, name in datasets:
            assert sorted(client.keys(dataset)) == [(2, "k%s"), (4, "k%s")]
            db.execute(sql.SQL("""UPDATE {} SET "k%" = 'K' WHERE "I %d{{0}}" = 2""").format(name))
            db.execute(
                sql.SQL(
                    """INSERT INTO {} VALUES (6, '', '{{9,9}}', '{{"a": {{"b%": 1}}}}')"""
                ).format(name)
            )
            assert [hit.key for hit in client.search(dataset, [2, 1], consistency="strong")] == [
                (2, "K"),
                (4, "k%s"),
                (6, ""),
            ]
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        for dataset, _ in datasets:
            assert sorted(client.keys(dataset)) == [(2, "K"), (4, "k%s"), (6, "")]


# Rules and roles


def test_a_rule_that_fails_on_a_later_row_fails_no_write(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, n int, embedding real[])")
    attach(scratch, "items", live="10 / n > 1", project="(10 / n)::text", dataset="chr(n)")
    scratch.execute("INSERT INTO items VALUES (1, 0, '{1}')")
    scratch.execute("UPDATE items SET n = -1")
    scratch.execute("DELETE FROM items")
    assert outbox(scratch) == [("k", "1")] * 3


WRITES = [
    "INSERT INTO items VALUES (1, '{1}'), (2, '{2}')",
    "UPDATE items SET embedding = '{3}' WHERE id = 1",
    "DELETE FROM items WHERE id = 2",
    "COPY items FROM STDIN",
    "TRUNCATE items",
]


@pytest.mark.parametrize("set_role", [False, True])
def test_a_writer_of_the_table_needs_no_grant_on_the_schema(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str, set_role: bool
) -> None:
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(any_db, "items")
    with (
        role(any_server, "writer"),
        role(any_server, "session_user_of_writer", "LOGIN IN ROLE writer"),
    ):
        any_db.execute("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON items TO writer")
        with connected_as(any_database, "session_user_of_writer" if set_role else "writer") as db:
            if set_role:
                db.execute("SET ROLE writer")
            for write in WRITES:
                if write.startswith("COPY"):
                    with db.cursor().copy(write) as copy:
                        copy.write_row((5, "{5}"))
                else:
                    db.execute(write)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute("SELECT syncd.token()")
        any_db.execute("DROP OWNED BY writer")
    assert outbox(any_db) == [
        ("k", "1"),
        ("k", "2"),
        ("k", "1"),
        ("k", "2"),
        ("k", "5"),
        ("t", None),
    ]


def outbox(db: psycopg.Connection) -> Sequence[tuple[str, str | None]]:
    return db.execute(
        "SELECT op::text, key FROM syncd.outbox WHERE op IN ('k', 't', 'r') ORDER BY id"
    ).fetchall()
