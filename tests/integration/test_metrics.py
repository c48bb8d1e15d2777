"""Every metric of the contract exists, has the contract's labels, and moves with its subject."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version

import psycopg
import pytest

from syncd.client.client import Client
from syncd.errors import RequestError, UnknownKey
from syncd.ops.metrics import COUNTERS, GAUGES, HISTOGRAMS
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import is_unknown, until
from tests.scrape import get, readyz, sample, samples
from tests.servers import PostgresServer

CONTRACT = """
`syncd_build_info`, `syncd_lag_seconds{dataset}`, `syncd_lag_rows{dataset}`,
`syncd_deltas_applied_total{dataset,op}`, `syncd_apply_seconds`,
`syncd_search_seconds{dataset}`, `syncd_searches_total{dataset,outcome}`,
`syncd_index_vectors{dataset}`, `syncd_index_tombstones{dataset}`,
`syncd_index_bytes{dataset}`, `syncd_index_recall{dataset}`, `syncd_index_recall_p5{dataset}`,
`syncd_checkpoint_seconds`, `syncd_checkpoint_last_success_timestamp_seconds`,
`syncd_checkpoint_failures_total`,
`syncd_listener_connected`, `syncd_listener_reconnects_total`, `syncd_wakeups_total{source}`,
`syncd_outbox_rows`, `syncd_quarantined{dataset}`,
`syncd_verify_seconds`, `syncd_verify_last_success_timestamp_seconds`,
`syncd_verify_drift_total{dataset}`, `syncd_repaired_total{dataset}`,
`syncd_rebuilds_total{dataset,reason}`, `syncd_task_failures_total{task}`,
`syncd_readers`, `syncd_reader_restarts_total`
"""
LABELS: Mapping[str, frozenset[str]] = {
    name: frozenset(labels.split(",") if labels else ())
    for name, labels in re.findall(r"`(\w+)(?:\{([\w,]+)\})?`", CONTRACT)
}
DATASET = "default/a"


@dataclass(frozen=True)
class Followed:
    """A followed table, its service, and a client."""

    server: PostgresServer
    conninfo: str
    db: psycopg.Connection
    daemon: Daemon
    client: Client

    def write(self, query: str) -> None:
        """Write, and wait until the service has applied it."""
        self.db.execute(query.encode())
        row = self.db.execute("SELECT syncd.token()").fetchone()
        assert row is not None
        self.client.wait(row[0])

    def write_unnoticed(self) -> None:
        """Change a row without an outbox row."""
        with self.db.transaction():
            self.db.execute("UPDATE t SET v = ARRAY[v[1] + 1, v[2]] WHERE id = 3")
            self.db.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")


@pytest.fixture(scope="module")
def followed(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Followed]:
    for conninfo in clone(server):
        daemon = Daemon(
            conninfo,
            tmp_path_factory.mktemp("metrics") / "data",
            http="127.0.0.1:0",
            verify_seconds=0,
            readers=1,
        )
        for constant in (
            "syncd.sync.background.reports.REPORT_SECONDS",
            "syncd.sync.background.rotation.ROTATION_SECONDS",
        ):
            daemon.with_constant(constant, 0.05)
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("CREATE TABLE t (id int PRIMARY KEY, kind text DEFAULT 'a', v real[])")
            db.execute(
                "INSERT INTO t (id, v) SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i"
            )
            db.execute("SELECT syncd.attach('t', dataset => 'kind', metric => 'l2')")
            daemon.start()
            with daemon.client() as client:
                yield Followed(server, conninfo, db, daemon, client)
            daemon.stop()


# Events; each lasts while the metrics are read.


@contextmanager
def out_of_reach(it: Followed) -> Iterator[None]:
    name = it.db.info.dbname
    it.server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    it.server.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' "
        "AND application_name LIKE 'syncd/%'"
    )
    try:
        yield
    finally:
        it.server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        until(lambda: "reached" not in str(readyz(it.daemon)), "the database is back")
        until(lambda: sample(it.daemon, "syncd_listener_connected") == 1, "the listener is back")


@contextmanager
def reader_killed(it: Followed) -> Iterator[None]:
    """A reader is killed: there is none for a moment, and then another one."""
    until(lambda: sample(it.daemon, "syncd_readers") == 1, "the reader is ready")
    (reader,) = it.client.status().readers
    os.kill(reader.pid, signal.SIGKILL)
    yield
    until(lambda: sample(it.daemon, "syncd_readers") == 1, "the reader is back")


@contextmanager
def lost_and_found(it: Followed) -> Iterator[None]:
    with out_of_reach(it):
        pass
    yield


@contextmanager
def locked_with_changes(it: Followed) -> Iterator[None]:
    """A change is committed and the table cannot be read: the lock waited behind the writer."""
    with psycopg.connect(it.conninfo) as writer, psycopg.connect(it.conninfo) as locker:
        writer.execute("UPDATE t SET v = '{7,7}' WHERE id = 7")
        waiting = threading.Thread(
            target=locker.execute, args=["LOCK TABLE t IN ACCESS EXCLUSIVE MODE"]
        )
        waiting.start()
        pid = locker.info.backend_pid
        query = "SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted"
        until(lambda: it.db.execute(query, [pid]).fetchone() is not None, "the lock is waited for")
        writer.commit()
        waiting.join()
        yield


@contextmanager
def row_inserted(it: Followed) -> Iterator[None]:
    it.write("INSERT INTO t (id, v) SELECT max(id) + 1, '{1,2}' FROM t")
    yield


@contextmanager
def many_rows_inserted(it: Followed) -> Iterator[None]:
    it.write(
        "INSERT INTO t (id, v) SELECT max(t.id) + i, '{1,2}' "
        "FROM t, generate_series(1, 20000) AS i GROUP BY i"
    )
    yield


@contextmanager
def row_updated(it: Followed) -> Iterator[None]:
    it.write("UPDATE t SET v = ARRAY[v[1] + 1, 2] WHERE id = 1")
    yield


@contextmanager
def row_deleted(it: Followed) -> Iterator[None]:
    it.write("DELETE FROM t WHERE id = (SELECT max(id) FROM t)")
    yield


@contextmanager
def bad_row_inserted(it: Followed) -> Iterator[None]:
    it.write("INSERT INTO t (id, v) SELECT max(id) + 1, '{nan,2}' FROM t")
    yield


@contextmanager
def dataset_made(it: Followed) -> Iterator[None]:
    it.write("INSERT INTO t (id, kind, v) SELECT max(id) + 1, 'new', '{1,2}' FROM t")
    yield


@contextmanager
def another_dataset_made(it: Followed) -> Iterator[None]:
    it.write("INSERT INTO t (id, kind, v) SELECT max(id) + 1, 'newer', '{1,2}' FROM t")
    yield


@contextmanager
def searched(it: Followed) -> Iterator[None]:
    it.client.search("a", [1.0, 1.0])
    yield


@contextmanager
def searched_for_an_unknown_key(it: Followed) -> Iterator[None]:
    with suppress(UnknownKey):
        it.client.search("a", key=-1)
    yield


@contextmanager
def searched_in_an_unknown_dataset(it: Followed) -> Iterator[None]:
    until(lambda: is_unknown(it.client, "nosuch"), "the name is unknown")
    yield


@contextmanager
def checkpoint_saved(it: Followed) -> Iterator[None]:
    it.client.checkpoint()
    yield


@contextmanager
def checkpoint_failed(it: Followed) -> Iterator[None]:
    away = it.daemon.data_dir.with_name("away")
    it.daemon.data_dir.rename(away)
    try:
        with pytest.raises(RequestError):
            it.client.checkpoint()
    finally:
        away.rename(it.daemon.data_dir)
    yield


@contextmanager
def verified(it: Followed) -> Iterator[None]:
    assert all(row.in_sync for row in it.client.verify().datasets)
    yield


@contextmanager
def drift_found(it: Followed) -> Iterator[None]:
    it.write_unnoticed()
    assert [row.stale for row in it.client.verify("a").datasets] == [1]
    yield


@contextmanager
def drift_repaired(it: Followed) -> Iterator[None]:
    it.write_unnoticed()
    assert [row.repaired for row in it.client.verify("a", repair=True).datasets] == [1]
    yield


@contextmanager
def rebuilt(it: Followed) -> Iterator[None]:
    it.client.rebuild("a")
    yield


@contextmanager
def reports_failed(it: Followed) -> Iterator[None]:
    """The reporter writes to that table only if a row comes into quarantine or leaves it."""
    it.write("ALTER TABLE syncd.quarantine_reports RENAME TO away")
    try:
        with bad_row_inserted(it):
            yield
    finally:
        it.write("ALTER TABLE syncd.away RENAME TO quarantine_reports")


Act = Callable[[Followed], AbstractContextManager[None]]

MOVES: list[tuple[str, Mapping[str, str], Act]] = [
    ("syncd_lag_seconds", {"dataset": DATASET}, out_of_reach),
    ("syncd_lag_rows", {"dataset": DATASET}, locked_with_changes),
    ("syncd_deltas_applied_total", {"dataset": DATASET, "op": "insert"}, row_inserted),
    ("syncd_deltas_applied_total", {"dataset": DATASET, "op": "update"}, row_updated),
    ("syncd_deltas_applied_total", {"dataset": DATASET, "op": "delete"}, row_deleted),
    ("syncd_apply_seconds", {}, row_updated),
    ("syncd_search_seconds", {"dataset": DATASET}, searched),
    ("syncd_searches_total", {"dataset": DATASET, "outcome": "ok"}, searched),
    (
        "syncd_searches_total",
        {"dataset": DATASET, "outcome": "unknown_key"},
        searched_for_an_unknown_key,
    ),
    (
        "syncd_searches_total",
        {"dataset": "other", "outcome": "unknown_dataset"},
        searched_in_an_unknown_dataset,
    ),
    ("syncd_index_vectors", {"dataset": DATASET}, row_inserted),
    ("syncd_index_tombstones", {"dataset": DATASET}, row_updated),
    ("syncd_index_bytes", {"dataset": DATASET}, many_rows_inserted),
    ("syncd_index_recall", {"dataset": "default/new"}, dataset_made),
    ("syncd_index_recall_p5", {"dataset": "default/newer"}, another_dataset_made),
    ("syncd_checkpoint_seconds", {}, checkpoint_saved),
    ("syncd_checkpoint_last_success_timestamp_seconds", {}, checkpoint_saved),
    ("syncd_checkpoint_failures_total", {}, checkpoint_failed),
    ("syncd_listener_connected", {}, out_of_reach),
    ("syncd_listener_reconnects_total", {}, lost_and_found),
    ("syncd_wakeups_total", {"source": "notify"}, row_updated),
    ("syncd_wakeups_total", {"source": "request"}, rebuilt),
    ("syncd_wakeups_total", {"source": "connect"}, lost_and_found),
    ("syncd_outbox_rows", {}, row_updated),
    ("syncd_quarantined", {"dataset": DATASET}, bad_row_inserted),
    ("syncd_verify_seconds", {}, verified),
    ("syncd_verify_last_success_timestamp_seconds", {}, verified),
    ("syncd_verify_drift_total", {"dataset": DATASET}, drift_found),
    ("syncd_repaired_total", {"dataset": DATASET}, drift_repaired),
    ("syncd_rebuilds_total", {"dataset": DATASET, "reason": "request"}, rebuilt),
    ("syncd_task_failures_total", {"task": "reporter"}, reports_failed),
    ("syncd_readers", {}, reader_killed),
    ("syncd_reader_restarts_total", {}, reader_killed),
]


@pytest.mark.parametrize(
    ("name", "labels", "act"), MOVES, ids=[f"{name}-{act.__name__}" for name, _, act in MOVES]
)
def test_a_metric_moves(followed: Followed, name: str, labels: Mapping[str, str], act: Act) -> None:
    series = (f"{name}_count" if name in HISTOGRAMS else name, frozenset(labels.items()))
    assert labels.keys() == LABELS[name]
    before = samples(followed.daemon).get(series)
    with act(followed):
        until(
            lambda: samples(followed.daemon).get(series) != before,
            f"{series} is no longer {before}",
        )


def test_every_metric_of_the_contract_is_there_and_no_other(followed: Followed) -> None:
    text = get(followed.daemon, "/metrics")[1]
    assert (
        set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
        == set(LABELS)
        == {*GAUGES, *COUNTERS, *HISTOGRAMS}
    )
    assert {name for name, _, _ in MOVES} | {"syncd_build_info"} == set(LABELS)
    built = [
        dict(labels) for name, labels in samples(followed.daemon) if name == "syncd_build_info"
    ]
    assert [one["version"] for one in built] == [version("syncd")]


def test_drift_and_repairs_are_zero_before_there_are_any(followed: Followed) -> None:
    """A series that begins with its first drift shows no increase, so it raises no alert."""
    with dataset_made(followed):
        for name in ("syncd_verify_drift_total", "syncd_repaired_total"):
            assert sample(followed.daemon, name, dataset="default/new") == 0
