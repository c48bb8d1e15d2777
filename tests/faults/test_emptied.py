"""Datasets whose rows are gone for good: their names answer empty, and only the names are kept."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from syncd.store.manifest import MANIFEST, Manifest, read_manifest
from tests.daemon import Daemon
from tests.faults.following import is_unknown, keys_of, until
from tests.oracle.writes import fetch
from tests.scrape import get, sample, samples

EMPTY = "syncd.sync.source.emptied.EMPTY_SECONDS"


@pytest.fixture
def chats(db: psycopg.Connection, daemon: Daemon) -> psycopg.Connection:
    """A table with one dataset per conversation."""
    db.execute("CREATE TABLE chats (id int PRIMARY KEY, chat text, v real[])")
    db.execute(
        "INSERT INTO chats SELECT i, 'c' || i / 2, ARRAY[i, 1, 2] FROM generate_series(0, 39) AS i"
    )
    db.execute("SELECT syncd.attach('chats', dataset => 'chat', metric => 'l2')")
    daemon.settings |= {"http": "127.0.0.1:0", "verify_seconds": 0}
    daemon.with_constant(EMPTY, 0.1)
    return db


def applied(db: psycopg.Connection, client: Client, *statements: str) -> None:
    for statement in statements:
        db.execute(statement.encode())
    client.wait(fetch(db, "SELECT syncd.token()"), timeout_ms=20_000)


def with_index(daemon: Daemon) -> set[str]:
    """The datasets that have an index, not only a name."""
    return {
        dict(labels)["dataset"] for name, labels in samples(daemon) if name == "syncd_index_vectors"
    }


def manifest(daemon: Daemon) -> Manifest:
    return read_manifest(daemon.data_dir / MANIFEST)


def directories(daemon: Daemon) -> set[str]:
    return {path.parent.name for path in Path(daemon.data_dir).glob("default/*/*") if path.is_dir()}


def test_a_dataset_whose_rows_are_gone_costs_its_name_and_answers_empty_also_after_a_restart(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
        assert len(directories(daemon)) == 20
        client.search("c3", [1.0, 1.0, 1.0])
        assert sample(daemon, "syncd_searches_total", dataset="default/c3", outcome="ok") == 1
        applied(chats, client, "DELETE FROM chats WHERE id >= 2")
        until(lambda: with_index(daemon) == {"default/c0"}, "the indexes of the other datasets go")
        answers_empty(client)
        assert sample(daemon, "syncd_searches_total", dataset="other", outcome="ok") >= 1
        until(
            lambda: reported(chats) == ["default/c0"], "the other datasets are no longer reported"
        )
        until(lambda: with_index(daemon) == {"default/c0"}, "the rebuilt index goes again")
        client.checkpoint()
        client.checkpoint()
        assert directories(daemon) == {"c0"}
        source = next(each for each in manifest(daemon).sources if each.datasets)
        assert [each.name for each in source.datasets] == ["default/c0"]
        assert set(source.retired) == {f"default/c{i}" for i in range(1, 20)}
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        answers_empty(client)
        until(lambda: with_index(daemon) == {"default/c0"}, "the rebuilt index goes again")
    daemon.stop()


def reported(db: psycopg.Connection) -> list[str]:
    return [
        name
        for (name,) in db.execute(
            "SELECT dataset FROM syncd.status WHERE dataset LIKE 'default/c%' ORDER BY 1"
        )
    ]


def answers_empty(client: Client) -> None:
    """A dataset without rows answers every kind of request."""
    listed = {row.dataset: row for row in client.datasets()}
    assert len([name for name in listed if name.startswith("default/c")]) == 20
    row = listed["default/c3"]
    assert (row.state, row.count, row.index, row.bytes, row.lag_seconds) == (
        "ready",
        0,
        "exact",
        0,
        0.0,
    )
    assert row.source == "public.chats"
    assert client.search("c3", [1.0, 1.0, 1.0]) == []
    assert client.search("c3", [1.0, 1.0]) == []  # the next row decides on the dimension
    assert client.get("c3", [6]) == []
    assert list(client.keys("c3")) == []
    assert client.rebuild("c3").rows == 0
    (found,) = client.verify("c3").datasets
    assert (found.in_sync, found.rows, found.indexed) == (True, 0, 0)
    assert all(each.in_sync for each in client.verify(deep=True).datasets)
    why = client.why("c3")
    assert why.status is not None
    assert why.status.state == "ready"
    until(lambda: is_unknown(client, "c300"), "a name that was never used is unknown")


def test_a_name_that_comes_back_has_its_rows_and_may_have_another_dimension(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        for turn in range(3):
            applied(chats, client, "DELETE FROM chats")
            until(lambda: not with_index(daemon), "the indexes of the other datasets go")
            applied(
                chats,
                client,
                "INSERT INTO chats SELECT i, 'c' || i / 2, "
                f"array_fill(i::real, ARRAY[{turn + 4}]) FROM generate_series(0, 39) AS i",
            )
            assert set(client.keys("c3")) == {6, 7}
            assert [hit.key for hit in client.search("c3", [7.0] * (turn + 4), k=1)] == [7]
            assert with_index(daemon) >= {f"default/c{i}" for i in range(20)}
            client.checkpoint()
            assert all(each.in_sync for each in client.verify(deep=True).datasets)
        daemon.kill()
        daemon.start()
        assert set(client.keys("c3")) == {6, 7}


def test_a_row_that_a_dataset_without_rows_lacks_is_found_by_verify_and_by_rebuild(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        applied(chats, client, "DELETE FROM chats WHERE id >= 2")
        until(lambda: "default/c3" not in with_index(daemon), "its index goes")

        def unseen(row: str) -> None:
            with chats.transaction():
                chats.execute(f"INSERT INTO chats VALUES {row}".encode())
                chats.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")

        unseen("(6, 'c3', '{1,2,3}')")
        (found,) = client.verify("c3", repair=True).datasets
        assert (found.missing, found.repaired, found.in_sync) == (1, 1, True)
        assert list(client.keys("c3")) == [6]
        unseen("(8, 'c4', '{1,2,3}')")
        assert client.rebuild("c4").rows == 1
        unseen("(10, 'c5', '{1,2,3}')")
        assert not all(each.in_sync for each in client.verify().datasets)


def test_names_without_rows_stay_their_source_s_until_it_is_detached_or_attached_again(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        applied(chats, client, "DELETE FROM chats WHERE id >= 2")
        until(lambda: "default/c3" not in with_index(daemon), "its index goes")
        chats.execute("CREATE TABLE later (LIKE chats INCLUDING ALL)")
        chats.execute("INSERT INTO later VALUES (1, 'c3', '{1,2,3}')")
        chats.execute("SELECT syncd.attach('later', dataset => 'chat', metric => 'l2')")
        until(lambda: client.status().quarantined == 1, "the name is taken")
        assert client.search("c3", [1.0, 1.0, 1.0]) == []
        chats.execute("SELECT syncd.attach('chats', dataset => 'chat', metric => 'cosine')")
        until(
            lambda: keys_of(client, "c3") == [1],
            "the name is free: the new attachment has never seen it",
        )
        until(lambda: client.status().quarantined == 0, "the row has left the quarantine")
        applied(chats, client, "DELETE FROM later")
        until(lambda: "default/c3" not in with_index(daemon), "its index goes")
        assert client.search("c3", [1.0, 1.0, 1.0]) == []
        chats.execute("SELECT syncd.detach('later')")
        until(lambda: is_unknown(client, "c3"), "the name goes with its source")


def test_a_dataset_that_is_renamed_leaves_an_empty_name_and_no_files(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
        for turn in "abc":
            applied(chats, client, f"UPDATE chats SET chat = '{turn}' || id / 2")
            assert set(client.keys(f"{turn}3")) == {6, 7}
        until(lambda: with_index(daemon) == {f"default/c{i}" for i in range(20)}, "indexes go")
        client.checkpoint()
        client.checkpoint()
        assert directories(daemon) == {f"c{i}" for i in range(20)}
        assert client.search("a3", [1.0, 1.0, 1.0]) == client.search("b3", [1.0, 1.0, 1.0]) == []
        assert all(each.in_sync for each in client.verify(deep=True).datasets)
        assert "and 40 without rows" in get(daemon, "/")[1]


def test_rows_in_quarantine_of_a_dataset_without_indexed_rows_are_counted_and_come_back(
    chats: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        applied(chats, client, "UPDATE chats SET v = '{NaN}' WHERE chat = 'c3'")
        until(lambda: "default/c3" not in with_index(daemon), "its index goes")
        assert client.status().quarantined == 2
        assert [count.rows for count in client.why("c3").quarantine] == [2]
        applied(chats, client, "UPDATE chats SET v = '{1,2}' WHERE id = 6")
        assert list(client.keys("c3")) == [6]
        applied(chats, client, "UPDATE chats SET v = '{1,2}' WHERE id = 7")
        assert client.status().quarantined == 0
