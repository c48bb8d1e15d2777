"""Keys of several columns and of every type: each write notes them whole, and a service follows them."""

from __future__ import annotations

from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.daemon import Daemon
from tests.integration.captured import Entry, execute, keys, outbox
from tests.integration.sources import attach

A, B = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


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
    execute(pairs, write)
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
