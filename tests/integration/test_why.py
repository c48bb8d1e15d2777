"""``syncd why``: each fault is a cause with its fix, and the likeliest cause comes first."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.errors import TimedOut
from syncd.ops import why
from syncd.protocol.status_messages import WhyResult
from syncd.settings import load_settings
from tests.conftest import Servers, prepare
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.checking import SERVICE_RIGHTS, role
from tests.integration.commands import run
from tests.servers import PostgresServer


@pytest.fixture
def items(db: psycopg.Connection, daemon: Daemon) -> psycopg.Connection:
    """A table with three rows that a running syncd follows."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[], lang text)")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1, 3) AS i")
    db.execute("SELECT syncd.attach('items', dataset => 'lang')")
    daemon.start()
    return db


def explain(daemon: Daemon, dataset: str, dsn: str | None = None) -> why.Explanation:
    """The explanation that ``why`` prints."""
    settings = load_settings(dsn=dsn or daemon.conninfo, data_dir=daemon.data_dir)
    return why.explain(settings, daemon.socket, dataset)


def subjects(explanation: why.Explanation) -> list[str]:
    """Subjects of the causes, in order; every cause has a fix."""
    assert all(cause.fix for cause in explanation.causes)
    return [cause.what for cause in explanation.causes]


def fact(explanation: why.Explanation, what: str) -> str:
    """Value of one fact."""
    return next(fact.value for fact in explanation.facts if fact.what == what)


def followed(db: psycopg.Connection, daemon: Daemon) -> None:
    """Return once the service has applied every commit, or has failed to."""
    row = db.execute("SELECT syncd.token()").fetchone()
    assert row is not None
    with daemon.client() as client:
        client.wait(row[0])


def test_nothing_is_wrong_with_a_dataset_in_step(items: psycopg.Connection, daemon: Daemon) -> None:
    followed(items, daemon)
    found = explain(daemon, "de")
    assert found.known
    assert subjects(found) == []
    assert fact(found, "state") == "ready"
    assert fact(found, "source") == "public.items"
    assert fact(found, "rows").startswith("3 indexed")
    assert fact(found, "listener") == "connected"
    assert fact(found, "outbox").startswith("0 rows")
    assert re.match(r"\d+:\d+:\S* outbox_id \d+, ", fact(found, "position"))
    done = run("why", "de", "--dsn", items.info.dsn, "--socket", str(daemon.socket))
    assert done.returncode == 0
    assert done.stdout.startswith("default/de\n")
    assert done.stdout.endswith("\nnothing is wrong\n")
    as_json = run(
        "why", "default/de", "--json", "--dsn", items.info.dsn, "--socket", str(daemon.socket)
    )
    assert as_json.returncode == 0
    printed = json.loads(as_json.stdout)
    assert set(printed) == {"dataset", "known", "facts", "causes"}
    assert printed["dataset"] == "default/de"
    daemon.stop()


def test_the_service_describes_the_method_and_answers_it(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    followed(items, daemon)
    with daemon.client() as client:
        assert "why" in [method["name"] for method in client.discover()["methods"]]
        found = client.why("de")
        assert found.dataset == "default/de"
        assert found.status is not None
        assert found.status.count == 3
        assert found.progress is not None
        assert found.progress.failure is None
        assert client.why("nosuch").status is None


def test_many_quarantined_rows_are_counted_outside_the_event_loop(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, '{NaN,1}' FROM generate_series(1, 50) AS i")
    db.execute("SELECT syncd.attach('items')")
    daemon.with_constant("syncd.rpc.methods.IN_PLACE_ROWS", 10).start()
    with daemon.client() as client:
        (count,) = client.why("items").quarantine
        assert (count.reason, count.rows, len(count.sample)) == ("nan", 50, 3)
        assert client.why("item").near == ["default/items"]


def test_a_disabled_trigger_is_the_cause_and_the_fix_repairs_it(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1,1}')"
    )
    db.execute("SELECT syncd.attach('items')")
    # The owner of the table would repair the trigger at once.
    with role(db, *SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}") as name:
        daemon = Daemon(make_conninfo(database, user=name), tmp_path / "data").start()
        try:
            db.execute("ALTER TABLE items DISABLE TRIGGER syncd_2_update")
            with daemon.client() as client, pytest.raises(TimedOut):
                # No position holds every write now.
                client.search("items", [1, 1], consistency="strong", timeout_ms=5000)
            found = explain(daemon, "items", dsn=database)
            assert subjects(found) == ["triggers of public.items", "state"]
            assert "syncd_2_update" in found.causes[0].detail
            db.execute("UPDATE items SET v = '{9,9}'")
            done = run(*shlex.split(found.causes[0].fix)[1:], SYNCD_DSN=database)
            assert done.returncode == 0, done.stderr
            followed(db, daemon)
            with daemon.client() as client:
                assert client.search("items", [9, 9], k=1)[0].distance == pytest.approx(0, abs=1e-6)
            assert subjects(explain(daemon, "items", dsn=database)) == []
        finally:
            daemon.kill()


def test_a_session_that_locks_the_table_comes_first_with_pid_query_and_since(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    items.execute("INSERT INTO items VALUES (4, '{1,2,3}', 'de')")
    followed(items, daemon)
    with psycopg.connect(items.info.dsn, application_name="migration") as holder:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        found = explain(daemon, "de")
        assert subjects(found) == ["locks on public.items", "quarantine"]
        for words in (
            f"pid {holder.info.backend_pid}",
            "migration",
            "LOCK TABLE items",
            "since 20",
        ):
            assert words in found.causes[0].detail
        assert found.causes[0].fix.endswith(
            f"SELECT pg_terminate_backend({holder.info.backend_pid});"
        )
        items.execute(found.causes[0].fix.partition("or: ")[2].encode())
        holder.close()
    followed(items, daemon)
    assert subjects(explain(daemon, "de")) == ["quarantine"]


def test_a_session_that_waits_for_a_lock_stops_readers_and_its_blocker_is_named(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    with (
        psycopg.connect(items.info.dsn) as reader,
        psycopg.connect(items.info.dsn, autocommit=True) as waiter,
    ):
        reader.execute("SELECT count(*) FROM items")
        pid = waiter.info.backend_pid
        waiter.pgconn.send_query(b"ALTER TABLE items ADD COLUMN more int")
        waits = "SELECT 1 FROM pg_locks WHERE pid = %s AND NOT granted"
        until(lambda: items.execute(waits, [pid]).fetchone() is not None, "it waits")
        found = explain(daemon, "de")
        assert subjects(found)[0] == "locks on public.items"
        assert f"waits for pid {reader.info.backend_pid}" in found.causes[0].detail
        assert f"pg_terminate_backend({reader.info.backend_pid})" in found.causes[0].fix
        reader.rollback()
        waiter.close()


def test_quarantined_rows_are_counted_by_reason_with_some_keys(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    items.execute(
        "INSERT INTO items VALUES (7, '{1,2,3}', 'de'), (8, '{1,2,3}', 'de'), (9, '{NaN,1}', 'de')"
    )
    followed(items, daemon)
    found = explain(daemon, "de")
    assert subjects(found) == ["quarantine", "quarantine"]
    assert (
        "2 live rows are in quarantine with dimension_mismatch, such as key 7, 8"
        in found.causes[0].detail
    )
    assert "1 live row is in quarantine with nan, such as key 9" in found.causes[1].detail
    assert "embed these rows" in found.causes[0].fix


def test_rows_that_are_not_live_are_the_cause(items: psycopg.Connection, daemon: Daemon) -> None:
    items.execute("UPDATE items SET v = NULL")
    followed(items, daemon)
    found = explain(daemon, "de")
    assert subjects(found) == ["live rows of public.items"]
    assert fact(found, "rows").startswith("0 indexed")


def test_a_table_that_may_no_longer_be_read_has_its_grant_first(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')"
    )
    db.execute("SELECT syncd.attach('items')")
    with role(db, *SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}") as name:
        daemon = Daemon(make_conninfo(database, user=name), tmp_path / "data").start()
        try:
            db.execute(f'REVOKE SELECT ON items FROM "{name}"'.encode())
            db.execute("INSERT INTO items VALUES (2, '{2}')")
            followed(db, daemon)
            found = explain(daemon, "items")
            assert subjects(found) == ["rights on public.items"]
            assert "failed" in fact(found, "state")
            assert fact(found, "last error").startswith("as above")
            db.execute(found.causes[0].fix.encode())
        finally:
            daemon.kill()


def test_a_dropped_table_is_the_cause(items: psycopg.Connection, daemon: Daemon) -> None:
    items.execute("DROP TABLE items")
    followed(items, daemon)
    found = explain(daemon, "de")
    assert subjects(found) == ["table"]
    assert run(*found.causes[0].fix.split()[1:], SYNCD_DSN=items.info.dsn).returncode == 0


def test_an_open_transaction_that_wrote_is_named(
    items: psycopg.Connection, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "OPEN_WRITER_SECONDS", 0.0)
    with psycopg.connect(items.info.dsn, application_name="slow") as writer:
        writer.execute("INSERT INTO items VALUES (99, '{1,1}', 'de')")
        found = explain(daemon, "de")
        assert subjects(found) == ["open transaction"]
        assert f"pid {writer.info.backend_pid}" in found.causes[0].detail
        assert "slow" in found.causes[0].detail


def test_a_forgotten_prepared_transaction_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "OPEN_WRITER_SECONDS", 0.0)
    settings = {"max_prepared_transactions": "5"}
    with PostgresServer(18, tmp_path_factory.mktemp("two_phase"), settings=settings) as server:
        prepare(server, pgvector=False)
        dsn = server.create_database("app", "syncd_template")
        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute(
                "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, "
                "'{1}')"
            )
            db.execute("SELECT syncd.attach('items')")
            daemon = Daemon(dsn, tmp_path / "data").start()
            try:
                db.execute("BEGIN; INSERT INTO items VALUES (2, '{2}'); PREPARE TRANSACTION 'lost'")
                found = explain(daemon, "items")
                assert subjects(found) == ["prepared transactions"]
                assert "'lost'" in found.causes[0].detail
                assert "ROLLBACK PREPARED 'lost';" in found.causes[0].fix
                assert fact(found, "listener").startswith("off")
                db.execute("ROLLBACK PREPARED 'lost'")
                assert subjects(explain(daemon, "items")) == []
            finally:
                daemon.kill()


def test_an_unknown_dataset_has_near_names_and_the_rules_of_sources(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    items.execute("INSERT INTO items VALUES (50, '{5,5}', NULL)")
    followed(items, daemon)
    settings: dict[str, Any] = {"SYNCD_DSN": items.info.dsn, "SYNCD_SOCKET": str(daemon.socket)}
    done = run("why", "DE", **settings)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "default/DE: there is no dataset of this name" in done.stdout
    assert "near names: default/de" in done.stdout
    assert "next: syncd why default/de" in done.stdout
    assert "public.items: project 'default', dataset lang, live true" in done.stdout
    assert "1 live row is in quarantine with null_dataset, such as key 50" in done.stdout
    found = explain(daemon, "completely-different")
    assert not found.known
    assert "dataset" in subjects(found)
    assert "syncd datasets" in found.causes[subjects(found).index("dataset")].fix


def test_with_nothing_attached_the_cause_is_that(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("SELECT syncd.detach('syncd.embeddings')")
    daemon.start()
    found = explain(daemon, "items")
    assert subjects(found) == ["source"]
    assert found.causes[0].fix == "syncd attach TABLE"


def test_a_database_that_is_down_is_a_cause_alongside_the_facts_of_the_service(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    found = explain(daemon, "de", dsn="host=127.0.0.1 port=1")
    assert subjects(found) == ["database"]
    assert "Connection refused" in found.causes[0].detail
    assert fact(found, "state") == "ready"
    assert items.info.dsn


def test_a_role_without_rights_gets_the_role_that_has_them(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    with role(items) as name:
        found = explain(daemon, "de", dsn=make_conninfo(items.info.dsn, user=name))
    assert subjects(found) == ["database"]
    assert "permission denied" in found.causes[0].detail
    assert "the role that syncd serve connects as" in found.causes[0].fix


def test_without_a_service_why_exits_1_with_the_command_that_starts_it(tmp_path: Path) -> None:
    done = run("why", "de", SYNCD_SOCKET=str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no syncd answers")
    assert "syncd serve" in done.stderr
    assert "Traceback" not in done.stderr


# Answers of a service, without a service


def said(**changes: Any) -> WhyResult:
    """The answer of a service for a healthy dataset, with these changes."""
    status = {
        "dataset": "default/de",
        "source": "public.items",
        "state": "ready",
        "count": 3,
        "tombstones": 0,
        "dim": 2,
        "metric": "l2",
        "index": "exact",
        "recall": 1.0,
        "verified": True,
        "bytes": 100,
        "lag_seconds": 0.0,
    }
    progress = {
        "source": "public.items",
        "failure": None,
        "retry_in_seconds": 0.0,
        "scanned_rows": None,
        "moved_seconds": 0.1,
        "position": {"snapshot": "5:5:", "outbox_id": 1},
        "unconfirmed_keys": 0,
    }
    saved_at = datetime.now(UTC) - timedelta(seconds=5)
    answer: dict[str, Any] = {
        "dataset": "default/de",
        "status": status,
        "reason": "",
        "progress": progress,
        "quarantine": [],
        "near": [],
        "pending": {},
        "consumer": "default",
        "connected": True,
        "notifies": True,
        "listener_connected": True,
        "last_pass_seconds": 0.1,
        "open_writers": 0,
        "checkpoint": {"at": saved_at.isoformat(), "seconds": 0.1, "error": None},
    }
    for name, value in changes.items():
        where = next(each for each in (answer, status, progress) if name in each)
        where[name] = value
    return msgspec.convert(answer, WhyResult)


@pytest.mark.parametrize(
    ("changes", "what", "words"),
    [
        ({"connected": False}, "database", "no connection"),
        (
            {"state": "must_rebuild", "reason": "the outbox was freed"},
            "state",
            "syncd rebuild default/de",
        ),
        ({"state": "must_rebuild", "scanned_rows": 5}, "state", "SYNCD_OUTBOX_MAX_ROWS"),
        ({"state": "catching_up", "scanned_rows": 70}, "state", "70 rows"),
        ({"state": "failed", "failure": "disk full"}, "failure", "disk full"),
        ({"failure": "disk full"}, "failure", "answers from its last position"),
        ({"listener_connected": False}, "listener", "SYNCD_NOTIFY=off"),
        ({"error": "disk full"}, "checkpoint", "disk full"),
        ({"state": "failed"}, "failure", "log of syncd serve"),
        ({"lag_seconds": 90.0}, "lag", "changes wait"),
    ],
)
def test_each_trouble_that_the_service_knows_is_a_cause(
    changes: dict[str, Any], what: str, words: str
) -> None:
    if "error" in changes:
        changes = {"checkpoint": {"at": None, "seconds": None, "error": changes["error"]}}
    answer = said(**changes)
    causes = why.in_order(list(why.service_causes(answer)), answer)
    assert [cause.what for cause in causes] == [what]
    assert words in causes[0].detail + causes[0].fix


def test_all_is_well_with_a_service_that_says_so() -> None:
    answer = said()
    assert why.in_order(list(why.service_causes(answer)), answer) == []


@pytest.fixture(params=[15, 16])
def older(servers: Servers, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A syncd of an older server."""
    server = servers.of(request.param)
    dsn = server.create_database("why", "syncd_template")
    server.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')",
        "why",
    )
    server.execute("SELECT syncd.attach('items')", "why")
    daemon = Daemon(dsn, tmp_path / "data").start()
    yield daemon
    daemon.kill()
    server.drop_database("why")


def test_why_reads_older_servers_too(older: Daemon) -> None:
    assert subjects(explain(older, "items")) == []
    with psycopg.connect(older.conninfo) as holder:
        holder.execute("LOCK TABLE items")
        assert subjects(explain(older, "items")) == ["locks on public.items"]
