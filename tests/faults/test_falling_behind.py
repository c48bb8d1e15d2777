"""A consumer whose changes the outbox no longer holds notices it and compares every row.

A consumer that has missed no change goes on.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import psycopg

from syncd.errors import NotReady, ServiceUnavailable
from syncd.types import Snapshot
from tests.daemon import Daemon
from tests.faults.following import until
from tests.faults.rotation import assert_in_step, fill, following, freed, outbox_rows, rotate, value

AT_REST = (
    "SELECT bool_and(state = 'idle') FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name LIKE 'syncd/%'"
)


def test_over_the_cap_a_consumer_that_is_away_must_rebuild_and_is_right_again(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with (
        following(database, tmp_path / "a", consumer="a", outbox_max_rows=2000) as alive,
        following(database, tmp_path / "b", consumer="b") as away,
    ):
        away.start()
        away.stop()
        items.execute("DELETE FROM items WHERE id = 0")
        alive.start()

        def away_state() -> Any:
            return value(items, "SELECT min(state) FROM syncd.status WHERE consumer = 'b'")

        for number in range(100):
            fill(items, 500, 1 + 500 * number)
            if away_state() == "must_rebuild":
                break
        until(lambda: away_state() == "must_rebuild", "the consumer that is away must rebuild")
        until(lambda: outbox_rows(items) < 2000, "the outbox is freed for the other consumer")
        with alive.client() as client:
            assert_in_step(client, items)
        with psycopg.connect(database) as holder:
            holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            away.spawn()
            assert seen_state(away) == "must_rebuild"
        assert away.process is not None
        away.wait_for_line(away.process)
        with away.client() as client:
            assert_in_step(client, items)
            until(lambda: client.status().state == "ready", "the consumer has rebuilt")
            until(lambda: away_state() == "ready", "the SQL view says so")
        assert not value(items, "SELECT bool_or(must_rebuild) FROM syncd.consumers")


def seen_state(daemon: Daemon) -> str:
    """State of the dataset as soon as a starting service knows it."""
    found: list[str] = []

    def known() -> bool:
        try:
            with daemon.client() as client:
                found[:] = [
                    each.state for each in client.datasets() if each.dataset == "default/items"
                ]
        except (ServiceUnavailable, NotReady, ConnectionError):
            return False
        return bool(found)

    until(known, "the dataset is known")
    return found[0]


def test_after_a_time_without_a_service_the_next_start_applies_the_cap(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data", outbox_max_rows=1000) as daemon:
        fill(items, 3000)
        daemon.start()
        daemon.stop()
        items.execute("DELETE FROM items WHERE id % 3 = 0")
        fill(items, 5000, 2000)
        assert outbox_rows(items) > 5000
        # Only the start can apply it: the next rotation is an hour away.
        daemon.with_constant("syncd.sync.background.rotation.ROTATION_SECONDS", 3600.0).start()
        assert "outbox_full" in daemon.log.read_text()
        assert outbox_rows(items) < 1000
        with daemon.client() as client:
            assert_in_step(client, items)
            assert client.status().state == "ready"


def test_a_live_consumer_that_falls_too_far_behind_rebuilds(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data", outbox_max_rows=2000) as daemon:
        daemon.start()
        process = daemon.process
        assert process is not None

        def freezes_at_rest() -> bool:
            """In a transaction it would be cut off by the server, after half a minute."""
            process.send_signal(signal.SIGSTOP)
            if value(items, AT_REST):
                return True
            process.send_signal(signal.SIGCONT)
            return False

        until(freezes_at_rest, "the consumer is frozen")
        try:
            fill(items, 4000)
            items.execute("DELETE FROM items WHERE id % 3 = 0")
            until(
                lambda: rotate(items)[2] == "default",
                "the frozen consumer must rebuild",
                seconds=60,
            )
            until(
                lambda: rotate(items)[0] == 0 and outbox_rows(items) < 2000,
                "the outbox is freed without the frozen consumer",
            )
            fill(items, 500, 5000)
        finally:
            process.send_signal(signal.SIGCONT)
        with daemon.client() as client:
            # If it was frozen in a transaction all the same, it compares every row.
            until(
                lambda: any(
                    word in daemon.log.read_text() for word in ("must_rebuild", "reconciling")
                ),
                "the consumer notices",
                seconds=60,
            )
            assert_in_step(client, items)
            until(lambda: client.status().state == "ready", "the consumer has rebuilt")
            until(
                lambda: not value(items, "SELECT bool_or(must_rebuild) FROM syncd.consumers"),
                "the outbox keeps what it needs again",
            )
            fill(items, 1000, 100)
            assert_in_step(client, items)
        daemon.stop()
        before = len(daemon.log.read_text())
        daemon.start()
        assert "reconciling" not in daemon.log.read_text()[before:]


def test_a_consumer_whose_row_was_deleted_is_right_when_it_comes_back(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data") as daemon:
        daemon.start()
        daemon.stop()
        fill(items, 500)
        items.execute("DELETE FROM items WHERE id < 100")
        items.execute("DELETE FROM syncd.consumers")
        rotate(items)
        rotate(items)
        assert outbox_rows(items) == 0
        daemon.start()
        with daemon.client() as client:
            assert_in_step(client, items)


def test_a_restored_copy_forgets_the_freed_changes_of_another_cluster(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    fill(items, 500)
    with following(database, tmp_path / "data") as daemon:
        daemon.start()
        daemon.stop()
        items.execute("UPDATE syncd.meta SET xid = '5000000000'")  # as the row of a dump
        items.execute("UPDATE syncd.outbox_limit SET freed = '5000000000:5000000000:'")
        items.execute("UPDATE syncd.consumers SET needs = '5000000000:5000000000:'")
        daemon.start()
        with daemon.client() as client:
            assert_in_step(client, items)
            fill(items, 500, 300)
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "the outbox is freed")
        daemon.stop()
        assert "must_rebuild" not in daemon.log.read_text()
        assert freed(items) != Snapshot(5_000_000_000, 5_000_000_000, frozenset())


def test_an_older_data_directory_reconciles_after_a_rotation(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    fill(items, 500)
    with following(database, tmp_path / "data", checkpoint_seconds=3600) as daemon:
        daemon.start()
        daemon.stop()
        shutil.copytree(tmp_path / "data", tmp_path / "older")
        daemon.start()
        items.execute("DELETE FROM items WHERE id < 100")
        with daemon.client() as client:
            assert_in_step(client, items)
            # Both kept checkpoints are newer now, and the nonce of the copy is still known.
            for _ in range(2):
                client.checkpoint()
        until(lambda: outbox_rows(items) == 0, "the outbox is freed")
        daemon.kill()
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(tmp_path / "older", tmp_path / "data")
        before = len(daemon.log.read_text())
        daemon.start()
        log = daemon.log.read_text()[before:]
        assert "the outbox no longer holds the changes" in log
        with daemon.client() as client:
            assert_in_step(client, items)
