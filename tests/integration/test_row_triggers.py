"""Tables that invisible apply workers write: attach has an argument for them, and check warns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.integration.captured import keys, outbox
from tests.integration.checking import TABLE, examine
from tests.integration.commands import run
from tests.integration.sources import ROW_FORM, STATEMENT_FORM, attach, events, everything
from tests.servers import PostgresServer


@pytest.fixture
def items(any_db: psycopg.Connection) -> psycopg.Connection:
    any_db.execute(TABLE)
    return any_db


def test_attach_can_switch_row_triggers_on_and_off(
    items: psycopg.Connection,
) -> None:
    attach(items, "items", row_triggers=True)
    assert events(items) == ROW_FORM
    items.execute("TRUNCATE syncd.outbox")
    items.execute("INSERT INTO items VALUES (1, '{1}'), (2, '{2}')")
    items.execute("UPDATE items SET id = 3 WHERE id = 1")
    assert outbox(items) == [*keys(1, 2), *keys(1, 3)]
    before = everything(items)
    attach(items, "items", row_triggers=True)
    assert everything(items) == before, "the same arguments change nothing"
    attach(items, "items")
    assert events(items) == STATEMENT_FORM


def test_an_attachment_without_the_argument_equals_one_with_false(
    items: psycopg.Connection,
) -> None:
    attach(items, "items")
    before = everything(items)
    attach(items, "items", row_triggers=False)
    assert everything(items) == before


@pytest.fixture
def worker(any_server: PostgresServer) -> Iterator[str]:
    """Trace of another tool's apply worker on a server."""
    any_server.execute("SELECT pg_replication_origin_create('bdr_1_2')")
    yield "bdr_1_2"
    any_server.execute("SELECT pg_replication_origin_drop('bdr_1_2')")


def test_check_warns_if_an_apply_worker_may_write_past_statement_triggers(
    items: psycopg.Connection, worker: str, tmp_path: Path
) -> None:
    attach(items, "items")
    [found] = [
        each
        for each in examine(items, tmp_path)
        if each.what == "triggers of public.items" and each.level == "warn"
    ]
    assert worker in found.detail
    command = found.fix.partition(": ")[2]
    assert (
        command
        == "syncd attach public.items --vector v --dataset \"'items'\" --key id --row-triggers"
    )
    done = run(
        "attach",
        "public.items",
        "--row-triggers",
        SYNCD_DSN=items.info.dsn,
        SYNCD_DATA_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert events(items) == ROW_FORM
    assert {
        each.level for each in examine(items, tmp_path) if each.what == "triggers of public.items"
    } == {"ok"}
