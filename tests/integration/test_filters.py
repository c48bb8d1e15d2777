"""A search with a filter finds the rows that the same condition finds in the table.

This holds after any change of the rows and any restart of the service.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from syncd.client.client import Client
from syncd.errors import InvalidFilter, InvalidParams
from tests.daemon import Daemon

ROWS = 200

CONDITIONS: list[tuple[dict[str, Any], str]] = [
    ({"lang": "en"}, "lang = 'en'"),
    ({"lang": None}, "lang IS NULL"),
    ({"not": {"lang": "en"}}, "NOT lang = 'en'"),
    (
        {"lang": {"in": ["de", "fr"]}, "year": {"gte": 2003, "lt": 2008}},
        "lang IN ('de', 'fr') AND year >= 2003 AND year < 2008",
    ),
    ({"or": [{"score": {"gt": 9.5}}, {"flag": True}]}, "score > 9.5 OR flag"),
    ({"seen": {"gte": "2024-01-01T12:00:00+02:00"}}, "seen >= '2024-01-01T12:00:00+02:00'"),
    ({"tags": {"contains": ["a", "b"]}}, "tags @> '{a,b}'"),
    ({"tags": {"any": ["b", "c"]}}, "tags && '{b,c}'"),
    ({"attributes.part": {"ne": "x"}}, "attributes ->> 'part' <> 'x'"),
    ({"attributes.size.height": {"lte": 3}}, "(attributes #>> '{size,height}')::int <= 3"),
    ({"mood": {"ne": "sad"}}, "mood <> 'sad'"),
    ({}, "true"),
]


@pytest.fixture
def chunks(db: psycopg.Connection) -> psycopg.Connection:
    """An attached table with columns of many kinds, each with some NULLs."""
    db.execute("CREATE TYPE mood AS ENUM ('sad', 'happy')")
    db.execute(
        "CREATE TABLE chunks (id int PRIMARY KEY, v vector(2), lang text, year int, score numeric, "
        "flag boolean, seen timestamptz, "
        "tags text[], attributes jsonb, mood mood)"
    )
    db.execute(f"INSERT INTO chunks {row('i')} FROM generate_series(1, {ROWS}) AS i".encode())
    attach(db, "lang", "year", "score", "flag", "seen", "tags", "attributes", "mood")
    return db


def attach(db: psycopg.Connection, *columns: str) -> None:
    """Attach the table with these columns to filter on."""
    db.execute("SELECT syncd.attach('chunks', metric => 'l2', columns => %s)", [list(columns)])


def row(number: str) -> str:
    """SQL for the row of a number."""
    return (
        f"SELECT {number}, ARRAY[{number}, 1]::real[]::vector, (ARRAY['en', 'de', 'fr', NULL])[1 + "
        f"{number} % 4], 2000 + {number} % 10, "
        f"nullif({number} % 13, 0) * 0.9, nullif({number} % 3, 0) = 1, timestamptz '2023-12-01 "
        f"UTC' + interval '1 day' * ({number} % 60), "
        f"(ARRAY[NULL, '{{a}}', '{{a,b}}', '{{c,NULL}}'])[1 + {number} % 4]::text[], "
        f"CASE {number} % 5 WHEN 0 THEN NULL WHEN 1 THEN '{{}}' ELSE jsonb_build_object('part', "
        f"(ARRAY['x', 'y', NULL])[1 + {number} % 3], "
        f"'size', jsonb_build_object('height', {number} % 7)) END, (ARRAY['sad', 'happy', NULL])[1 "
        f"+ {number} % 3]::mood"
    )


def assert_all_agree(db: psycopg.Connection, client: Client) -> None:
    """Each filter finds the nearest rows of its condition, in order."""
    for wanted, where in CONDITIONS:
        hits = client.search("chunks", [0, 1], k=2 * ROWS, filter=wanted, consistency="strong")
        nearest = db.execute(
            f"SELECT id FROM chunks WHERE {where} ORDER BY v <-> '[0,1]'".encode()
        ).fetchall()
        assert [hit.key for hit in hits] == [key for (key,) in nearest], wanted


def test_a_search_with_a_filter_finds_the_nearest_of_the_rows_that_pass(
    chunks: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        assert_all_agree(chunks, client)
        assert [hit.key for hit in client.search("chunks", [0, 1], k=3, filter={"lang": "de"})] == [
            1,
            5,
            9,
        ]
        assert [hit.key for hit in client.search("chunks", key=1, k=2, filter={"lang": "de"})] == [
            5,
            9,
        ]
        assert [
            hit.key
            for hit in client.search("chunks", [0, 1], filter={"lang": "de"}, max_distance=6)
        ] == [1, 5]
        assert client.search("chunks", [0, 1], filter={"lang": "es"}) == []


def test_an_update_of_only_a_column_changes_the_rows_found_by_it(
    chunks: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        assert_all_agree(chunks, client)  # in the state before the changes
        for change in (
            "UPDATE chunks SET lang = CASE WHEN lang IS NULL THEN 'en' ELSE NULL END WHERE id % 2 "
            "= 0",
            "UPDATE chunks SET attributes = jsonb_set(coalesce(attributes, '{}'), '{part}', "
            "'\"z\"') WHERE id % 3 = 0",
            "UPDATE chunks SET tags = array_append(tags, 'b'), score = score + 1, flag = NOT flag, "
            "mood = NULL WHERE id < 100",
            "UPDATE chunks SET attributes = attributes - 'size', seen = NULL WHERE id > 150",
            f"INSERT INTO chunks {row('i + 300')} FROM generate_series(1, 50) AS i",
            "DELETE FROM chunks WHERE lang = 'de'",
        ):
            chunks.execute(change.encode())
            assert_all_agree(chunks, client)
        assert all(each.in_sync for each in client.verify("chunks", deep=True).datasets)


def test_columns_come_back_from_a_checkpoint_and_from_later_changes(
    chunks: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    daemon.stop()
    chunks.execute("UPDATE chunks SET lang = 'fr', tags = '{b}' WHERE id % 10 = 0")
    daemon.start()
    with daemon.client() as client:
        assert_all_agree(chunks, client)
        client.checkpoint()
        chunks.execute(
            'UPDATE chunks SET year = 2005, attributes = \'{"part": "y"}\' WHERE id % 10 = 1'
        )
        assert_all_agree(chunks, client)
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        assert_all_agree(chunks, client)
        assert all(each.in_sync for each in client.verify("chunks", deep=True).datasets)
    # At the first start two sources are read: embeddings and chunks.
    assert daemon.log.read_text().count("source_to_be_read") == 2


def test_rows_that_change_all_the_time_are_found_by_the_values_in_the_answer(
    database: str, chunks: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    done = threading.Event()

    def change() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            number = 0
            while not done.is_set():
                number += 1
                connection.execute(
                    "UPDATE chunks SET year = 2000 + (year + id + %s) %% 10 WHERE id %% 7 = %s",
                    [number, number % 7],
                )

    writer = threading.Thread(target=change)
    writer.start()
    try:
        with daemon.client() as client:
            for number in range(300):
                year = 2000 + number % 10
                wanted: dict[str, Any] = (
                    {"year": year} if number % 2 else {"not": {"year": {"ne": year}}}
                )
                hits = client.search("chunks", [0, 1], k=ROWS, filter=wanted, include=["year"])
                assert [hit.columns for hit in hits] == [{"year": year}] * len(hits)
    finally:
        done.set()
        writer.join()
    with daemon.client() as client:
        assert_all_agree(chunks, client)


def test_included_columns_are_answered_as_json(chunks: psycopg.Connection, daemon: Daemon) -> None:
    chunks.execute(
        "INSERT INTO chunks VALUES (1000, '[0,0]', NULL, 7, 1.50, true, '2024-05-06 07:08:09.5Z', "
        "'{x,NULL}', "
        '\'{"part": [1, 12345678901234567890.25], "size": {"height": 1.0}}\', \'sad\')'
    )
    daemon.start()
    with daemon.client() as client:
        names = [
            "lang",
            "year",
            "score",
            "flag",
            "seen",
            "tags",
            "mood",
            "attributes.size.height",
            "attributes.none",
            "attributes",
        ]
        (hit,) = client.search("chunks", [0, 0], k=1, include=names)
        assert hit.columns == {
            "lang": None,
            "year": 7,
            "score": 1.5,
            "flag": True,
            "seen": "2024-05-06T07:08:09.5+00:00",
            "tags": ["x", None],
            "mood": "sad",
            "attributes.size.height": 1.0,
            "attributes.none": None,
            "attributes": {"part": [1, 12345678901234567890.25], "size": {"height": 1.0}},
        }
        both = client.search(
            "chunks", vectors=[[0, 0], [1, 1]], k=1, include=["year"], filter={"year": {"lt": 2002}}
        )
        assert [[hit.columns for hit in hits] for hits in both] == [[{"year": 7}], [{"year": 2001}]]
        with pytest.raises(InvalidParams, match="no column 'nosuch'") as caught:
            client.search("chunks", [0, 0], include=["nosuch"])
        assert (
            "columns: lang, year, score, flag, seen, tags, attributes.<key>, mood"
            in caught.value.hint
        )


@pytest.mark.usefixtures("chunks")
def test_a_wrong_filter_is_refused_and_the_next_is_answered(daemon: Daemon) -> None:
    daemon.start()
    with daemon.client() as client:
        for wanted, said in (
            ({"nosuch": 1}, "no filterable column 'nosuch'"),
            ({"year": "2000"}, "cannot be compared with 'year'"),
            ({"lang": {"gtee": "a"}}, "'gtee' is not an operator of 'lang'"),
        ):
            with pytest.raises(InvalidFilter, match=said):
                client.search("chunks", [0, 1], filter=wanted)
        assert client.search("chunks", [0, 1], k=1, filter={"lang": "en"})[0].key == 4


def test_attributes_of_the_ready_table_can_be_filtered_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        db.execute(
            "INSERT INTO syncd.embeddings (id, project, dataset, embedding, attributes) "
            "VALUES ('a', 'default', 'd', '{1,0}', '{\"lang\": \"en\"}'), ('b', 'default', 'd', "
            "'{1,1}', '{\"lang\": \"de\"}')"
        )
        client.wait(after=str((db.execute("SELECT syncd.token()").fetchone() or [None])[0]))
        assert [
            hit.key for hit in client.search("d", [1, 0], filter={"attributes.lang": "de"})
        ] == ["b"]


def test_the_columns_of_a_table_attached_with_others_can_be_filtered_on(
    chunks: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        assert client.search("chunks", [0, 1], k=1, filter={"year": 2000})
        attach(chunks, "lang", "seen")
        hits = client.search(
            "chunks",
            [0, 1],
            k=ROWS,
            filter={"seen": {"lt": "2023-12-02T00:00:00Z"}},
            consistency="strong",
        )
        assert [hit.key for hit in hits] == [60, 120, 180]
        with pytest.raises(InvalidFilter, match="no filterable column 'year'") as caught:
            client.search("chunks", [0, 1], filter={"year": 2000})
        assert "columns: lang, seen" in caught.value.hint
        attach(chunks)
        client.wait(after=str((chunks.execute("SELECT syncd.token()").fetchone() or [None])[0]))
        with pytest.raises(InvalidFilter, match="no filterable columns"):
            client.search("chunks", [0, 1], filter={"lang": "en"}, consistency="strong")


def test_rows_are_found_by_the_new_name_of_an_enums_value(
    chunks: psycopg.Connection, daemon: Daemon
) -> None:
    """A rename changes no row: syncd sees it in the catalogue and compares the table."""
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    with daemon.client() as client:
        chunks.execute("ALTER TYPE mood RENAME VALUE 'sad' TO 'gloomy'")
        found: list[object] = []
        deadline = time.monotonic() + 60
        while not found and time.monotonic() < deadline:
            hits = client.search(
                "chunks", [0, 1], k=ROWS, filter={"mood": "gloomy"}, consistency="strong"
            )
            found = [hit.key for hit in hits]
        assert found == list(range(3, ROWS + 1, 3))
