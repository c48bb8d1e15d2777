"""An unexpected error fails one source, or restarts one task; the service goes on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from syncd.errors import NotReady, SyncdError
from syncd.ops.check import examine
from syncd.settings import load_settings
from tests.daemon import READY_SECONDS, Daemon
from tests.faults.errors import ALWAYS
from tests.faults.following import keys_of, logged, until
from tests.oracle.writes import fetch
from tests.scrape import get, sample
from tests.servers import free_port

ONE = "args[0].source.table == 'bad'"
OF_ONE_SOURCE = [
    ("syncd.sync.consumer.bringing:apply", ONE),
    ("syncd.sync.consumer.bringing:read_by_keys", "args[1].table == 'bad'"),
    ("syncd.sync.consumer.bringing:read_page", "args[1].table == 'bad'"),
    ("syncd.sync.consumer.passes:trouble", ONE),
    ("syncd.sync.source.followed:FollowedSource.caught_up", ONE),
    ("syncd.sync.source.followed:FollowedSource.end_scan", ONE),
    ("syncd.sync.source.looking:compare_while_weak", ONE),
]
TASKS = {
    "builder": "syncd.sync.background.builder:Builder.look",
    "reporter": "syncd.sync.background.reports:Reporter.report",
    "verifier": "syncd.sync.background.verify:Verifier.verify",
    "repairer": "syncd.sync.background.repairing:Repairer.repair_all",
    "rotator": "syncd.sync.background.rotation:Rotator.rotate",
    "checkpointer": "syncd.sync.background.checkpoints:Checkpointer.save",
    "history": "syncd.ops.history:History.sample",
    "webhook": "syncd.ops.webhook:Webhook.tell",
    "consumer": "syncd.sync.consumer.consumer:Consumer.rest",
    "listener": "syncd.postgres.listener:Listener.hear",
    "http": "uvicorn:Server.main_loop",
}


@pytest.fixture(autouse=True)
def two(db: psycopg.Connection) -> psycopg.Connection:
    """Two tables, attached."""
    for name in ("bad", "good"):
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, v real[])".encode())
        db.execute(
            f"INSERT INTO {name} SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i".encode()
        )
        db.execute("SELECT syncd.attach(%s, metric => 'l2')", [name])
    return db


def states(daemon: Daemon) -> dict[str, str]:
    with daemon.client() as client:
        return {row.dataset.removeprefix("default/"): row.state for row in client.datasets()}


def insert(db: psycopg.Connection, table: str, key: int) -> str:
    db.execute(f"INSERT INTO {table} VALUES (%s, ARRAY[%s, 1])".encode(), [key, key])
    return fetch(db, "SELECT syncd.token()")


@pytest.mark.parametrize(
    ("function", "when"), OF_ONE_SOURCE, ids=[name for name, _ in OF_ONE_SOURCE]
)
def test_an_unexpected_error_fails_its_source_and_the_others_go_on(
    two: psycopg.Connection, daemon: Daemon, function: str, when: str
) -> None:
    daemon.start()
    daemon.stop()
    daemon.with_error(function, ALWAYS, when)
    insert(two, "bad", 100)
    insert(two, "good", 100)
    two.execute("SELECT syncd.attach('bad', metric => 'cosine')")  # its table is read again as well
    daemon.start()
    with daemon.client() as client:
        until(lambda: 100 in set(client.keys("good")), "the good source goes on")
        insert(two, "good", 101)
        insert(two, "bad", 101)
        until(lambda: 101 in set(client.keys("good")), "the good source goes on")
        until(
            lambda: (
                "BrokenOnPurposeError: broken on purpose"
                in client.why("bad").pending.get("public.bad", "")
            ),
            "why",
        )
        assert "syncd check" in client.why("bad").pending["public.bad"]
        assert client.status().state == "failed"
    assert logged(daemon, "source_failed_unexpectedly") < 5
    daemon.stop()
    daemon.broken.clear()
    daemon.start()
    with daemon.client() as client:
        assert len(set(client.keys("bad"))) == len(set(client.keys("good"))) == 22
        assert all(row.in_sync for row in client.verify(deep=True).datasets)


def test_a_source_that_an_error_left_half_changed_is_compared_and_right_again(
    two: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.with_error(
        "syncd.sync.source.applying:reconsider",
        2,
        "args[0].source.table == 'bad' and len(args[0].datasets) and args[0].was_ready",
    )
    daemon.start()
    with daemon.client() as client:
        insert(two, "bad", 100)
        until(lambda: logged(daemon, "an unexpected error") > 0, "the source is doubted")
        until(lambda: 100 in (keys_of(client, "bad") or ()), "the change is found")
        until(lambda: client.status().state == "ready", "the table is compared")
        assert all(row.in_sync for row in client.verify(deep=True).datasets)
    assert logged(daemon, "an unexpected error") >= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_task_that_fails_is_reported_and_started_again(
    two: psycopg.Connection, daemon: Daemon, task: str
) -> None:
    daemon.settings |= {
        "http": f"127.0.0.1:{free_port()}",  # the same when the pages start again
        "webhook_url": "http://127.0.0.1:9/",
        "checkpoint_seconds": 0.2,
        "verify_seconds": 3600,
    }
    for name, value in {
        "syncd.ops.history.SAMPLE_SECONDS": 0.1,
        "syncd.sync.background.rotation.ROTATION_SECONDS": 0.1,
        "syncd.supervision.SETTLED_SECONDS": 2.0,
    }.items():
        daemon.with_constant(name, value)
    daemon.with_error(TASKS[task], 3)
    daemon.start()
    with daemon.client() as client:
        until(lambda: logged(daemon, "task_failed") >= 3, "the task fails three times")
        until(lambda: not client.status().failing_tasks, "the task works again")
        client.wait(insert(two, "good", 100), timeout_ms=60_000)
        assert 100 in set(client.keys("good"))
        assert sample(daemon, "syncd_task_failures_total", task=task) == 3
    daemon.stop()


def test_a_task_that_keeps_failing_is_shown_by_status_check_and_the_page(daemon: Daemon) -> None:
    daemon.settings |= {"http": "127.0.0.1:0"}
    daemon.with_error(TASKS["builder"], ALWAYS)
    daemon.start()
    with daemon.client() as client:
        until(
            lambda: any(each.failures > 2 for each in client.status().failing_tasks),
            "the task fails",
        )
        (failing,) = client.status().failing_tasks
        assert failing.task == "builder"
        assert failing.error == "BrokenOnPurposeError: broken on purpose"
        assert 0 <= failing.retry_in_seconds <= 60
        assert set(client.keys("good")) == set(range(1, 21))
    (found,) = [
        each
        for each in examine(
            load_settings(dsn=daemon.conninfo, data_dir=daemon.data_dir), daemon.socket
        )
        if each.what == "task builder"
    ]
    assert found.level == "warn"
    assert "broken on purpose" in found.detail
    assert "syncd status" in found.fix
    page = get(daemon, "/")[1]
    assert "A background task fails" in page
    assert "builder fails and is tried again" in page
    assert "task_failed" in daemon.log.read_text()
    daemon.stop()


def test_an_error_in_the_first_pass_of_a_start_is_tried_again_and_before_a_start_ends_it(
    daemon: Daemon,
) -> None:
    daemon.with_error("syncd.sync.consumer.passes:Pass.checked", 3).start()
    assert states(daemon) == {"bad": "ready", "good": "ready"}
    daemon.stop()
    daemon.broken.clear()
    daemon.with_error("syncd.sync.consumer.consumer:Consumer.take_up", ALWAYS)
    process = daemon.spawn()
    assert process.wait(READY_SECONDS) == 1


def test_a_source_whose_checkpoint_cannot_be_loaded_is_read_again(daemon: Daemon) -> None:
    daemon.start()
    daemon.stop()
    daemon.with_error("syncd.sync.source.loading:check_kind", 1).with_error(
        "syncd.sync.source.loading:take_up", 1, "args[0].source.table == 'good'"
    )
    daemon.start()
    with daemon.client() as client:
        assert states(daemon) == {"bad": "ready", "good": "ready"}
        assert all(row.in_sync and row.rows == 20 for row in client.verify(deep=True).datasets)


def test_a_statement_that_takes_too_long_holds_up_its_source_alone(
    two: psycopg.Connection, daemon: Daemon
) -> None:
    two.execute(
        "CREATE FUNCTION slow(i int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN "
        "IF i = 500 THEN PERFORM pg_sleep(60); END IF; RETURN 'bad'; END $$"
    )
    two.execute("SELECT syncd.attach('bad', metric => 'l2', dataset => 'public.slow(id)')")
    two.execute(f"ALTER ROLE {two.info.user} SET statement_timeout = 0".encode())
    daemon.with_error("syncd.sync.consumer.bringing:read_unkeyed", 0)
    daemon.start()
    with daemon.client() as client:
        insert(two, "bad", 500)
        canceller = threading.Event()

        def cancel() -> None:
            with psycopg.connect(daemon.conninfo, autocommit=True) as db:
                while not canceller.wait(0.05):
                    db.execute(
                        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                        "WHERE wait_event = 'PgSleep'"
                    )

        with ThreadPoolExecutor(1) as threads:
            cancelling = threads.submit(cancel)
            try:
                until(
                    lambda: "cannot be read now" in client.why("bad").pending.get("public.bad", ""),
                    "the bad source is held up",
                )
                insert(two, "good", 100)
                until(lambda: 100 in set(client.keys("good")), "the good source goes on")
                assert client.status().database_error is None
                assert 1 in set(client.keys("bad"))
            finally:
                canceller.set()
            cancelling.result()
    assert logged(daemon, "database_lost") == 0


def test_a_log_that_cannot_be_written_ends_nothing(two: psycopg.Connection, daemon: Daemon) -> None:
    """The log is on a full disk, such as ``/dev/full``."""
    daemon.log.parent.mkdir(parents=True, exist_ok=True)
    daemon.log.symlink_to("/dev/full")
    daemon.start()
    with daemon.client() as client:
        two.execute("SELECT syncd.attach('bad', metric => 'cosine')")  # it is logged
        until(
            lambda: {row.metric for row in client.datasets()} == {"l2", "cosine"},
            "the table is attached again",
        )
        with pytest.raises((NotReady, SyncdError)):
            client.search("nosuch", [1.0, 1.0])
    daemon.stop()
