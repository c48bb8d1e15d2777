"""Keys of several columns and of every type: each write notes them whole; a service follows."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import LiteralString

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from syncd.client.client import Client
from syncd.errors import NotReady
from syncd.keys import parse_key
from syncd.postgres.layout import read_sources
from syncd.types import KeyKind
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.captured import Entry, execute, keys, outbox
from tests.integration.sources import attach, refused

A, B = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


@pytest.fixture(params=["plain", "partitioned"])
def pairs(scratch: psycopg.Connection, request: pytest.FixtureRequest) -> psycopg.Connection:
    """An attached table with a key of a bigint, a uuid and a varchar, in both forms."""
    partition = "PARTITION BY LIST (c)" if request.param == "partitioned" else ""
    scratch.execute(
        sql.SQL(
            "CREATE TABLE parents (c varchar(10) PRIMARY KEY);"
            "CREATE TABLE pairs (c varchar(10) REFERENCES parents ON UPDATE CASCADE ON DELETE "
            "CASCADE,"
            " b uuid, a bigint, v real[], PRIMARY KEY (a, b, c)) {}"
        ).format(sql.SQL(partition))  # one of two literals
    )
    if partition:
        scratch.execute(
            "CREATE TABLE pairs_x PARTITION OF pairs FOR VALUES IN ('x');"
            "CREATE TABLE pairs_y PARTITION OF pairs DEFAULT"
        )
    scratch.execute("INSERT INTO parents VALUES ('x'), ('y')")
    scratch.execute(
        "INSERT INTO pairs VALUES ('x', %s, 1), ('y', %s, 1), ('y', %s, 9007199254740993)",
        [A, B, A],
    )
    attach(scratch, "pairs")
    scratch.execute("TRUNCATE syncd.outbox")
    return scratch


X1A, Y1B, Y9A = f'[1, "{A}", "x"]', f'[1, "{B}", "y"]', f'[9007199254740993, "{A}", "y"]'


@pytest.mark.parametrize(
    ("write", "noted"),
    [
        (
            f"INSERT INTO pairs VALUES ('x', '{B}', 2), ('y', '{B}', 2)",
            keys(f'[2, "{B}", "x"]', f'[2, "{B}", "y"]'),
        ),
        (
            f"INSERT INTO pairs VALUES ('x', '{A}', 1), ('x', '{B}', 1) "
            "ON CONFLICT (a, b, c) DO UPDATE SET v = '{2}'",
            keys(X1A, f'[1, "{B}", "x"]'),
        ),
        (f"INSERT INTO pairs VALUES ('x', '{A}', 1) ON CONFLICT DO NOTHING", []),
        ("UPDATE pairs SET v = '{1}'", keys(X1A, Y1B, Y9A)),
        ("UPDATE pairs SET a = a + 1 WHERE a = 1 AND c = 'x'", keys(X1A, f'[2, "{A}", "x"]')),
        ("UPDATE pairs SET c = 'y' WHERE c = 'x'", keys(X1A, f'[1, "{A}", "y"]')),
        ("UPDATE parents SET c = 'z' WHERE c = 'x'", keys(X1A, f'[1, "{A}", "z"]')),
        ("DELETE FROM parents WHERE c = 'y'", keys(Y1B, Y9A)),
        ("DELETE FROM pairs WHERE a > 1", keys(Y9A)),
        (
            "MERGE INTO pairs USING (VALUES ('x', 1), ('y', 7)) AS s (c, a)"
            " ON pairs.c = s.c AND pairs.a = s.a WHEN MATCHED THEN UPDATE SET a = 3"
            f" WHEN NOT MATCHED THEN INSERT VALUES (s.c, '{A}', s.a)",
            keys(X1A, f'[3, "{A}", "x"]', f'[7, "{A}", "y"]'),
        ),
        ("TRUNCATE parents CASCADE", [("t", None)]),
    ],
)
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
    "date": ["2024-02-29", "0044-03-15 BC", "infinity"],
    "timestamp": ["2024-02-29T12:30:00.5", "12024-02-29T12:30:00", "0044-03-15T00:00:00.000001 BC"],
    "timestamptz": [
        "2024-02-29T12:30:00.123456+00:00",
        "-infinity",
        "0044-03-15T00:00:00+00:00 BC",
    ],
    "timestamp(0)": ["2024-02-29T12:30:00", "1970-01-01T00:00:00", "9999-12-31T23:59:59"],
    "a_number": [7, -5, 3],
    "a_moment": [
        "2024-02-29T12:30:00.123456+00:00",
        "2024-10-27T01:00:00+00:00",
        "2024-10-27T00:00:00+00:00",
    ],
    "an_email": ["a@b", "c@d", "e@f"],
}
DOMAINS: tuple[LiteralString, ...] = (
    "CREATE DOMAIN a_number AS int CHECK (VALUE < 100)",
    "CREATE DOMAIN an_instant AS timestamptz",
    "CREATE DOMAIN a_moment AS an_instant NOT NULL",
    "CREATE DOMAIN an_email AS text CHECK (VALUE LIKE '%@%')",
)
WRITERS: tuple[LiteralString, ...] = (
    "SET datestyle = 'SQL, DMY'; SET timezone = 'Asia/Kolkata'; SET intervalstyle = 'sql_standard'",
    "SET datestyle = 'German'; SET timezone = 'Europe/Berlin'; SET quote_all_identifiers = on",
    "SET datestyle = 'Postgres, MDY'; SET timezone = 'America/St_Johns'",
    "SET datestyle = 'ISO, YMD'; SET timezone = 'UTC'",
)


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_service_follows_keys_of_every_type_alone_and_composite(
    db: psycopg.Connection, daemon: Daemon, partitioned: bool
) -> None:
    for domain in DOMAINS:
        db.execute(domain)
    tables: list[tuple[str, bool, list[object]]] = []
    for number, (key_type, values) in enumerate(KEYS.items()):
        for table, key in ((f"single_{number}", "k"), (f"pair_{number}", "k, n")):
            create(db, table, f"k {key_type}", key, partitioned=partitioned)
            db.execute(
                sql.SQL("INSERT INTO {} (k, v) VALUES (%s, '{{1}}')").format(sql.Identifier(table)),
                values[:1],
            )
            attach(db, table, metric="l2")
            tables.append((table, key != "k", values))
    daemon.start()
    with daemon.client() as client:
        for table, is_pair, values in tables:
            name = sql.Identifier(table)

            def wanted(*some: object, is_pair: bool = is_pair) -> list[object]:
                return [(one, 1) if is_pair else one for one in some]

            def found(table: str = table) -> list[object]:
                return [hit.key for hit in client.search(table, [0], consistency="strong")]

            assert found() == wanted(values[0])
            db.execute(WRITERS[0])
            db.execute("SET datestyle = 'SQL, YMD'")  # in which this test writes its times
            db.execute(
                sql.SQL("INSERT INTO {} (k, v) VALUES (%s, '{{2}}')").format(name), values[1:2]
            )
            assert found() == wanted(*values[:2])
            db.execute(
                sql.SQL("UPDATE {} SET k = %s WHERE k = %s").format(name), [values[2], values[0]]
            )
            assert found() == wanted(values[2], values[1])
            db.execute(sql.SQL("DELETE FROM {} WHERE k = %s").format(name), values[1:2])
            assert found() == wanted(values[2])
    daemon.stop()


def create(db: psycopg.Connection, table: str, column: str, key: str, *, partitioned: bool) -> None:
    """Make a table with these columns as its key, in two partitions or in one piece."""
    text = f"CREATE TABLE {table} ({column}, n int DEFAULT 1, v real[], PRIMARY KEY ({key}))"
    db.execute((text + (" PARTITION BY HASH (k)" if partitioned else "")).encode())
    for number in range(2 if partitioned else 0):
        db.execute(
            f"CREATE TABLE {table}_{number} PARTITION OF {table} "
            f"FOR VALUES WITH (MODULUS 2, REMAINDER {number})".encode()
        )


MOMENTS = st.one_of(
    st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30)).map(str),
    st.integers(10000, 290000).map(lambda year: f"{year}-02-28 23:59:59.999999"),
    st.integers(1, 4700).map(lambda year: f"{year:04}-02-28 00:00:00.1 BC"),
    st.sampled_from(
        [
            "infinity",
            "-infinity",
            "2024-03-31 02:30:00",
            "2024-10-27 02:30:00",
            "1900-01-01 00:00:00",
        ]
    ),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(moments=st.lists(MOMENTS, min_size=1, max_size=5, unique=True))
def test_the_text_of_a_time_depends_on_no_setting_of_its_writer_and_reads_back(
    scratch: psycopg.Connection, moments: list[str]
) -> None:
    with scratch.transaction(force_rollback=True):
        scratch.execute(
            "CREATE TABLE IF NOT EXISTS moments (i timestamptz, t timestamp, d date, n int,"
            " embedding real[], PRIMARY KEY (i, t, d, n));"
            "CREATE TABLE IF NOT EXISTS instants (i timestamptz PRIMARY KEY, embedding real[])"
        )
        attach(scratch, "moments")
        attach(scratch, "instants")
        scratch.execute("SET LOCAL timezone = 'UTC'")
        scratch.execute(
            "CREATE TEMPORARY TABLE given AS "
            "SELECT m::timestamptz AS i FROM unnest(%s::text[]) AS m",
            [moments],
        )
        noted = []
        for writer in WRITERS:
            scratch.execute("TRUNCATE moments, instants, syncd.outbox")
            scratch.execute(writer)
            utc = "timezone('UTC', i)"
            scratch.execute(
                f"INSERT INTO moments SELECT i, {utc}, {utc}::date, 1 FROM given".encode()
            )
            scratch.execute("INSERT INTO instants SELECT DISTINCT i FROM given")
            scratch.execute(
                "UPDATE instants SET embedding = '{1}'; UPDATE moments SET n = 1;"
                "DELETE FROM instants"
            )
            noted.append(outbox(scratch))
        assert noted[1:] == noted[:1] * (len(WRITERS) - 1)
        texts = {key for _, key in noted[0] if key is not None}
        for text in texts:
            kinds: list[KeyKind] = (
                ["timestamptz"]
                if text[0] != "["
                else ["timestamptz", "timestamp", "date", "integer"]
            )
            assert parse_key(kinds, text) == (text if text[0] != "[" else text.replace(", ", ","))
        single = [text for text in texts if text[0] != "["]
        back = (
            "SELECT count(*) FROM given AS g "
            "JOIN unnest(%s::text[]) AS t (x) ON t.x::timestamptz = g.i"
        )
        row = scratch.execute(back, [single]).fetchone()
        assert row == (len(moments),)
        assert len(single) == len(set(single)) <= len(moments)


def test_a_time_partitioned_table_is_followed_and_only_the_partitions_of_its_keys_are_read(
    db: psycopg.Connection, database: str, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE events (id bigint, created_at timestamptz, v real[],"
        " PRIMARY KEY (id, created_at)) PARTITION BY RANGE (created_at);"
        "CREATE TABLE events_1 PARTITION OF events"
        " FOR VALUES FROM ('2024-01-01 00:00+00') TO ('2024-02-01 00:00+00');"
        "CREATE TABLE events_2 PARTITION OF events"
        " FOR VALUES FROM ('2024-02-01 00:00+00') TO ('2024-03-01 00:00+00');"
        "INSERT INTO events VALUES"
        " (1, '2024-01-05 10:00+00', '{1}'), (2, '2024-02-05 10:00+00', '{2}')"
    )
    attach(db, "events", metric="l2")
    daemon.start()
    with daemon.client() as client:
        db.execute("SET timezone = 'Asia/Tokyo'; SET datestyle = 'German'")
        db.execute("UPDATE events SET created_at = created_at + interval '1 month' WHERE id = 1")
        first, second = (1, "2024-02-05T10:00:00+00:00"), (2, "2024-02-05T10:00:00+00:00")
        assert [hit.key for hit in client.search("events", [0], consistency="strong")] == [
            first,
            second,
        ]
        assert [
            hit.key for hit in client.search("events", key=(1, "2024-02-05T19:00:00+09:00"), k=1)
        ] == [second]
        moment = datetime(2024, 2, 5, 11, tzinfo=timezone(timedelta(hours=1)))
        assert [row.key for row in client.get("events", [(2, moment)])] == [second]
        assert [row.in_sync for row in client.verify().datasets] == [True]
        page = client.keys_page("events", limit=1)
        assert [*page.keys, *client.keys_page("events", after_key=page.next).keys] in (
            [first, second],
            [second, first],
        )
    daemon.stop()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("SET timezone = 'UTC'")
        [source] = [each for each in read_sources(connection) if each.table == "events"]
        plan = psycopg.RawCursor(connection).execute(
            sql.SQL("EXPLAIN ") + source.read_keys(), [['[1, "2024-01-05T10:00:00+00:00"]']]
        )
        shown = str(plan.fetchall())
        assert "events_1" in shown
        assert "events_2" not in shown


@pytest.mark.parametrize("key", ["abc", "99999999999999999999", "[1]", ""])
def test_a_key_that_cannot_be_read_has_the_source_read_again(
    db: psycopg.Connection, daemon: Daemon, key: str
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (1, '{1}'), (2, '{2}')")
    attach(db, "items", metric="l2")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    with daemon.client() as client:
        with db.transaction():
            db.execute(
                "ALTER TABLE items DISABLE TRIGGER USER; DELETE FROM items WHERE id = 1;"
                "ALTER TABLE items ENABLE TRIGGER USER"
            )
            db.execute(
                "INSERT INTO syncd.outbox (source, op, key) "
                "SELECT id, 'k', %s FROM syncd.sources WHERE source = 'items'::regclass",
                [key],
            )
            row = db.execute("SELECT syncd.token()").fetchone()
        assert row is not None
        assert [hit.key for hit in client.search("items", [0], after=row[0])] == [2]
        until(
            lambda: (
                {each.state for each in client.datasets() if each.source == "public.items"}
                == {"ready"}
            ),
            "the source is ready",
        )
    daemon.stop()


def test_a_key_that_becomes_a_time_fails_the_source_until_it_is_attached_again(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id text PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES ('2024-02-29', '{1}')")
    attach(db, "items", metric="l2")
    daemon.start()
    with daemon.client() as client:
        db.execute("ALTER TABLE items ALTER id TYPE date USING id::date")
        said = eventually_failed(client, "items")
        assert "column id was of type text and is of type date now" in said
        assert "attach it again: syncd attach public.items" in said
        attach(db, "items", metric="l2")
        db.execute("SET datestyle = 'SQL, DMY'; INSERT INTO items VALUES ('03/04/2024', '{2}')")
        token = db.execute("SELECT syncd.token()").fetchone()
        assert token is not None
        found = client.search("items", [0], after=token[0])
        assert [hit.key for hit in found] == ["2024-02-29", "2024-04-03"]
    daemon.stop()


def eventually_failed(client: Client, dataset: str) -> str:
    """The message of a search once the dataset has failed."""
    said = ""

    def failed() -> bool:
        nonlocal said
        try:
            client.search(dataset, [0])
        except NotReady as error:
            said = str(error)
            return "failed" in {each.state for each in client.datasets()}
        return False

    until(failed, "the dataset fails")
    return said


def test_a_column_of_another_type_is_refused_as_a_key_with_the_types_that_can_be_one(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute(
        "CREATE DOMAIN amount AS numeric;"
        "CREATE TABLE priced (id amount PRIMARY KEY, embedding real[])"
    )
    with refused(
        scratch,
        "key column id of type public.amount cannot be a key",
        "date, timestamp or timestamptz, or of a domain",
    ):
        attach(scratch, "priced")
