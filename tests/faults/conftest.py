"""What several files begin with: a table, and a service that follows it or is about to."""

from __future__ import annotations

import psycopg
import pytest

from tests.faults import rotation


@pytest.fixture
def items(db: psycopg.Connection) -> psycopg.Connection:
    """Table ``items`` of ``tests.faults.rotation``, attached."""
    rotation.make_items(db)
    return db
