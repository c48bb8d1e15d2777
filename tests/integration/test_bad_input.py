"""Bad input in a table: a row that cannot be indexed is quarantined with its reason.

The other rows go on, and a service accepts any name and any key.
"""

from __future__ import annotations

import contextlib
import random
import string
from pathlib import Path

import psycopg
import pytest

from syncd.types import dataset_name
from tests.daemon import Daemon
from tests.faults.following import until

NOT_FINITE = "nan"  # the reason for NaN and for infinity


# Bad rows


def reported(db: psycopg.Connection, expected: dict[tuple[str, str], str]) -> None:
    """Wait until ``syncd.quarantine`` shows these rows."""
    with contextlib.suppress(AssertionError):
        until(lambda: quarantine(db) == expected, "the quarantine is reported")
    assert quarantine(db) == expected


def quarantine(db: psycopg.Connection) -> dict[tuple[str, str], str]:
    return {
        (dataset, key): reason
        for dataset, key, reason in db.execute(
            "SELECT dataset, key, reason FROM syncd.quarantine"
        ).fetchall()
    }


def test_rows_that_cannot_be_indexed_are_quarantined_with_the_reason_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    good = "(1, '{1,0,0}'), (2, '{0,1,0}'), (3, '{0,0,1}')"
    db.execute(
        f"INSERT INTO items VALUES {good}, (10, '{{NaN,0,0}}'), (11, '{{1,2}}'), "
        "(12, '{1,NULL,2}')".encode()
    )
    db.execute("SELECT syncd.attach('items')")
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05).start()
    before = {
        ("default/items", "10"): NOT_FINITE,
        ("default/items", "11"): "dimension_mismatch",
        ("default/items", "12"): "null_element",
    }
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [1, 2, 3]
        assert client.status().quarantined == 3
        reported(db, before)
        db.execute(
            "INSERT INTO items VALUES (13, '{0,0,0}'), (14, '{}'), (15, '{Infinity,1,1}'), "
            "(16, '{{1,2,3}}'), (17, '{1,2,3,4}'), (4, '{1,1,1}')"
        )
        assert client.search("items", [1, 1, 1], consistency="strong")
        assert sorted(client.keys("items")) == [1, 2, 3, 4]
        assert client.status().quarantined == 8
        after = before | {
            ("default/items", "13"): "zero_norm",
            ("default/items", "14"): "empty",
            ("default/items", "15"): NOT_FINITE,
            ("default/items", "16"): "not_one_dimensional",
            ("default/items", "17"): "dimension_mismatch",
        }
        reported(db, after)
        # Repaired, deleted or no longer live, a row leaves the quarantine.
        db.execute("UPDATE items SET v = '{1,2,3}' WHERE id IN (10, 13)")
        db.execute("DELETE FROM items WHERE id IN (11, 14)")
        db.execute("UPDATE items SET v = NULL WHERE id IN (12, 15)")
        # A good row that turns bad leaves the index.
        db.execute("UPDATE items SET v = '{NaN,1,1}' WHERE id = 1")
        client.search("items", [1, 1, 1], consistency="strong")
        assert sorted(client.keys("items")) == [2, 3, 4, 10, 13]
        assert client.status().quarantined == 3
        left = {
            ("default/items", "16"): "not_one_dimensional",
            ("default/items", "17"): "dimension_mismatch",
            ("default/items", "1"): NOT_FINITE,
        }
        reported(db, left)
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        assert client.status().quarantined == 3
        assert sorted(client.keys("items")) == [2, 3, 4, 10, 13]
        db.execute("TRUNCATE items")
        assert client.search("items", [1, 1, 1], consistency="strong") == []
        assert client.status().quarantined == 0
        reported(db, {})


def test_a_zero_vector_is_indexed_if_the_metric_needs_no_norm(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); "
        "INSERT INTO items VALUES (1, '{0,0}'), (2, '{1,1}')"
    )
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    with daemon.client() as client:
        assert [hit.key for hit in client.search("items", [0, 0])] == [1, 2]


@pytest.mark.parametrize(
    ("vector_type", "good", "bad"),
    [
        (
            "bytea",
            "'\\x0000803f0000803f'",
            {"'\\x00'": "not_float32", "''": "empty", "'\\x0000807f0000803f'": NOT_FINITE},
        ),
        (
            "double precision[]",
            "'{1,1}'",
            {"'{1e300,1}'": NOT_FINITE, "'{1,NULL}'": "null_element"},
        ),
        ("vector", "'[1,1]'", {"'[0,0]'": "zero_norm", "'[1,1,1]'": "dimension_mismatch"}),
        ("halfvec(2)", "'[1,1]'", {"'[0,0]'": "zero_norm"}),
    ],
)
def test_each_vector_type_has_its_own_ways_to_be_bad(
    db: psycopg.Connection, daemon: Daemon, vector_type: str, good: str, bad: dict[str, str]
) -> None:
    db.execute(f"CREATE TABLE items (id int PRIMARY KEY, v {vector_type})".encode())
    rows = ", ".join(f"({number}, {value})" for number, value in enumerate(bad, start=10))
    db.execute(f"INSERT INTO items VALUES (1, {good}), (2, {good}), (3, {good}), {rows}".encode())
    db.execute("SELECT syncd.attach('items', vector => 'v')")
    daemon.start()
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [1, 2, 3]
    wanted = {
        ("default/items", str(number)): reason
        for number, reason in enumerate(bad.values(), start=10)
    }
    reported(db, wanted)


def test_a_dataset_belongs_to_the_source_that_formed_it_and_anothers_rows_are_quarantined(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE first (id int PRIMARY KEY, v real[]); "
        "CREATE TABLE second (id int PRIMARY KEY, name text, v real[])"
    )
    db.execute(
        "INSERT INTO first VALUES (1, '{1,1}'); "
        "INSERT INTO second VALUES (2, 'same', '{1,1}'), (3, 'other', '{1,1}')"
    )
    db.execute("SELECT syncd.attach('first', dataset => $$'same'$$)")
    db.execute("SELECT syncd.attach('second', dataset => 'name')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("same")) == [1]
        assert list(client.keys("other")) == [3]
        reported(db, {("default/same", "2"): "dataset_taken"})
        db.execute("UPDATE second SET name = 'other'")
        assert {hit.key for hit in client.search("other", [1, 1], consistency="strong")} == {2, 3}
        assert client.status().quarantined == 0


def test_a_row_whose_project_or_dataset_is_null_is_quarantined(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text, v real[]); "
        "INSERT INTO items VALUES (1, NULL, '{1}'), (2, 'a', '{1}')"
    )
    db.execute("SELECT syncd.attach('items', dataset => 'name')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("a")) == [2]
    until(lambda: set(quarantine(db).values()) == {"null_dataset"}, "the row is reported")


def test_a_row_on_which_an_expression_fails_is_quarantined_until_it_is_repaired(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, n int, v real[]); "
        "INSERT INTO items VALUES (1, 1, '{1}')"
    )
    db.execute(
        "CREATE TABLE others (id int PRIMARY KEY, v real[]); INSERT INTO others VALUES (1, '{1}')"
    )
    db.execute("SELECT syncd.attach('items', live => '10 / n > 1'), syncd.attach('others')")
    daemon.start()
    with daemon.client() as client:
        db.execute("INSERT INTO items VALUES (2, 0, '{1}'); INSERT INTO others VALUES (2, '{1}')")
        assert {hit.key for hit in client.search("others", [1], consistency="strong")} == {1, 2}
        assert {hit.key for hit in client.search("items", [1], consistency="strong")} == {1}
        until(lambda: set(quarantine(db).values()) == {"expression_failed"}, "the row is reported")
        db.execute("UPDATE items SET n = 2 WHERE id = 2")
        assert {hit.key for hit in client.search("items", [1], consistency="strong")} == {1, 2}


# Bad names


LONG = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=10_000))
"""A long name that does not compress."""
NAMES = [
    *(
        "../../etc/x",
        "..",
        ".",
        "",
        "x" * 10_000,
        LONG,
        "a\\x00b\\0\\u0000",
        "nul %00",
        "new\nline",
    ),
    *("/", "//", "%2F", "C:\\x", "~", "-rf", "ü😀", " ", "postgres", "postgres.users"),
    *("manifest.json", "manifest.json.new", "consumer.lock", "syncd.sock", "MANIFEST.JSON"),
]


def test_rows_are_found_under_any_name_and_files_stay_in_the_data_directory(
    db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, project text, dataset text, v real[])")
    names = (
        [(name, "d") for name in NAMES]
        + [("p", name) for name in NAMES]
        + [("a", "b/c"), ("a/b", "c"), ("..", ".."), ("", "")]
    )
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO items VALUES (%s, %s, %s, '{1,2}')",
            [(number, *name) for number, name in enumerate(names)],
        )
    db.execute("SELECT syncd.attach('items', project => 'project', dataset => 'dataset')")
    outside = tmp_path / "outside"
    daemon = Daemon(db.info.dsn, outside / "data")
    try:
        daemon.start()
        for restarted in (False, True):
            with daemon.client() as client:
                assert {row.dataset for row in client.datasets()} >= {
                    dataset_name(*name) for name in names
                }
                for number, name in enumerate(names):
                    assert list(client.keys(dataset_name(*name))) == [number], name
                client.checkpoint()
                if restarted:
                    until(
                        lambda: (
                            len(set(db.execute("SELECT dataset FROM syncd.status").fetchall()))
                            == len(set(names))
                        ),
                        "every dataset is reported",
                    )
                else:
                    assert list(client.keys("p/postgres")) == [len(NAMES) + NAMES.index("postgres")]
            assert {path.name for path in outside.iterdir()} == {"data", "data.log"}
            assert {path.name for path in daemon.data_dir.iterdir() if path.is_file()} <= {
                "consumer.lock",
                "manifest.json",
                "manifest.previous.json",
            }
            daemon.stop()
            if not restarted:
                daemon.start()
                assert daemon.log.read_text().count("source_to_be_read") == 2, (
                    "the second start read nothing again"
                )
    finally:
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize("key_type", ["text", "varchar"])
def test_keys_may_be_any_text_also_at_the_end_of_a_page(
    db: psycopg.Connection, daemon: Daemon, key_type: str
) -> None:
    db.execute(f"CREATE TABLE items (id {key_type} PRIMARY KEY, v real[])".encode())
    db.execute(
        "INSERT INTO items SELECT '%s {x} %(y)s ''\" \\ ' || i, ARRAY[i, 1] "
        "FROM generate_series(1, 2500) i"
    )
    db.execute("SELECT syncd.attach('items')")
    daemon.start()
    with daemon.client() as client:
        assert len(list(client.keys("items"))) == 2500
        db.execute("INSERT INTO items VALUES ('', '{1,1}'), ('%d%', '{1,1}'), (E'\\n', '{1,1}')")
        assert len(client.search("items", [1, 1], k=10_000, consistency="strong")) == 2503
        assert client.search("items", key="%d%", k=1)[0].distance == pytest.approx(0, abs=1e-6)
