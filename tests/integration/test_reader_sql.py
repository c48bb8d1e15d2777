"""PostgreSQL clients of reader processes: whichever one a client meets, its answers are right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from psycopg import pq

from syncd.pgwire.server import SEATS
from tests.daemon import Daemon
from tests.integration.test_readers import READERS, frozen, running, until_answered_here
from tests.scrape import events, sample, wait_for_event
from tests.servers import free_port

CONNECTIONS = 8
ACTIVE = pq.TransactionStatus.ACTIVE
WORD = "of a test"
NEAR_3 = "SELECT key FROM search('items', '[3, 0]', k => 2)"


@pytest.fixture
def items(db: psycopg.Connection, database: str, tmp_path: Path) -> Iterator[Daemon]:
    """A running service with readers and a listener, and a table of ten rows."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 0] FROM generate_series(1, 10) i")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    port = free_port()
    settings = {"sql_listen": f"127.0.0.1:{port}", "token": WORD, "max_connections": CONNECTIONS}
    daemon = Daemon(
        database, tmp_path / "data", readers=READERS, http="127.0.0.1:0", **settings
    ).start()
    running(daemon)
    yield daemon
    if daemon.process is not None:
        daemon.kill()


def connect(daemon: Daemon) -> psycopg.Connection:
    """A connection to any process of the service."""
    host, port = wait_for_event(daemon, "listening_sql")["address"].split(":")
    return psycopg.connect(
        host=host, port=port, user="u", password=WORD, dbname="d", autocommit=True
    )


def until_answered_everywhere(daemon: Daemon) -> None:
    """Return when each reader answers for the dataset itself."""
    with ExitStack() as stack:
        for client in [stack.enter_context(daemon.client()) for _ in range(2 * READERS)]:
            until_answered_here(daemon, client, "items")


def test_searches_run_in_the_readers_and_what_they_lack_is_handed_over(
    items: Daemon, db: psycopg.Connection
) -> None:
    until_answered_everywhere(items)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(items)) for _ in range(CONNECTIONS)]
        with items.client() as client:
            spread = [each.connections for each in client.status().readers]
        assert sum(spread) >= CONNECTIONS
        assert min(spread) > 0
        with pytest.raises(psycopg.OperationalError, match=f"{CONNECTIONS} connections"):
            connect(items)
        with frozen(items):
            for each in connections:
                assert each.execute(NEAR_3).fetchall() == [("3",), ("2",)]
        for number, each in enumerate(connections):
            db.execute("INSERT INTO items VALUES (%s, ARRAY[%s, 9])", (100 + number, number))
            found = each.execute(
                "SELECT key FROM search('items', %s, 1, fresh => true)", [f"[{number}, 9]"]
            ).fetchall()
            assert found == [(str(100 + number),)]
            (rows,) = each.execute("SELECT dataset, count FROM datasets()").fetchall()
            assert rows == ("default/items", 11 + number)
            (state,) = each.execute("SELECT state, consumer FROM status()").fetchall()
            assert state == ("ready", "default")
            with pytest.raises(psycopg.errors.UndefinedTable) as raised:
                each.execute("SELECT * FROM search('nope', '[1]')")
            assert raised.value.diag.message_detail == "unknown_dataset"
            assert raised.value.diag.message_hint == "see: syncd datasets"
        searches = sample(items, "syncd_searches_total", dataset="default/items", outcome="ok")
        assert searches >= 2 * CONNECTIONS
    items.stop()
    assert not events(items, "connection_failed")


def test_a_cancel_request_finds_its_statement_whichever_process_gets_it(
    items: Daemon, database: str
) -> None:
    """One request for each of six statements, which all run: half of them go to another process."""
    until_answered_everywhere(items)
    outcomes: list[type[Exception]] = []

    def search(connection: psycopg.Connection, token: str) -> None:
        try:
            connection.execute(
                "SELECT * FROM search('items', '[1, 0]', after => %s, timeout_ms => 60000)", [token]
            )
        except psycopg.Error as error:
            outcomes.append(type(error))

    with psycopg.connect(database) as writer, ExitStack() as stack:
        (token,) = writer.execute("SELECT syncd.token()").fetchone() or ("",)  # it does not end
        connections = [stack.enter_context(connect(items)) for _ in range(CONNECTIONS)]
        probes = {each.info.backend_pid % SEATS: each for each in connections}
        searching = [each for each in connections if each not in probes.values()]
        assert len(probes) == READERS
        threads = [threading.Thread(target=search, args=(each, token)) for each in searching]
        for thread in threads:
            thread.start()
        while any(each.info.transaction_status != ACTIVE for each in searching):
            pass
        for probe in probes.values():
            probe.execute(NEAR_3)  # its process has read what came before: the statements run
        for each in searching:
            each.cancel_safe()
        for thread in threads:
            thread.join()
        assert outcomes == [psycopg.errors.QueryCanceled] * len(searching)
        for each in connections:
            assert each.execute(NEAR_3).fetchall() == [("3",), ("2",)]
