"""What several files begin with: a table, and a service that follows it or is about to."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults import altered, rotation
from tests.faults.altered import Followed

SHORT_PAGES = ("syncd.sync.scan.PAGE_ROWS", (10, 10, 10))
"""A comparison of the small table takes so many passes that readers meet it."""


@pytest.fixture
def items(db: psycopg.Connection) -> psycopg.Connection:
    """Table ``items`` of ``tests.faults.rotation``, attached."""
    rotation.make_items(db)
    return db


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """Table ``items`` of ``tests.faults.altered``, and a service that has caught up with it."""
    altered.make_items(db)
    daemon.constants.update([SHORT_PAGES])
    with altered.serving(db, daemon) as it:
        it.in_step()
        yield it
        daemon.stop()
