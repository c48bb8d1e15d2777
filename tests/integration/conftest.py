"""A service with rows to compare."""

from __future__ import annotations

import psycopg
import pytest

from tests.daemon import Daemon


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Daemon:
    """A service that follows a thousand rows and never verifies by itself."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector, gone boolean DEFAULT false, lang text DEFAULT 'en')")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, i % 7, 1, 2, 3, 4, 5, 6]::real[]::vector FROM generate_series(1, 1000) i"
    )
    db.execute("SELECT syncd.attach('items', metric => 'cosine', live => 'NOT gone', columns => ARRAY['lang'])")
    daemon.settings["verify_seconds"] = 0
    return daemon.start()
