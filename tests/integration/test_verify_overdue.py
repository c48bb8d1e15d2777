"""Verify in the background: a source's trouble delays no other source.

A complete verify that is late is reported with the reason.
"""

from __future__ import annotations

from datetime import datetime

import psycopg
import pytest

from syncd.ops.check import examine
from syncd.ops.findings import Finding
from syncd.protocol.status_messages import VerifyStatus
from syncd.settings import load_settings
from tests.daemon import Daemon
from tests.faults.errors import ALWAYS
from tests.faults.following import logged, until
from tests.integration.verifying import HELD_UP_SOON
from tests.scrape import get, readyz

OF_BAD = "args[1].source.table == 'bad'"


@pytest.fixture(autouse=True)
def two(db: psycopg.Connection, daemon: Daemon) -> psycopg.Connection:
    """Two tables, and a service that compares them every second."""
    for name in ("bad", "good"):
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, v real[])".encode())
        db.execute(
            f"INSERT INTO {name} SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i".encode()
        )
        db.execute("SELECT syncd.attach(%s, metric => 'l2')", [name])
    daemon.settings |= {"verify_seconds": 1, "http": "127.0.0.1:0"}
    return db


def drift(db: psycopg.Connection, table: str) -> None:
    """Change a row without an outbox row."""
    with db.transaction():
        db.execute(f"UPDATE {table} SET v = '{{7,7}}' WHERE id = 7".encode())
        db.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")


def verify(daemon: Daemon) -> VerifyStatus:
    with daemon.client() as client:
        found = client.status().verify
    assert found is not None
    return found


def checked(daemon: Daemon) -> Finding:
    settings = load_settings(dsn=daemon.conninfo, data_dir=daemon.data_dir)
    (found,) = [each for each in examine(settings, daemon.socket) if each.what == "verify"]
    return found


def repaired(daemon: Daemon, table: str) -> bool:
    with daemon.client() as client:
        rows = client.get(table, [7], vectors=True)
    return bool(rows) and rows[0].vector is not None and list(rows[0].vector) == [7.0, 7.0]


def test_a_late_complete_verify_is_reported_by_check_the_page_and_status_with_the_reason(
    two: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.constants.update(HELD_UP_SOON)
    daemon.start()
    until(lambda: logged(daemon, '"verified"') > 1, "the service verifies")
    # On a busy machine a verify takes longer than its interval now and then.
    until(lambda: not verify(daemon).overdue, "the verify is in time")
    until(lambda: checked(daemon).level == "ok", "check finds it in time")
    with psycopg.connect(daemon.conninfo) as holder:
        holder.execute("LOCK TABLE bad IN ACCESS EXCLUSIVE MODE")
        until(lambda: bool(verify(daemon).overdue), "the verify is late")
        until(
            lambda: "public.bad" in verify(daemon).overdue and "lock" in verify(daemon).overdue,
            "the reason is given",
        )
        found = checked(daemon)
        assert found.level == "warn"
        assert "twice SYNCD_VERIFY_SECONDS=1: public.bad" in found.detail
        assert "syncd verify" in found.fix
        assert "the next is late: public.bad" in get(daemon, "/")[1]
        assert any("the next is late" in remark for remark in readyz(daemon)[1]["remarks"])
        drift(two, "good")
        until(
            lambda: repaired(daemon, "good"), "the other source is compared and repaired meanwhile"
        )
    until(lambda: not verify(daemon).overdue, "the verify is in time again")
    daemon.stop()


def test_an_unexpected_error_over_one_source_keeps_no_other_from_being_verified(
    two: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.with_error("syncd.sync.background.comparison:compare_source", ALWAYS, OF_BAD).start()
    drift(two, "good")
    until(lambda: repaired(daemon, "good"), "the other source is compared and repaired")
    until(
        lambda: "public.bad: unexpected BrokenOnPurposeError" in verify(daemon).overdue,
        "the reason is given",
    )
    with daemon.client() as client:
        outcomes = {each.source: each.outcome for each in client.verify().sources}
    assert outcomes["public.bad"] == "failed"
    assert outcomes["public.good"] == "compared"
    daemon.stop()


def test_a_lock_that_is_waited_for_on_one_table_delays_no_other_verify(
    two: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.with_constant("syncd.sync.background.verify.FIRST_PAUSE_SECONDS", 0.01)
    daemon.with_constant("tests.faults.errors.RAISED", "in_the_way")
    daemon.with_error("syncd.sync.background.comparison:compare_source", ALWAYS, OF_BAD).start()
    drift(two, "good")
    until(lambda: repaired(daemon, "good"), "the other source is compared and repaired")
    until(lambda: "public.bad: another session" in verify(daemon).overdue, "the reason is given")
    daemon.stop()


def test_restarts_do_not_make_the_last_complete_verify_younger(daemon: Daemon) -> None:
    daemon.start()
    until(lambda: logged(daemon, '"verified"') > 0, "the service verifies")
    daemon.stop()
    stopped = datetime.now().astimezone()
    daemon.with_error("syncd.sync.background.verify:Verifier.attempt", ALWAYS).start()
    at = verify(daemon).at
    assert at is not None
    assert at < stopped
    until(
        lambda: "BrokenOnPurposeError" in checked(daemon).detail or bool(verify(daemon).overdue),
        "the verify is late",
    )
    daemon.kill()
    daemon.broken.clear()
    daemon.with_error("syncd.sync.background.verify:Verifier.verify_in_background", ALWAYS).start()
    assert verify(daemon).at == at
    assert checked(daemon).level == "warn"
    daemon.stop()


def test_a_verify_in_the_background_can_be_off_and_is_never_late_then(daemon: Daemon) -> None:
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    assert not verify(daemon).overdue
    assert "SYNCD_VERIFY_SECONDS=0" in checked(daemon).detail
    daemon.stop()
